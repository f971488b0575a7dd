"""Every example runs, against the demo checkpoint or a server."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import soundfile
import torch

from chatterbox_vllm.quantization.policy import COMPONENTS, Policy
from chatterbox_vllm.quantization.spellings import SPELLINGS, Given, resolve
from tests.fake_engine import FakeChatterbox, running, wav

if TYPE_CHECKING:
    from chatterbox_vllm.checkpoint import Checkpoint
    from chatterbox_vllm.tts import ChatterboxTTS

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: object, **environment: str) -> str:
    """What the example prints, started as a user starts it, with an engine of its own: that takes 15 s and more."""
    command = [sys.executable, EXAMPLES / f"{name}.py", *map(str, arguments)]
    users = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=users | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def main_of(name: str) -> Callable[[list[str]], None]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def sound(source: Any) -> np.ndarray:
    samples, rate = soundfile.read(source, dtype="int16")
    assert rate == 24_000
    assert samples.ndim == 1
    return samples


def test_every_example_is_tested() -> None:
    tested = {"example-tts", "example-tts-min-vram", "example-voices-batch", "example-streaming-client"}
    tested |= {"example_tts_quantized", "example-tts-ultra-low-vram"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.fixture
def shared(model: ChatterboxTTS, monkeypatch: pytest.MonkeyPatch) -> ChatterboxTTS:
    """Examples that run in this process find the tests' engine, whichever model they ask for."""
    monkeypatch.setattr(type(model), "from_local", lambda name: nullcontext(model))
    return model


def test_one_text(shared: ChatterboxTTS, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, voice = tmp_path / "speech.wav", tmp_path / "someone.wav"
    voice.write_bytes(wav(2.0))
    options = ["--seed", "1", "--max-tokens", "12", "--voice", str(voice), "-o", str(file)]
    main_of("example-tts")(["Hello.", *options])
    said = shared.generate("Hello.", voice, seed=1, max_tokens=12)[0].numpy()
    np.testing.assert_allclose(sound(file), 32768 * said, atol=1)
    assert capsys.readouterr().out == f"{file}: 0.5 s\n"


def test_little_memory(cache: Path, tmp_path: Path) -> None:
    """With an engine of its own, because its settings are the example."""
    file = tmp_path / "speech.wav"
    printed = run("example-tts-min-vram", "--max-tokens", 12, "-o", file, CHATTERBOX_MODEL="demo")
    assert len(sound(file)) == 12 * 960
    assert printed == f"{file}: 0.5 s\n"


@pytest.fixture
def asked(model: ChatterboxTTS, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What examples ask of ``from_local``, whose engine is the tests'; it stands for the multilingual one, too."""
    from chatterbox_vllm.tts import ChatterboxMultilingualTTS, ChatterboxTTS

    options: list[dict[str, Any]] = []

    def generate(text: str, language_id: str | None = None, **more: Any) -> Any:
        return model.generate(text, **more)

    both = SimpleNamespace(generate=generate, sr=model.sr, get_quantization_info=lambda: {"quantized": True})

    def from_local(name: str, **more: Any) -> Any:
        options.append({"model": name, **more})
        return nullcontext(both)

    for kind in (ChatterboxTTS, ChatterboxMultilingualTTS):
        monkeypatch.setattr(kind, "from_local", from_local)
    return options


def policy(options: dict[str, Any]) -> Policy:
    """What an example's arguments ask of quantisation."""
    return resolve({name: Given(value, name) for name, value in options.items() if name in SPELLINGS})


def test_both_models_quantised(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    main = main_of("example_tts_quantized")
    options = ["--max-tokens", "12", "-o", str(tmp_path)]
    main([*options, "--model", "demo", "--multilingual-model", "demo-multilingual"])
    assert [each.pop("model") for each in asked] == ["demo", "demo-multilingual"]
    assert [policy(each) for each in asked] == [Policy(t3="bnb-8bit")] * 2
    assert all(len(sound(tmp_path / f"{name}.wav")) == 12 * 960 for name in ("english", "french"))
    main([*options, "--quantization", "int8"])
    assert policy(asked[-1]) == Policy(t3="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_both_models_quantised_without_a_gpu(demo: Checkpoint, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"(?s)NVIDIA GPU.*--quantization int8"):
        main_of("example_tts_quantized")(["--model", str(demo.folder), "-o", str(tmp_path)])


def test_very_little_memory(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, main = tmp_path / "speech.wav", main_of("example-tts-ultra-low-vram")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["Hello.", "--max-tokens", "12", "-o", str(file)])
    assert policy(asked[0]) == Policy("int8", "int8", "int8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 << 30, 8 << 30))
    main(["Hello.", "--max-tokens", "12", "--budget", "1.5GiB", "-o", str(file)])
    assert policy(asked[1]).methods == dict.fromkeys(COMPONENTS, "bnb-4bit")
    assert asked[1]["vram_budget"] == "1.5GiB"
    assert "2.00 GiB of the card's 8.00 are in use" in capsys.readouterr().out
    assert len(sound(file)) == 12 * 960


def test_a_batch_of_voices(shared: ChatterboxTTS, tmp_path: Path) -> None:
    anna, ben, takes = tmp_path / "anna.wav", tmp_path / "ben.wav", tmp_path / "takes"
    anna.write_bytes(wav(2.0))
    ben.write_bytes(wav(3.0))
    texts = ["--text", "One.", "--text", "Two."]
    main_of("example-voices-batch")([str(anna), str(ben), *texts, "--max-tokens", "8", "-o", str(takes)])
    files = sorted(path.name for path in takes.iterdir())
    assert files == ["01-anna.wav", "02-anna.wav", "03-ben.wav", "04-ben.wav"]
    assert all(0 < len(sound(takes / name)) <= 8 * 960 for name in files)


@pytest.fixture
def stream() -> Callable[[list[str]], None]:
    return main_of("example-streaming-client")


def whole(url: str) -> np.ndarray:
    """The server's answer as one file."""
    answer = httpx.post(f"{url}/v1/audio/speech", json={"input": "Hello.", "response_format": "wav"}, timeout=30)
    return sound(io.BytesIO(answer.content))


def test_streaming_to_a_file(
    tmp_path: Path, stream: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "speech.wav"
    with running(FakeChatterbox(pieces=5, delay=0.05)) as server:
        stream(["Hello.", "--url", server.url, "--max-tokens", "77", "-o", str(file)])
        assert server.engine.requests[0].options.max_tokens == 77
        assert np.array_equal(sound(file), whole(server.url))
    printed = capsys.readouterr().err
    first, total = (float(line.split()[-2]) for line in printed.splitlines())
    assert first < total


def test_streaming_to_a_player(stream: Callable[[list[str]], None], capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with running(FakeChatterbox()) as server:
        stream(["Hello.", "--url", server.url, "-o", "-"])
        assert capfdbinary.readouterr().out == whole(server.url).tobytes()


def test_streaming_shows_the_servers_error(tmp_path: Path, stream: Callable[[list[str]], None]) -> None:
    file = tmp_path / "speech.wav"
    with running(FakeChatterbox()) as server, pytest.raises(SystemExit, match="nobody"):
        stream(["Hello.", "--url", server.url, "--voice", "nobody", "-o", str(file)])
    assert not file.exists()
