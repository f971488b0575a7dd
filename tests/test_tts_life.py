"""The Python API from start to end: what it refuses to start with, how it ends, and how it is run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from chatterbox_vllm import tts
from chatterbox_vllm.audio.decode import decode
from chatterbox_vllm.checkpoint import FILES, Checkpoint, Variant
from chatterbox_vllm.errors import CheckpointError, ConfigurationError, EngineDead, InvalidRequest
from chatterbox_vllm.t3 import launch, methods
from chatterbox_vllm.tts import ChatterboxMultilingualTTS, ChatterboxTTS
from tests.fake_engine import FakeChatterbox, wait_for


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread for thread in threading.enumerate() if thread not in before and thread.name == "chatterbox"] == []


# --- what is given to the engine ---


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ({"max_batch_size": 0}, "must be an integer from 1 to 4096, not 0"),
        ({"max_batch_size": "many"}, "must be an integer from 1 to 4096, not 'many'"),
        ({"max_batch_size": True}, "must be an integer from 1 to 4096, not True"),
        ({"max_model_len": 53}, r"must be an integer from 54 to \d+, not 53"),
        ({"max_model_len": "640"}, r"must be an integer from 54 to \d+, not '640'"),
        ({"max_model_len": 640.0, "vram_budget": "2GiB"}, r"must be an integer from 54 to \d+, not 640.0"),
        ({"max_model_len": 10**6}, r"must be an integer from 54 to \d+, not 1000000"),
        ({"gpu_memory_utilization": 1.01}, r"must be a number from 0\.01 to 1\.0, not 1\.01"),
        ({"gpu_memory_utilization": float("nan")}, r"must be a number from 0\.01 to 1\.0, not nan"),
        ({"max_chunk_length": 19}, r"must be an integer from 20 to \d+, not 19"),
        ({"device": "tpu"}, "must be cpu.*, not 'tpu'"),
        ({"device": 0}, "must be cpu.*, not 0"),
        ({"vocoder_device": "cuda:99"}, "must be cpu.*, not 'cuda:99'"),
        ({"watermark": "no"}, "must be True or False, not 'no'"),
        ({"strict_quantization": "no"}, "must be True or False, not 'no'"),
        ({"vocoder_process": "false"}, "must be True or False, not 'false'"),
        ({"compile": "no"}, "must be True or False, not 'no'"),
        ({"compile": True, "enforce_eager": True}, "and enforce_eager say the same; give one"),
        ({"s3gen_use_fp16": True, "vocoder_dtype": "float32"}, "and vocoder_dtype say the same; give one"),
        ({"estimator_quantization": "bogus"}, ": estimator cannot be bogus; it can be bnb-4bit"),
        ({"quantization": "gptq"}, "=gptq needs a checkpoint made for it; .* choose none, bnb-4bit"),
        ({"voices_dir": Path("nowhere")}, "'nowhere' is not a folder"),
        ({"enable_prefix_caching": True}, "is fixed by the way T3 runs in vLLM"),
        ({"max_num_seqs": 4}, "is called max_batch_size here"),
        ({"max_batch_sise": 4}, "is neither ours nor an argument of vllm.AsyncEngineArgs"),
        # vLLM's own
        ({"dtype": "float63"}, "'float32', not 'float63'"),
        ({"quantization": "nonsense"}, "=nonsense is no method; choose none, bnb-4bit, .*awq"),
        ({"tensor_parallel_size": 0}, "greater than or equal to 1, not 0"),
        ({"block_size": "big"}, "valid integer.*not 'big'"),
        ({"max_num_batched_tokens": 64}, r"\(64\) is smaller than max_model_len"),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_a_bad_engine_argument_is_named_with_its_range(
    demo: Checkpoint, cache: Path, argument: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before any process is started."""
    monkeypatch.setattr(launch.AsyncLLM, "__init__", lambda *_, **__: pytest.fail("an engine was started"))
    name = next(iter(argument))
    with pytest.raises(ConfigurationError, match=f"^{name}.*{said}") as refusal:
        ChatterboxTTS.from_local(demo, **argument)
    assert refusal.value.param == name


