"""The command line: its flags, its errors, and that asking for help costs nothing."""

from __future__ import annotations

import asyncio
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from chatterbox_vllm import cli
from chatterbox_vllm.api import app
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.settings import PRESETS, Settings, flag
from tests.fake_engine import PIECE, FakeChatterbox, wav


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No .env and no variables of the developer's."""
    monkeypatch.chdir(tmp_path)
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CHATTERBOX_{name.upper()}", raising=False)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    seen: list[Settings] = []
    monkeypatch.setattr(app, "serve", seen.append)
    return seen


def test_help_needs_no_heavy_module() -> None:
    script = """
import sys
from chatterbox_vllm import cli
try:
    cli.main(["serve", "--help"])
except SystemExit as stop:
    assert stop.code == 0
heavy = {"torch", "vllm", "fastapi", "av", "librosa"} & set(sys.modules)
assert not heavy, heavy
"""
    reply = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert reply.returncode == 0, reply.stderr
    assert "CHATTERBOX_MAX_BATCH_SIZE" in reply.stdout


@pytest.mark.parametrize("command", ["serve", "say", "demo-checkpoint", "bench", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_every_setting_but_the_key_has_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert [name for name in Settings.model_fields if not re.search(rf"{flag(name)}[ ,]", shown)] == ["api_key"]
    assert all(f"--{preset} " in shown for preset in PRESETS)


def test_flags_become_settings(served: list[Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATTERBOX_PORT", "1")
    monkeypatch.setenv("CHATTERBOX_MAX_BATCH_SIZE", "5")
    assert cli.main(["serve", "--multilingual", "--low-vram", "--port", "4123", "--no-watermark"]) == 0
    (settings,) = served
    assert (settings.port, settings.max_batch_size, settings.watermark) == (4123, 5, False)
    assert settings.max_model_len == PRESETS["low-vram"]["max_model_len"]
    assert settings.checkpoint == ("multilingual", None)


def test_the_server_brings_its_own_settings(served: list[Settings]) -> None:
    def settings(flags: Mapping[str, Any]) -> Settings:
        return Settings(port=int(flags["port"]) + 1)

    assert cli.main(["serve", "--port", "1"], settings=settings) == 0
    assert served[0].port == 2


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["serve", "--port", "99999"], "chatterbox-vllm: --port=99999: must be an integer from 0 to 65535\n"),
        (["serve", "--quantization-method", "awq"], "chatterbox-vllm: --quantization-method=awq has no effect"),
        (["say", "  ", "-o", "x.wav"], "chatterbox-vllm: text is empty"),
        (["say", "Hi.", "-o", "x.midi"], "chatterbox-vllm: response_format must be one of"),
        (["say", "Hi.", "-o", "x.wav", "--seed", "-1"], "chatterbox-vllm: seed must be an integer from 0"),
        (["say", "Hi.", "-o", "x.wav", "--speed", "9"], "chatterbox-vllm: speed must be a number from 0.25 to 4"),
        (["say", "Hi.", "-o", "nowhere/x.wav"], "chatterbox-vllm: cannot write nowhere/x.wav: no such folder"),
    ],
)
def test_mistakes_are_one_sentence(argv: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(told)
    assert shown.count("\n") == 1


@pytest.mark.parametrize("argv", [["serve", "--low-vram", "--high-vram"], ["serve", "--prot", "1"], [], ["sing"]])
def test_unknown_flags_and_commands_show_the_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--quantization", "nf5"], "--quantization=nf5: nobody has counted what it saves; there are none, bnb-4bit,"),
        (["--max-model-len", "3087"], "--max-model-len: must be from 128 to 3086"),
        (["--max-model-len", "127"], "--max-model-len: must be from 128 to 3086"),
    ],
)
def test_memory_is_computed_only_for_what_can_be_served(argv: list[str], told: str, demo: Checkpoint) -> None:
    command = [sys.executable, "-m", "chatterbox_vllm.cli", "memory", "--model", str(demo.folder), *argv]
    reply = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (reply.returncode, reply.stdout) == (2, "")
    assert told in reply.stderr


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_a_reader_that_has_enough_hears_no_complaint(how: list[str], demo: Checkpoint) -> None:
    """As ``head``: before the end, or at the end, when the rest of what was printed is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "chatterbox_vllm.cli", "memory", "--model", str(demo.folder), *how]
    reply = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (reply.returncode, reply.stderr) == (1, "")


def test_other_errors_exit_with_1_and_debug_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_settings: Settings) -> None:
        raise CheckpointError("no such folder")

    monkeypatch.setattr(app, "serve", broken)
    assert cli.main(["serve"]) == 1
    with pytest.raises(CheckpointError):
        cli.main(["serve", "--debug"])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeChatterbox:
    made = FakeChatterbox()

    async def start(**_arguments: Any) -> FakeChatterbox:
        await asyncio.sleep(0)
        return made

    fake = SimpleNamespace(AsyncChatterbox=SimpleNamespace(start=start))
    monkeypatch.setitem(sys.modules, "chatterbox_vllm.engine", fake)
    monkeypatch.setattr(app, "_schedule", lambda _settings: None)
    return made


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_say_writes_a_file(engine: FakeChatterbox, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"out.{suffix}"
    assert cli.main(["say", "Hello.", "-o", str(target), "--seed", "3", "--temperature", "0.1"]) == 0
    samples, rate = soundfile.read(target)
    assert rate == 24_000
    assert 0.8 <= len(samples) / rate <= 0.95
    assert (engine.requests[0].options.seed, engine.requests[0].options.temperature) == (3, 0.1)
    assert engine.dead
    assert list(tmp_path.iterdir()) == [target]


def test_say_reads_standard_input_and_a_voice(
    engine: FakeChatterbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("From a pipe."))
    (tmp_path / "me.wav").write_bytes(wav(1.0))
    assert cli.main(["say", "-", "-o", "out.pcm", "--voice", "me.wav", "--speed", "2"]) == 0
    assert (engine.requests[0].text, engine.requests[0].voice) == ("From a pipe.", "24000 samples")
    assert 0.4 < len(np.fromfile("out.pcm", "<i2")) / (4 * PIECE) < 0.6


def test_an_unknown_voice_leaves_no_file(engine: FakeChatterbox, tmp_path: Path) -> None:
    assert cli.main(["say", "Hi.", "-o", "out.wav", "--voice", "nobody"]) == 2
    assert engine.dead
    assert list(tmp_path.iterdir()) == []


def test_a_sound_of_which_speed_leaves_nothing_is_no_file(
    engine: FakeChatterbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.sound = lambda _: [np.full(960, 0.1, np.float32)]  # type: ignore[method-assign]
    assert cli.main(["say", "Hi.", "-o", "out.wav", "--speed", "4"]) == 1
    assert "speed 4 leaves nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_demo_checkpoint_is_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []

    def write_demo(folder: Path, **arguments: Any) -> SimpleNamespace:
        calls.append((folder, arguments))
        return SimpleNamespace(folder=folder)

    monkeypatch.setattr("chatterbox_vllm.demo_checkpoint.write_demo", write_demo)
    assert cli.main(["demo-checkpoint", "there", "--variant", "multilingual", "--seed", "4"]) == 0
    assert calls == [(Path("there"), {"size": "tiny", "variant": "multilingual", "seed": 4})]
    assert "CHATTERBOX_MODEL=there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "module", "passed"),
    [
        (["doctor", "--json"], "chatterbox_vllm.doctor", ["--json"]),
        (["bench", "t3", "--requests", "1"], "chatterbox_vllm.bench.t3", ["--requests", "1"]),
    ],
)
def test_other_commands_are_passed_on(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], module: str, passed: list[str]
) -> None:
    seen: list[Any] = []
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(main=lambda rest: seen.append(rest) or 3))
    assert cli.main(argv) == 3
    assert seen == [passed]


@pytest.mark.parametrize("ignored", [signal.SIGTERM, signal.SIGHUP])
def test_only_quantize_handles_signals_and_none_that_is_ignored(
    monkeypatch: pytest.MonkeyPatch, ignored: signal.Signals
) -> None:
    numbers, seen = (signal.SIGTERM, signal.SIGHUP), []

    def run(_argv: list[str]) -> int:
        seen.append([number for number in numbers if callable(signal.getsignal(number))])
        return 0

    for module in ("convert", "doctor"):
        monkeypatch.setitem(sys.modules, f"chatterbox_vllm.{module}", SimpleNamespace(main=run))
    before = [signal.signal(each, signal.SIG_IGN if each == ignored else signal.SIG_DFL) for each in numbers]
    found = [signal.getsignal(each) for each in numbers]
    try:
        assert cli.main(["quantize"]) == cli.main(["doctor"]) == 0
        assert seen == [[each for each in numbers if each != ignored], []]
        assert [signal.getsignal(each) for each in numbers] == found
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
