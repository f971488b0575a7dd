"""D: "BitsAndBytes Integration Guide", KaniTTS-vLLM: config.py, quantization="bitsandbytes"."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

import config
from chatterbox_vllm.api import app
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import STRATEGIES, Policy
from chatterbox_vllm.settings import Settings
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.conversion import vllm_quantization
from chatterbox_vllm.t3.folder import infer_config
from tests.fake_engine import FakeChatterbox
from tests.memory_support import Headers
from tests.promises.support import BENCHMARKS, ROOT, Started, corrected, policy, without_gpu

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS


def test_d_config_py_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As its guide has it: one switch, from which the other name follows."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CHATTERBOX_{name.upper()}", raising=False)
    assert {"USE_BNB_QUANTIZATION", "BNB_QUANTIZATION", "TEMPERATURE", "TOP_P"} <= set(vars(config))
    source = inspect.getsource(config)
    scope: dict[str, Any] = {"__file__": str(tmp_path / "config.py"), "__name__": "edited"}
    exec(source.replace("USE_BNB_QUANTIZATION = False", "USE_BNB_QUANTIZATION = True", 1), scope)
    assert scope["BNB_QUANTIZATION"] == "bitsandbytes"
    assert scope["settings"]().policy == Policy("bnb-4bit")
    assert not config.settings().policy.is_quantized


@without_gpu
def test_d_the_three_meanings_of_quantization(started: Started, demo: Checkpoint) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    with pytest.raises(ValueError, match=r"bnb-4bit.*NVIDIA GPU"):
        ChatterboxTTS.from_local(demo, quantization="bitsandbytes")
    assert started.by(ChatterboxTTS.from_local, demo, quantization=None)["method"] == "none"
    assert started.by(ChatterboxTTS.from_local, demo)["method"] == "none"
    assert policy(quantization="bitsandbytes") == Policy("bnb-4bit")


def test_d_server_py() -> None:
    done = subprocess.run([sys.executable, "server.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--quantization" in done.stdout


def test_d_the_log_says_that_bitsandbytes_is_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from chatterbox_vllm.engine import AsyncChatterbox

    async def start(**arguments: Any) -> FakeChatterbox:
        engine = FakeChatterbox()
        engine.policy = arguments["quantization"]
        return engine

    monkeypatch.setattr(AsyncChatterbox, "start", start)
    told = "Using bitsandbytes quantization to reduce VRAM consumption"
    with caplog.at_level(logging.INFO):
        asyncio.run(app._engine(Settings()))
        assert told not in caplog.text
        asyncio.run(app._engine(Settings(quantization="bnb-4bit")))
        assert told in caplog.text


@without_gpu
def test_d_memory_is_tunable(started: Started, demo: Checkpoint) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    assert Settings().gpu_memory_utilization == 0.5
    for share, length in ((0.3, 512), (0.9, 1024)):
        found = started.by(ChatterboxTTS.from_local, demo, gpu_memory_utilization=share, max_model_len=length)
        assert (found["gpu_memory_utilization"], found["max_model_len"]) == (share, length)


def test_d_the_defaults_come_from_a_budget(full: Headers) -> None:
    """More memory, more at once; the cache in bytes rather than a share of the card."""
    from chatterbox_vllm.budget import plan
    from chatterbox_vllm.costs import Demand

    small, large = (plan(gib << 30, Demand(full, max_model_len=1024), STRATEGIES["mixed"]) for gib in (4, 16))
    assert small.max_batch_size < large.max_batch_size
    assert small.t3_arguments["kv_cache_memory_bytes"] < large.t3_arguments["kv_cache_memory_bytes"]


def test_d_tensor_parallel(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a method allows it; where it does not, an error that says so and names one that does."""
    from chatterbox_vllm.t3 import methods

    monkeypatch.setattr(
        methods, "current_platform", SimpleNamespace(is_cpu=lambda: False, has_device_capability=lambda wanted: True)
    )
    monkeypatch.setattr(methods, "find_spec", lambda name: name)
    sizes, two = infer_config(demo.t3), {"tensor_parallel_size": 2}
    assert methods.method_arguments("bnb-4bit", sizes, two) == {"quantization": "bitsandbytes"}
    assert "fp8" in methods.method_arguments("fp8", sizes, two)["quantization"]
    methods.method_arguments("int8", sizes, two)
    methods.method_arguments("bnb-8bit", sizes, two)
    grouped = T3Config(quantization_config=vllm_quantization(Stored("awq", 128)))
    with pytest.raises(ConfigurationError, match=r"tensor_parallel_size=16.*groups"):
        methods.method_arguments("awq", grouped, {"tensor_parallel_size": 16})