def test_four_bit_weights_need_a_gpu(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.current_platform, "is_cpu", lambda: True)
    with pytest.raises(ConfigurationError, match="needs an NVIDIA GPU"):
        launch.engine_arguments(launch.infer_config(demo.t3), {}, "bnb-4bit")


def test_four_bit_weights_need_a_plugin(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'vllm-bnb-plugin"):
        launch.engine_arguments(launch.infer_config(demo.t3), {}, "bnb-4bit")


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        ChatterboxTTS.from_local(tmp_path)
    with pytest.raises(CheckpointError, match="no model '/nowhere'"):
        ChatterboxTTS.from_local("/nowhere")


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """What engines would have been started with."""
    asked: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(ChatterboxTTS, "__init__", lambda self, model, **engine: asked.append((model, engine)))
    return asked


def test_which_model_is_loaded(asked_for: list[tuple[Any, dict[str, Any]]], tmp_path: Path) -> None:
    ChatterboxTTS.from_pretrained("cpu", max_batch_size=3)
    ChatterboxTTS.from_pretrained_multilingual()
    ChatterboxMultilingualTTS.from_pretrained()
    ChatterboxTTS.from_local(tmp_path)
    ChatterboxMultilingualTTS.from_local(tmp_path, variant=Variant.MULTILINGUAL_V3)
    assert asked_for == [
        ("english", {"device": "cpu", "max_batch_size": 3}),
        ("multilingual", {"device": None}),
        ("multilingual", {"device": None}),
        (tmp_path, {"device": None}),
        (tmp_path, {"device": None, "variant": Variant.MULTILINGUAL_V3}),
    ]


def test_which_multilingual_model_of_a_folder_is_loaded(
    asked_for: list[tuple[Any, dict[str, Any]]], tmp_path: Path
) -> None:
    """Never the English one that lies beside it."""
    (tmp_path / FILES[Variant.ENGLISH].t3).touch()
    for variant in (Variant.MULTILINGUAL_V3, Variant.MULTILINGUAL):
        ChatterboxMultilingualTTS.from_local(tmp_path)
        (tmp_path / FILES[variant].t3).touch()
        ChatterboxMultilingualTTS.from_local(tmp_path)
    chosen = [engine["variant"] for _, engine in asked_for]
    v2, v3 = Variant.MULTILINGUAL, Variant.MULTILINGUAL_V3
    assert chosen == [v2, v3, v3, v2]


# --- how it ends ---


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Callable[..., ChatterboxTTS]:
    """Makes models that speak without an engine."""

    def made(**options: Any) -> ChatterboxTTS:
        class Started(FakeChatterbox):
            @classmethod
            async def start(cls, model: object) -> FakeChatterbox:
                return cls(**options)

            async def speech_tokens(self, request: object) -> list[int]:
                raise AssertionError

        monkeypatch.setattr(tts, "AsyncChatterbox", Started)
        return ChatterboxTTS("demo")

    return made


def test_synthesize_draws_a_seed_where_none_is_given(quick: Callable[..., ChatterboxTTS]) -> None:
    """As ``generate`` does."""
    seeds: list[int] = []

    async def synthesize(tokens: torch.Tensor, voice: object, *, seed: int, diffusion_steps: int) -> np.ndarray:
        seeds.append(seed)
        return np.zeros(960 * len(tokens), np.float32)

    with quick() as model:
        model._engine.synthesize = synthesize
        for options in ({"seed": None}, {"seed": None}, {"seed": 7}, {}):
            model.synthesize(torch.tensor([1, 2]), **options)
    assert len(set(seeds[:2])) == 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds[2:] == [7, 0]


def test_a_recording_is_called_as_the_method_calls_it(quick: Callable[..., ChatterboxTTS]) -> None:
    with quick() as model:
        model._engine.voices = SimpleNamespace(from_audio=lambda source, *, param: decode(source, param=param))
        for method in (model.prepare_conditionals, model.get_audio_conditionals):
            for unusable in ("nofile.wav", 7):
                with pytest.raises(InvalidRequest, match="wav_fpath") as caught:
                    method(unusable)
                assert caught.value.param == "wav_fpath"


def test_a_second_shutdown_does_nothing(quick: Callable[..., ChatterboxTTS]) -> None:
    with quick() as model:
        assert model.generate("Hello.").shape == (1, 4 * 4800)
        model.shutdown()
        model.shutdown()
    for speak in (model.generate, model.speech_tokens, lambda text: next(model.generate_stream(text))):
        with pytest.raises(EngineDead, match="was shut down"):
            speak("Hello.")


def test_an_error_ends_it_too(quick: Callable[..., ChatterboxTTS]) -> None:
    with pytest.raises(KeyError), quick():
        raise KeyError


def test_who_waits_is_told(quick: Callable[..., ChatterboxTTS]) -> None:
    model, told = quick(delay=30.0), list[BaseException]()

    def speak(how: Callable[[], object]) -> None:
        try:
            how()
        except EngineDead as error:
            told.append(error)

    ways = [lambda: model.generate("Hello."), lambda: list(model.generate_stream("Hello."))]
    threads = [threading.Thread(target=speak, args=(how,)) for how in ways]
    for thread in threads:
        thread.start()
    wait_for(lambda: model._engine.active == 2)
    model.shutdown()
    for thread in threads:
        thread.join(5)
    assert len(told) == 2
    assert model._engine.active == 0


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_stream_left_half_way_is_closed(quick: Callable[..., ChatterboxTTS]) -> None:
    with quick() as model:
        stream = model.generate_stream("Hello.")
        assert next(stream).shape == (1, 4800)
        assert model._engine.active == 1
    assert model._engine.active == 0
    stream.close()


def test_an_interrupt_reaches_the_engine(quick: Callable[..., ChatterboxTTS], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a text is spoken."""
    with quick(delay=30.0) as model:
        monkeypatch.setattr(Future, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.generate("Hello.")
        monkeypatch.undo()
        wait_for(lambda: model._engine.aborted == 1)


def interrupted(self: object, timeout: float | None = None) -> None:
    time.sleep(0.2)
    raise KeyboardInterrupt


# --- how it is run ---

SCRIPT = """
from chatterbox_vllm import ChatterboxTTS

model = ChatterboxTTS.from_local("demo", max_model_len=512, max_batch_size=4)
print(tuple(model.generate("Hello there.", max_tokens=10, seed=1).shape))
left_half_way = model.generate_stream("Hello there. " * 30)
print(next(left_half_way).shape[1] > 0)
"""
NOISES = ("Traceback", "Error", "ERROR", "Warning:", "Exception", "leaked", "Triton", "NUMA", "rate=25")


def run(*command: object, cache: Path, folder: Path) -> tuple[str, str]:
    """Standard output and error of a program, started as a user starts it."""
    users = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    users["CHATTERBOX_CACHE_DIR"] = str(cache)
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=240, env=users, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [noise for noise in NOISES if noise in done.stdout + done.stderr] == [], done.stderr
    return done.stdout, done.stderr


def test_a_plain_script_runs_once_and_ends_quietly(cache: Path, tmp_path: Path) -> None:
    """It has no ``if __name__ == "__main__"``, which processes of its own would need, and no shutdown()."""
    script = tmp_path / "speak.py"
    script.write_text(SCRIPT)
    out, err = run(sys.executable, script, cache=cache, folder=tmp_path)
    assert out.splitlines() == ["(1, 9600)", "True"]
    assert [line for line in err.splitlines() if "it speaks noise" not in line] == []
    assert [path.name for path in tmp_path.iterdir()] == ["speak.py"], "nothing is written where it runs"


def test_the_command_line_says_it(tmp_path: Path) -> None:
    """With a fresh cache, so that the demo checkpoint is made on the way."""
    say = [Path(sys.executable).with_name("chatterbox-vllm"), "say", "Hello."]
    options = ["--model", "demo", "-o", "out.wav", "--max-tokens", 20, "--seed", 1]
    out, err = run(*say, *options, cache=tmp_path / "cache", folder=tmp_path)
    assert out == "out.wav: 0.8 s of speech\n"
    assert all(" INFO chatterbox_vllm." in line or "it speaks noise" in line for line in err.splitlines())
    samples, rate = soundfile.read(tmp_path / "out.wav")
    assert (samples.shape, rate) == ((20 * 960,), 24_000)
    assert samples.std() > 0.003
