"""E: "INT8 Quantization", chatterbox-tts-api: USE_INT8_QUANTIZATION, /config, /memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from dotenv import dotenv_values
from safetensors.torch import load_file

from chatterbox_vllm import cli, get_optimal_dtype
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.policy import STRATEGIES, Policy
from chatterbox_vllm.settings import Settings
from chatterbox_vllm.sources import load
from tests.fake_engine import FakeChatterbox, running
from tests.memory_support import Headers
from tests.promises.support import ROOT, Started, corrected, weights, without_gpu


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"USE_INT8_QUANTIZATION": "true"}, lambda settings: settings.policy == Policy("int8", "int8", "int8")),
        ({"USE_INT8_QUANTIZATION": "false"}, lambda settings: not settings.policy.is_quantized),
        ({"MODEL_DTYPE": "auto"}, lambda settings: settings.dtype == "auto"),
        ({"MODEL_DTYPE": "float32"}, lambda settings: settings.dtype == "float32"),
        ({"MODEL_DTYPE": "float16"}, lambda settings: settings.dtype == "float16"),
        ({"MODEL_DTYPE": "bfloat16"}, lambda settings: settings.dtype == "bfloat16"),
        ({"MAX_CHUNK_LENGTH": "280"}, lambda settings: settings.max_chunk_length == 280),
        ({"PORT": "4123"}, lambda settings: settings.port == 4123),
        ({"MEMORY_CLEANUP_INTERVAL": "5"}, lambda settings: settings == Settings()),
    ],
    ids=lambda value: "+".join(f"{name}={each}" for name, each in value.items()) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("place", ["environment", "file"])
def test_e_variables(variables: dict[str, str], found: Any, place: str, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("".join(f"{name}={value}\n" for name, value in variables.items() if place == "file"))
    assert found(load(environment=variables if place == "environment" else {}, env_file=file))


def test_e_an_example_of_env(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every line works when it is uncommented, where there is something to say."""
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    values = [line.removeprefix("#") for line in lines if "=" in line and not line.startswith("# ")]
    assert values
    file = tmp_path / ".env"
    file.write_text("\n".join(line for line in values if line.partition("=")[2]), encoding="utf-8")
    load(environment={}, env_file=file)
    assert caplog.text == ""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running(FakeChatterbox()) as started:
        yield started.url


def test_e_config_quantization(server: str) -> None:
    assert httpx.get(f"{server}/config").json()["quantization"] == "int8"


def test_e_memory_info(server: str) -> None:
    info = httpx.get(f"{server}/memory").json()["memory_info"]
    assert info["cpu_memory_mb"] > 1
    assert info["gpu_memory_allocated_mb"] == pytest.approx(200 / 2**20)


@without_gpu
def test_e_int8_on_a_cpu(started: Started, demo: Checkpoint) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    found = started.by(ChatterboxTTS.from_local, demo, use_int8_quantization=True)
    assert (found["method"], found["flow_encoder"], found["estimator"]) == ("int8", "int8", "int8")


def test_e_get_optimal_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cards before Ampere have no bfloat16."""
    assert get_optimal_dtype("cpu") == torch.float32
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for capability, wanted in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert get_optimal_dtype("cuda") == wanted
    with pytest.raises(ConfigurationError, match=r"device must be cpu.*, not 'cuda:99'"):
        get_optimal_dtype("cuda:99")


def test_e_the_memory_test_runs_against_a_server(server: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["memory", "--url", server, "--requests", "2", "--seconds", "1"]) == 0
    assert "cpu_memory_mb" in capsys.readouterr().out


def test_e_the_guide_to_memory_has_measured_tables() -> None:
    """Every method has a row of memory on a GPU, by itself or in the strategy that has it, in both checkpoints."""
    guide = (ROOT / "docs" / "VRAM_OPTIMIZATION.md").read_text(encoding="utf-8")
    by_method = guide.split("### By method")[1].split("### Where it goes")[0]
    rows = ["none", "conservative", "fp8", "bnb-8bit", "mixed", "awq", "aggressive"]
    for row in [*rows, *(f"{name}`, multilingual" for name in rows)]:
        (found,) = re.findall(rf"^\| `{row}{'' if '`' in row else '`'} \|(.*)\|$", by_method, flags=re.MULTILINE)
        assert len([float(cell.replace(",", "")) for cell in found.split("|")]) == 7, row
    assert {STRATEGIES[name].t3 for name in rows if name in STRATEGIES} == {"none", "int8", "bnb-4bit"}


def test_e_the_size_of_the_whole_model(full: Headers) -> None:
    """The guide says 1.86 GB in float32."""
    files = (full.t3, full.s3gen, full.voice_encoder)
    assert sum(file.stat().st_size for file in files) / 1e9 == pytest.approx(3.19, abs=0.005)
    on_card = (f"{weights(full, strategy).card / 1e9:.2f}" for strategy in ("none", "conservative", "aggressive"))
    assert "{} GB in 16 bits, {} in 8, and {} in 4".format(*on_card) in corrected("1.86 GB in float32")


def test_e_lstm_and_gru(demo: Checkpoint) -> None:
    """There is no GRU to quantise in any network."""
    names = [name for file in (demo.t3, demo.s3gen, demo.voice_encoder) for name in load_file(file)]
    assert any("lstm" in name for name in names)
    assert not any("gru" in name for name in names)
    assert "no GRU" in corrected("LSTM and GRU are quantised")


def test_e_an_example_of_env_for_docker(caplog: pytest.LogCaptureFixture) -> None:
    values = {key: value or "" for key, value in dotenv_values(ROOT / ".env.example.docker").items()}
    assert values
    load(environment=values, env_file=ROOT / "absent")
    assert caplog.text == ""
