"""What five other projects' guides promise their users works here by the same names: a test for each promise.

    a    "BNB Quantization for Chatterbox TTS"                       use_bnb_quantization
    b    "Ultra-Low VRAM Mode", chatterbox-vllm2                     flags, CHATTERBOX_*, use_quantization
    c    "Bitsandbytes Quantization Implementation Report"           strategies
    d    "BitsAndBytes Integration Guide", KaniTTS-vLLM              config.py, quantization="bitsandbytes"
    e    "INT8 Quantization", chatterbox-tts-api                     USE_INT8_QUANTIZATION, /config, /memory

Code is called as their guides write it. What only a GPU can do ends here where the GPU would begin: ``started`` shows
what would be loaded.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from dotenv import dotenv_values
from safetensors.torch import load_file
from torch import nn

import config
from chatterbox_vllm import checkpoint, cli, get_optimal_dtype, sources
from chatterbox_vllm.api import app
from chatterbox_vllm.checkpoint import Checkpoint, locate
from chatterbox_vllm.errors import ConfigurationError, EngineError, MissingDependency
from chatterbox_vllm.quantization import matrices
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import COMPONENTS, STRATEGIES, Policy
from chatterbox_vllm.quantization.spellings import Given, resolve
from chatterbox_vllm.settings import PRESETS, Settings
from chatterbox_vllm.sources import load
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.conversion import encoded, linear_layers, vllm_quantization
from chatterbox_vllm.t3.folder import infer_config
from chatterbox_vllm.types import SpeechOptions
from tests.fake_engine import FakeChatterbox, running, wav
from tests.memory_support import Headers, full_headers

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def policy(**spellings: Any) -> Policy:
    return resolve({name: Given(value, name) for name, value in spellings.items()})


@dataclass
class Started:
    """What an engine was about to load, each time it tried."""

    attempts: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.attempts[-1]

    def by(self, build: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """What ``build`` would load; it gets as far as T3."""
        with pytest.raises(EngineError, match="no T3 in this test"):
            build(*arguments, **options)
        return self.last


@pytest.fixture
def started(demo: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Started:
    """The hub holds the demo checkpoint; both stages are written down instead of being loaded."""
    from chatterbox_vllm import engine, loading

    seen = Started([])

    def blueprint(path: Path, **options: Any) -> Any:
        seen.attempts.append(options)
        return real(path, **options)

    def launch(weights: Path, **options: Any) -> Any:
        seen.last.update(options)
        raise EngineError("there is no T3 in this test")

    real = loading.Blueprint
    monkeypatch.setattr(checkpoint, "download", lambda *_, **__: demo)
    monkeypatch.setattr(engine, "_warm_up", lambda *_: None)
    monkeypatch.setattr(loading, "Blueprint", blueprint)
    monkeypatch.setattr(loading, "launch", launch)
    return seen


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    """A full-size English checkpoint of headers."""
    return full_headers(tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def int8(demo: Checkpoint, cache: Path) -> Iterator[ChatterboxTTS]:
    """What a CPU can quantise, really loaded."""
    from chatterbox_vllm.tts import ChatterboxTTS

    with ChatterboxTTS.from_local(demo, use_int8_quantization=True, max_model_len=512, max_batch_size=4) as made:
        yield made


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Settings]:
    """What ``serve`` would run with; no .env and no variables of the developer's, and a GPU for the presets."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CHATTERBOX_{name.upper()}", raising=False)
    monkeypatch.setattr(sources, "_has_nvidia_gpu", lambda: True)
    seen: list[Settings] = []
    monkeypatch.setattr(app, "serve", seen.append)
    return seen