def test_d_streaming_and_several_speakers(demo: Checkpoint) -> None:
    """A quantised vocoder speaks two voices in one batch, in chunks, and loses nothing."""
    from chatterbox_vllm.bench.workload import random_speech, random_voice
    from chatterbox_vllm.vocoder.blueprint import Blueprint
    from chatterbox_vllm.vocoder.utterance import Chunk

    blueprint = Blueprint(demo.s3gen, flow_encoder="int8", estimator="int8")
    vocoder = blueprint.build(blueprint.read())
    voices = [random_voice(seed, prompt_tokens=25) for seed in range(2)]
    utterances = [vocoder.open(voice, seed=1, diffusion_steps=2) for voice in voices]
    heard = [0, 0]
    for number in range(3):
        chunks = [Chunk(each, random_speech(number, 20), final=number == 2) for each in utterances]
        for index, samples in enumerate(vocoder.advance(chunks)):
            heard[index] += len(samples)
    assert heard == [960 * 60] * 2


@without_gpu
def test_d_streaming_with_a_quantised_model(int8: ChatterboxTTS) -> None:
    """T3 and vocoder together: what a seed says is said again, to two listeners at once, too."""
    options = {"seed": 3, "max_tokens": 60, "diffusion_steps": 2}
    whole = torch.cat(list(int8.generate_stream("A sentence for two.", **options)), dim=1)
    assert whole.shape[1] == 60 * 960
    streams = [int8.generate_stream("A sentence for two.", **options) for _ in range(2)]
    for pieces in zip(*streams, strict=True):
        assert torch.equal(*pieces)
    assert int8.generate(["One.", "Two."], seed=1, max_tokens=20, diffusion_steps=1)[1].shape == (1, 20 * 960)


def test_d_long_form(model: ChatterboxTTS) -> None:
    """A text longer than one utterance is split, and all of it is spoken."""
    text = " ".join(["This is one of many sentences."] * 15)
    assert model.generate(text, max_tokens=5, diffusion_steps=1, seed=1).shape == (1, 2 * 5 * 960)


def test_d_the_first_sound_is_measured() -> None:
    """The guide says less than 300 ms. Of one client of each host in the table of today."""
    serving = BENCHMARKS.read_text(encoding="utf-8").partition("## Serving")[2]
    table = serving.partition("| with MPS |")[2].partition("\n\n")[0]
    clients = re.findall(r"^\| 1 client.*", table, flags=re.MULTILINE)
    median, p95 = (
        [int(each) for row in clients for each in row.split("|")[column].replace("ms", "").split(",")]
        for column in (3, 4)
    )
    assert p95
    assert max(p95) < 300
    assert "71 to 80 ms" in corrected("the first sound after 300 ms")
    assert (min(median), max(median)) == (71, 80)


def test_d_a_configuration_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ``chatterbox-vllm doctor``."""
    from chatterbox_vllm.doctor import _deployment
    from chatterbox_vllm.doctor.finding import Level

    monkeypatch.setenv("CHATTERBOX_QUANTIZATION_STRATEGY", "brave")
    (finding,) = _deployment(None, on_cpu=True)
    assert finding.level is Level.ERROR
    assert "CHATTERBOX_QUANTIZATION_STRATEGY=brave is no strategy" in finding.detail