def corrected(claim: str) -> str:
    """What the guide to memory says to another guide's claim."""
    guide = (ROOT / "docs" / "VRAM_OPTIMIZATION.md").read_text(encoding="utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith(f"| {claim}")]
    return row.split("|")[2]


def at_64(method: str, host: str, column: int) -> float:
    """T3's tokens a second with 64 requests: the first row of a method after the first mention of a host."""
    speeds = BENCHMARKS.read_text(encoding="utf-8").partition("## Quantised")[2]
    row = re.search(rf"^\| `{method}` \|.*", speeds.partition(host)[2], flags=re.MULTILINE)
    assert row is not None
    return float(row[0].split("|")[column].replace(",", ""))


def weights(files: Headers, strategy: str) -> Any:
    from chatterbox_vllm.quantization_config import QuantizationMemoryEstimator

    return QuantizationMemoryEstimator(files).estimate(STRATEGIES[strategy])


def example(name: str) -> Any:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


# --- a: in-process bitsandbytes


def test_a_use_bnb_quantization_is_t3_in_8_bits() -> None:
    assert policy(use_bnb_quantization=True) == Policy(t3="bnb-8bit")
    assert not policy(use_bnb_quantization=False).is_quantized


def test_a_every_linear_layer_of_t3_and_nothing_else(demo: Checkpoint) -> None:
    """The Llama's linear layers become rows of 8 bits; every other tensor, biases among them, stays as it was."""
    tensors, sizes = load_file(demo.t3), infer_config(demo.t3)
    made = encoded(tensors.items(), Stored("bnb-8bit"), sizes)
    stems = {name.removesuffix(".weight_packed") for name in made if name.endswith(".weight_packed")}
    assert stems == linear_layers(sizes).keys()
    assert len(stems) == 7 * sizes.num_hidden_layers
    for stem in stems:
        assert made[f"{stem}.weight_packed"].nbytes == tensors[f"{stem}.weight"].numel()
    kept = tensors.keys() - {f"{stem}.weight" for stem in stems}
    assert all(torch.equal(made[name], tensors[name]) for name in kept)
    assert any(name.endswith("bias") for name in kept)


@without_gpu
@pytest.mark.parametrize(
    ("kind", "weights"), [("ChatterboxTTS", "demo"), ("ChatterboxMultilingualTTS", "multilingual_demo")]
)
def test_a_use_bnb_quantization_is_cuda_only(
    kind: str, weights: str, started: Started, request: pytest.FixtureRequest
) -> None:
    import chatterbox_vllm

    made, folder = getattr(chatterbox_vllm, kind), request.getfixturevalue(weights).folder
    with pytest.raises(ValueError, match="CUDA"):
        made.from_pretrained(device="cuda", use_bnb_quantization=True)
    for device in ("cpu", None):
        with pytest.raises(ValueError, match=r"NVIDIA GPU.*int8"):
            made.from_pretrained(device=device, use_bnb_quantization=True)
        with pytest.raises(ValueError, match=r"NVIDIA GPU.*int8"):
            made.from_local(folder, device, use_bnb_quantization=True)
    with pytest.raises(ValueError, match="mps"):
        made.from_local(folder, "mps", use_bnb_quantization=True)
    assert started.attempts == []


def test_a_without_bitsandbytes_the_command_is_named(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatterbox_vllm.t3 import methods

    monkeypatch.setattr(methods, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'vllm-bnb-plugin"):
        methods.method_arguments("bnb-4bit", infer_config(demo.t3), {})
    assert methods.method_arguments("bnb-8bit", infer_config(demo.t3), {}) == {}, "needs neither"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install 'bitsandbytes"):
        matrices.quantized(torch.ones(64, 64), "bnb-4bit")


def test_a_inference_only(demo: Checkpoint) -> None:
    from chatterbox_vllm.vocoder.weights import load, quantize

    networks = load(demo.s3gen)
    quantize(networks, {"flow_encoder": "bnb-8bit", "estimator": "bnb-8bit"})
    assert not any(parameter.requires_grad for parameter in networks.parameters())


def test_a_the_example_speaks_with_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for 8 bits, which need no package of bitsandbytes'; what keeps it from having them is its last word."""
    assert "pip install" not in (ROOT / "examples" / "example_tts_quantized.py").read_text(encoding="utf-8")
    from chatterbox_vllm.tts import ChatterboxTTS

    def from_local(name: str, **options: Any) -> Any:
        assert options == {"use_bnb_quantization": True}
        raise MissingDependency("bitsandbytes", purpose="for this", command="pip install it")

    monkeypatch.setattr(ChatterboxTTS, "from_local", from_local)
    with pytest.raises(SystemExit, match="install it with: pip install it"):
        example("example_tts_quantized")(["-o", str(tmp_path)])


def test_a_the_sizes_of_t3(full: Headers) -> None:
    """The guide says 2.4 GB and 1.2 GB."""
    from chatterbox_vllm.quantization_config import QuantizationMemoryEstimator

    assert full.t3.stat().st_size / 1e9 == pytest.approx(2.13, abs=0.005)
    estimate = QuantizationMemoryEstimator(full).estimate(policy(use_bnb_quantization=True))
    assert estimate["t3"].before == 2 * 30 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert estimate["t3"].after / estimate["t3"].before == pytest.approx(0.5, abs=0.002)
    told = corrected("T3 takes 2.4 GB")
    assert f"{weights(full, 'none').at('t3') / 1e9:.2f} GB in 16 bits" in told
    assert f"{estimate.at('t3') / 1e9:.2f} GB in `bnb-8bit`" in told


def test_a_how_much_slower_is_measured() -> None:
    """The guide says 2 to 5%. Of T3's tokens with 64 requests, those of one host."""
    kept = at_64("bnb-8bit", "On host H", 6) / at_64("none", "On host H", 6)
    assert f"`bnb-8bit` keeps {kept:.2f} of the tokens" in corrected("8 bits are 2 to 5% slower")


# --- b: ultra-low VRAM


@pytest.mark.parametrize("preset", ["ultra-low-vram", "low-vram", "medium-vram", "high-vram"])
def test_b_presets_by_flag(preset: str, served: list[Settings]) -> None:
    cli.main(["serve", f"--{preset}", "--multilingual", "--port", "4123", "--host", "0.0.0.0"])
    (settings,) = served
    assert (settings.port, settings.host, settings.checkpoint[0]) == (4123, "0.0.0.0", "multilingual")
    assert (
        settings.vram_budget
        == {"ultra": "2GiB", "low": "4GiB", "medium": "8GiB", "high": "16GiB"}[preset.partition("-")[0]]
    )
    assert settings.policy.is_quantized == (preset in {"ultra-low-vram", "low-vram"})


@pytest.mark.parametrize(("flag", "variant"), [("--english", "english"), ("--multilingual", "multilingual")])
def test_b_english_and_multilingual(flag: str, variant: str, served: list[Settings]) -> None:
    cli.main(["serve", flag])
    assert served[0].checkpoint == (variant, None)


def test_b_flags_of_the_start_script() -> None:
    """--help tells all of them, before anything is installed."""
    text = (ROOT / "start-api-server.sh").read_text(encoding="utf-8")
    usage = text.partition("<<'END'")[2].partition("\nEND")[0]
    flags = "--ultra-low-vram --low-vram --medium-vram --high-vram --english --multilingual --port --host --help"
    assert [flag for flag in flags.split() if flag not in usage] == []


def test_b_a_flag_beats_a_variable_and_a_variable_beats_a_preset(
    served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATTERBOX_MAX_MODEL_LEN", "900")
    monkeypatch.setenv("CHATTERBOX_MAX_BATCH_SIZE", "7")
    cli.main(["serve", "--ultra-low-vram", "--max-batch-size", "3"])
    assert (served[0].max_model_len, served[0].max_batch_size) == (900, 3)
    assert served[0].max_chunk_length == PRESETS["ultra-low-vram"]["max_chunk_length"]


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"MODEL": "multilingual"}, lambda settings: settings.checkpoint[0] == "multilingual"),
        ({"MAX_BATCH_SIZE": "1"}, lambda settings: settings.max_batch_size == 1),
        ({"MAX_MODEL_LEN": "400"}, lambda settings: settings.max_model_len == 400),
        ({"USE_QUANTIZATION": "true"}, lambda settings: settings.policy == Policy("bnb-4bit")),
        (
            {"USE_QUANTIZATION": "true", "QUANTIZATION_METHOD": "bnb-8bit"},
            lambda settings: settings.policy == Policy("bnb-8bit"),
        ),
        (
            {"USE_QUANTIZATION": "true", "QUANTIZE_S3GEN": "true"},
            lambda settings: settings.policy == Policy("bnb-4bit", "bnb-4bit", "bnb-4bit"),
        ),
        (
            {"USE_QUANTIZATION": "true", "QUANTIZE_VOICE_ENCODER": "true"},
            lambda settings: settings.policy == Policy("bnb-4bit", voice_encoder="bnb-4bit"),
        ),
        ({"DEBUG": "1"}, lambda settings: settings.effective_log_level == "debug"),
        ({"GPU_MEMORY_UTILIZATION": "0.3"}, lambda settings: settings.gpu_memory_utilization == 0.3),
        ({"HOST": "0.0.0.0"}, lambda settings: settings.host == "0.0.0.0"),
        ({"PORT": "4123"}, lambda settings: settings.port == 4123),
        ({"CFG_SCALE": "0.3"}, lambda settings: settings.options.cfg_weight == 0.3),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_b_variables(variables: dict[str, str], found: Any) -> None:
    settings = load(environment={f"CHATTERBOX_{name}": value for name, value in variables.items()}, env_file=None)
    assert found(settings)


def test_b_the_readme_says_that_there_is_no_api_server_py() -> None:
    assert not (ROOT / "api_server.py").exists()
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "the program is `server.py`, there is no `api_server.py`" in readme


def test_b_arguments_of_the_python_api(started: Started) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    found = started.by(
        ChatterboxTTS.from_pretrained,
        max_batch_size=1,
        max_model_len=400,
        use_quantization=False,
        quantization_method="bnb-4bit",
        quantize_s3gen=False,
        quantize_voice_encoder=False,
        compile=False,
        s3gen_use_fp16=True,
        block_size=32,
    )
    assert (found["max_num_seqs"], found["max_model_len"], found["block_size"]) == (1, 400, 32)
    assert (found["enforce_eager"], found["dtype"]) == (True, torch.float16)
    assert (found["method"], found["flow_encoder"], found["estimator"]) == ("none", "none", "none")
    assert started.by(ChatterboxTTS.from_pretrained_multilingual, compile=True)["enforce_eager"] is False


def test_b_speaking(model: ChatterboxTTS, tmp_path: Path) -> None:
    voice = tmp_path / "someone.wav"
    voice.write_bytes(wav(2.0))
    options = {"temperature": 0.8, "max_tokens": 12, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2}
    wavs = model.generate(
        ["One.", "Two."], audio_prompt_path=str(voice), language_id="en", exaggeration=0.5, diffusion_steps=3, **options
    )
    s3gen_ref, cond_emb = model.get_audio_conditionals(str(voice))
    cond_emb = model.update_exaggeration(cond_emb, exaggeration=0.8)
    wavs += model.generate_with_conds(["Three."], s3gen_ref=s3gen_ref, cond_emb=cond_emb, diffusion_steps=3, **options)
    assert [tuple(wav.shape) for wav in wavs] == [(1, 12 * 960)] * 3
    assert model.sr == 24_000
    assert model.get_supported_languages() == {"en": "English"}
    assert callable(model.shutdown)


def test_b_the_defaults_are_upstream_s() -> None:
    assert SpeechOptions() == SpeechOptions(
        exaggeration=0.5, cfg_weight=0.5, temperature=0.8, top_p=1.0, min_p=0.05, repetition_penalty=1.2
    )


def test_b_awq_weights_are_made_by_a_command(demo: Checkpoint, cache: Path, tmp_path: Path) -> None:
    from chatterbox_vllm.quantization.policy import effective_method

    with pytest.raises(ConfigurationError, match="chatterbox-vllm quantize"):
        effective_method(Stored.of(demo.t3), "awq")
    out = tmp_path / "awq"
    assert (
        cli.main(["quantize", str(demo.folder), str(out), "--method", "awq", "--tokens", "4", "--device", "cpu"]) == 0
    )
    made = locate(out)
    assert Stored.of(made.t3).method == "awq"
    assert made.t3.stat().st_size < demo.t3.stat().st_size


def test_b_the_extra_ultra_low_vram() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [name.partition(">")[0] for name in extras["ultra-low-vram"]] == ["bitsandbytes", "vllm-bnb-plugin"]


def test_b_log_lines(caplog: pytest.LogCaptureFixture) -> None:
    """With the bytes before and after."""
    from chatterbox_vllm.loading import log_applied

    told = {"method": "bnb-4bit", "bytes_before": 3 * 2**20, "bytes": 2**20}
    with caplog.at_level(logging.INFO):
        log_applied({**dict.fromkeys(COMPONENTS, told), "estimator": {**told, "method": "none"}})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(" to ")[0] for line in lines] == ["[QUANTIZATION] Applied bnb-4bit"] * 3
    for line, name in zip(lines, ("T3", "S3Gen", "Voice Encoder"), strict=True):
        assert name in line
        assert "3.0 MiB -> 1.0 MiB" in line


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_b_nf4_with_double_quantisation_and_16_bit_products() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    matrix = matrices.quantized(weight, "bnb-4bit")
    assert 8 * matrix.nbytes / weight.numel() == pytest.approx(4.127, abs=0.001)
    decoded = matrix.dequantize(torch.bfloat16)
    assert decoded.dtype == torch.bfloat16
    assert len(decoded[0, :64].unique()) <= 16
    assert float((decoded - weight).norm() / weight.norm()) < 0.1


def test_b_one_method_for_all_or_one_for_each() -> None:
    one = policy(
        use_quantization=True, quantization_method="bnb-8bit", quantize_s3gen=True, quantize_voice_encoder=True
    )
    assert one.methods == dict.fromkeys(COMPONENTS, "bnb-8bit")
    assert one.method == "bnb-8bit"
    each = policy(quantization="bnb-4bit", estimator_quantization="bnb-8bit")
    assert (each.t3, each.flow_encoder, each.estimator, each.method) == ("bnb-4bit", "none", "bnb-8bit", "mixed")


def test_b_ultra_low_vram_fits_a_card_of_2_gib(full: Headers) -> None:
    """By the arithmetic that decides before anything is loaded; docs/VRAM_OPTIMIZATION.md has what a card then says."""
    from chatterbox_vllm.budget import plan
    from chatterbox_vllm.costs import Demand

    preset = PRESETS["ultra-low-vram"]
    demand = Demand(full, max_batch_size=preset["max_batch_size"], max_model_len=preset["max_model_len"])
    assert plan(2**31, demand, STRATEGIES[preset["quantization_strategy"]]).total <= 2**31
    with pytest.raises(ConfigurationError, match=r"bytes .* too small"):
        plan(2**29, demand, STRATEGIES["aggressive"])


def test_b_the_sizes_of_the_components(full: Headers) -> None:
    """The guide says 1.5, 2.5 and 0.5 GB."""
    assert full.t3.stat().st_size / 2e9 == pytest.approx(1.06, abs=0.01)
    assert full.s3gen.stat().st_size / 1e9 == pytest.approx(1.06, abs=0.01)
    assert full.voice_encoder.stat().st_size / 1e9 == pytest.approx(0.006, abs=0.001)
    before, after = weights(full, "none"), weights(full, "aggressive")
    told = corrected("4 bits take T3 from 1.5 GB")
    assert f"T3 from {before.at('t3') / 1e9:.2f} GB to {after.at('t3') / 1e9:.2f}" in told
    assert f"the vocoder from {before.at('vocoder') / 1e9:.2f} to {after.at('vocoder') / 1e9:.2f}" in told


@pytest.mark.parametrize(("gib", "length"), [(4, 500), (6, 800), (8, 1000)])
def test_b_lengths_for_small_cards(full: Headers, gib: int, length: int) -> None:
    """The guide's; here each card holds more than one utterance of that length. 28 multiprocessors: an RTX 3060's."""
    from chatterbox_vllm.budget import plan
    from chatterbox_vllm.costs import Demand

    demand = Demand(full, max_batch_size=2, max_model_len=length, multiprocessors=28)
    assert plan(gib << 30, demand, STRATEGIES["none"]).total <= gib << 30
    assert "1,024" in corrected("400 to 500 positions for a card of 4 GB")


def test_b_how_much_slower_is_measured() -> None:
    hosts = ["On host J", "On host F", "another host, also"]
    kept = [at_64("awq", host, 5) / at_64("none", host, 5) for host in hosts]
    assert [f"{each:.2f}" for each in kept] == ["0.90", "0.95", "0.99"]
    speeds = BENCHMARKS.read_text(encoding="utf-8").partition("## Quantised")[2]
    gave = re.search(r"`none` gave (\S+) and (\S+) tokens/s, `awq` with that kernel (\S+) and ([\d,]+)", speeds)
    assert gave is not None
    none, also_none, awq, also_awq = (float(each.replace(",", "")) for each in gave.groups())
    kept += [awq / none, also_awq / also_none]
    ours = re.findall(r"^\| `(?:none|awq)` first \|.* (\S+) \|$", speeds, flags=re.MULTILINE)
    assert len(ours) == 2
    assert all(float(each) >= 0.95 for each in ours)
    said = corrected("4 bits are 10 to 20% slower")
    assert f"in `awq` {min(kept):.2f} to {max(kept):.2f} with vLLM's kernel" in said
    assert f"with ours {' and '.join(ours)}" in said
    assert "eval" in corrected("the sound is near-identical")


@pytest.mark.parametrize("name", ["example-tts", "example-tts-min-vram", "example-tts-ultra-low-vram"])
def test_b_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tests/test_examples.py runs them."""
    with pytest.raises(SystemExit) as ended:
        example(name)(["--help"])
    assert ended.value.code == 0
    assert "--output" in capsys.readouterr().out


# --- c: strategies


@without_gpu
@pytest.mark.parametrize("strategy", ["conservative", "mixed", "aggressive"])
def test_c_from_pretrained_quantized_on_a_cpu(
    strategy: str, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    """Off CUDA, a strategy is what a CPU can do, with a warning."""
    from chatterbox_vllm.tts import ChatterboxTTS

    with pytest.raises(EngineError):
        ChatterboxTTS.from_pretrained_quantized(device="cpu", quantization_strategy=strategy)
    assert [started.attempts[0][name] for name in ("method", "flow_encoder", "estimator")] == ["int8"] * 3
    is_changed = STRATEGIES[strategy].t3 != "int8"
    assert (f"the strategy {strategy} needs an NVIDIA GPU" in caplog.text) == is_changed


def test_c_strategies_are_what_the_report_says() -> None:
    found = {name: each.methods for name, each in STRATEGIES.items()}
    assert {found["conservative"][name] for name in ("t3", "flow_encoder", "estimator")} <= {"int8", "bnb-8bit"}
    assert (found["mixed"]["t3"], found["mixed"]["flow_encoder"]) == ("bnb-4bit", "bnb-8bit")
    assert set(found["aggressive"].values()) == {"bnb-4bit"}
    assert policy(quantization_strategy="auto").strategy == "auto"


def test_c_auto_goes_by_free_memory(full: Headers) -> None:
    from chatterbox_vllm.budget import choose_strategy
    from chatterbox_vllm.costs import Demand

    demand = Demand(full, max_batch_size=1, max_model_len=640)
    chosen = [str(choose_strategy(gib << 30, demand).strategy) for gib in (24, 2)]
    assert chosen[0] == "none"
    assert list(STRATEGIES).index(chosen[1]) > 0


def test_c_get_quantization_info(model: ChatterboxTTS) -> None:
    info = model.get_quantization_info()
    assert (info["quantized"], info["strategy"], info["method"]) == (False, None, "none")
    assert set(COMPONENTS) <= set(info["components"])
    for each in info["components"].values():
        assert each["method"] == "none"
        assert each["bytes"] == each["bytes_before"] > 0
        assert each["layers"] == 0
    assert json.loads(json.dumps(info)) == info


@without_gpu
def test_c_get_quantization_info_of_a_quantised_model(int8: ChatterboxTTS) -> None:
    info = int8.get_quantization_info()
    assert (info["quantized"], info["method"]) == (True, "int8")
    for name, part in info["components"].items():
        if name in ("t3", "flow_encoder", "estimator"):
            assert part["method"] == "int8"
            assert part["layers"] > 4
            assert 0 < part["bytes"] < part["bytes_before"]
        else:
            assert (part["method"], part["layers"]) == ("none", 0)
            assert part["bytes"] == part["bytes_before"] > 0


def test_c_names_of_the_configuration(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatterbox_vllm.quantization_config import (
        ChatterboxQuantizationConfig,
        QuantizationMemoryEstimator,
        QuantizationStrategy,
    )

    assert [str(each) for each in QuantizationStrategy] == ["none", "conservative", "mixed", "aggressive", "auto"]
    own = ChatterboxQuantizationConfig(t3="bnb-4bit", estimator="bnb-8bit")
    for strategy in QuantizationStrategy:
        named = ChatterboxQuantizationConfig(strategy=strategy)
        assert (named.strategy, named.methods) == (strategy, STRATEGIES.get(strategy, Policy()).methods)
    assert ChatterboxQuantizationConfig("mixed", t3="int8").t3 == "int8"
    assert ChatterboxQuantizationConfig(t3="bitsandbytes").t3 == "bnb-4bit"
    assert ChatterboxQuantizationConfig("mixed").on_cpu().weaker() == STRATEGIES["conservative"]
    with pytest.raises(ConfigurationError, match="auto decides about every component"):
        ChatterboxQuantizationConfig("auto", t3="int8")
    compared = QuantizationMemoryEstimator(demo).compare_strategies()
    assert QuantizationMemoryEstimator(str(demo.folder)).compare_strategies() == compared
    assert QuantizationMemoryEstimator(demo.folder, itemsize=4).compare_strategies() != compared
    monkeypatch.setattr("chatterbox_vllm.quantization_config.resolve", lambda name: {"english": demo}[name])
    assert QuantizationMemoryEstimator.compare_strategies() == compared
    assert list(compared) == ["none", "conservative", "mixed", "aggressive"]
    cards = [each.card for each in compared.values()]
    assert cards == sorted(cards, reverse=True)
    assert len(set(cards)) == 4
    assert cards[0] > QuantizationMemoryEstimator(demo).estimate(own).card > cards[-1]


def test_c_what_stays_as_it_is(demo: Checkpoint) -> None:
    """HiFT, embeddings and heads, in the estimate and in the networks."""
    from chatterbox_vllm.quantization_config import QuantizationMemoryEstimator
    from chatterbox_vllm.vocoder.weights import load, quantize

    estimate = QuantizationMemoryEstimator(demo).estimate(STRATEGIES["aggressive"])
    for kept in ("t3_embeddings", "hift", "vocoder_other"):
        assert estimate[kept].before == estimate[kept].after > 0
    networks, whole = load(demo.s3gen), load(demo.s3gen)
    quantize(networks, {"flow_encoder": "bnb-8bit", "estimator": "bnb-8bit"})
    sound, before = networks.mel2wav.state_dict(), whole.mel2wav.state_dict()
    assert all(torch.equal(sound[name], before[name]) for name in before)
    assert torch.equal(networks.flow.input_embedding.weight, whole.flow.input_embedding.weight)
    assert not any(isinstance(module, nn.Linear) for module in networks.flow.encoder.encoders.modules())


@without_gpu
def test_c_a_strategy_that_fails_gives_way_to_the_next(started: Started, caplog: pytest.LogCaptureFixture) -> None:
    """T3 does not come up here whatever is tried: each attempt is a whole one, and the last one is not quantised."""
    from chatterbox_vllm.tts import ChatterboxTTS

    started.by(ChatterboxTTS.from_pretrained_quantized, device="cpu", quantization_strategy="aggressive")
    methods = [(each["method"], each["flow_encoder"], each["estimator"]) for each in started.attempts]
    assert methods == [("int8",) * 3] * 3 + [("none",) * 3]
    for weaker in ("mixed", "conservative", "none"):
        assert f"loading with {weaker}" in caplog.text


@without_gpu
def test_c_strictly_a_failure_is_an_error(started: Started) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    strict = {"device": "cpu", "strict_quantization": True}
    started.by(ChatterboxTTS.from_pretrained_quantized, quantization_strategy="conservative", **strict)
    assert len(started.attempts) == 1
    with pytest.raises(ConfigurationError, match="needs an NVIDIA GPU"):
        ChatterboxTTS.from_pretrained_quantized(quantization_strategy="aggressive", **strict)
    assert len(started.attempts) == 1


def test_c_profiles(tmp_path: Path, started: Started) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    profile = tmp_path / "mine.toml"
    profile.write_text('t3 = "int8"\nestimator = "int8"\n', encoding="utf-8")
    found = started.by(ChatterboxTTS.from_pretrained, quantization_profile=str(profile))
    assert (found["method"], found["flow_encoder"], found["estimator"]) == ("int8", "none", "int8")


def test_c_quality_is_measured(
    demo: Checkpoint, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("Hello.\n", encoding="utf-8")
    options = ["--texts", str(texts), "--max-tokens", "5", "--steps", "1", "--device", "cpu"]
    assert cli.main(["eval", "--model", str(demo.folder), "--method", "int8", "--against", "none", *options]) == 0
    printed = capsys.readouterr().out
    for figure in ("divergence", "first choice", "mel", "speaker", "weights are random"):
        assert figure in printed


def test_c_the_sizes_are_corrected(full: Headers) -> None:
    """The report says 4,076, 2,900 and 2,200 MB; ours are of the least that works, on the card that we measured."""
    from chatterbox_vllm.budget import plan
    from chatterbox_vllm.costs import Demand

    demand, told = Demand(full, max_batch_size=1, max_model_len=640), corrected("4,076 MB at most")
    for strategy in ("none", "conservative", "mixed"):
        with pytest.raises(ConfigurationError) as refused:
            plan(2**20, demand, STRATEGIES[strategy])
        least = re.search(r"together +([\d,.]+) MiB", str(refused.value))
        assert least is not None
        assert f"{round(float(least[1].replace(',', ''))):,}" in told


def test_c_estimates_are_within_5_percent(demo: Checkpoint) -> None:
    """Of the vocoder's networks, loaded and quantised; test_quantization_estimate.py has all the others."""
    from chatterbox_vllm.quantization_config import ChatterboxQuantizationConfig, QuantizationMemoryEstimator
    from chatterbox_vllm.vocoder.footprint import bytes_of
    from chatterbox_vllm.vocoder.weights import load as load_vocoder
    from chatterbox_vllm.vocoder.weights import quantize

    own = ChatterboxQuantizationConfig(flow_encoder="bnb-4bit", estimator="bnb-4bit")
    networks = load_vocoder(demo.s3gen)
    quantize(networks, {"flow_encoder": own.flow_encoder, "estimator": own.estimator})
    estimate = QuantizationMemoryEstimator(demo, vocoder_itemsize=4).estimate(own)
    time = estimate["estimator_time"].after if estimate["estimator_time"].place == "host" else 0
    assert estimate.at("vocoder") + time == pytest.approx(bytes_of({"all": networks})["all"], rel=0.05)


def test_c_how_fast_is_measured() -> None:
    guide = (ROOT / "docs" / "VRAM_OPTIMIZATION.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `bnb-4bit` \| `--ultra-low-vram`.*", guide, flags=re.MULTILINE)
    told = corrected("an RTF of 1.015 is faster than real time")
    assert "slower" in told
    assert f"{1 / float(row.split('|')[8]):.2f} in `--ultra-low-vram`" in told


def test_c_the_lstm_is_not_worth_it(full: Headers) -> None:
    """All that could be saved of the voice encoder is its projection's fifth of a MiB; the LSTM has 5.4 MiB."""
    from chatterbox_vllm.quantization_config import QuantizationMemoryEstimator

    part = QuantizationMemoryEstimator(full).estimate(STRATEGIES["aggressive"])["voice_encoder"]
    assert part.layers == 1
    assert 0.1 * 2**20 < part.before - part.after < 0.25 * 2**20
    assert part.before < 5.5 * 2**20


# --- d: config.py


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


# --- e: int8


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


# --- all five at once


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"use_bnb_quantization": True}, {"quantization": "bitsandbytes"}),
        ({"use_bnb_quantization": True}, {"use_int8_quantization": True}),
        ({"use_quantization": True}, {"quantization_strategy": "conservative"}),
        ({"quantization": "int8"}, {"quantization_strategy": "mixed"}),
    ],
    ids=str,
)
def test_spellings_that_disagree_are_named(
    first: dict[str, Any], second: dict[str, Any], demo: Checkpoint, started: Started
) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    with pytest.raises(ValueError, match="disagree about t3; keep one") as refused:
        ChatterboxTTS.from_local(demo, **first, **second)
    assert all(name in str(refused.value) for name in (*first, *second))
    assert started.attempts == []
