"""NVIDIA's MPS, played by a script."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chatterbox_vllm import mps as module
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.mps import CONTROL, Mps


@pytest.fixture
def control(tmp_path: Path, monkeypatch):
    """Writes down how it is called; ``says`` makes it fail, and it takes ``seconds``."""
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.setenv(name, "before")
    program = tmp_path / CONTROL

    def make(says: str = "", seconds: float = 0) -> Path:
        log = tmp_path / "calls"
        failure = f"echo {says} >&2; exit 1" if says else f"exec sleep {seconds}"
        told = (
            f'echo "$1 $CUDA_MPS_PIPE_DIRECTORY $(cat)" >> {log}\necho "${{CUDA_VISIBLE_DEVICES-all}}" >> {log}.cards'
        )
        program.write_text(f"#!/bin/sh\n{told}\n{failure}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return log

    return make


def test_the_daemon_lives_between_start_and_stop(control):
    log = control()
    mps = Mps()
    folder = os.environ["CUDA_MPS_PIPE_DIRECTORY"]
    assert Path(folder).is_dir()
    mps.stop()
    mps.stop()
    assert log.read_text().splitlines() == [f"-d {folder} ", f" {folder} quit"]
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    ("chosen", "served"), [("1", "all"), ("0,2", "all"), ("0, 2", "all"), ("GPU-5,GPU-7", "GPU-5,GPU-7")]
)
def test_the_daemon_numbers_no_card_anew(control, monkeypatch, chosen, served):
    """Else the second card of two, chosen by its number, would be looked for among the one that is left."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    log = control()
    Mps().stop()
    assert log.with_name("calls.cards").read_text().split() == [served] * 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == chosen


def test_the_daemon_does_not_outlive_a_program_that_is_killed(control):
    log = control()
    program = "import sys, time; from chatterbox_vllm.mps import Mps; Mps(); print('up', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout.readline() == "up\n"
        killed.kill()
    until(lambda: len(log.read_text().splitlines()) == 2)
    started, ended = log.read_text().splitlines()
    folder = Path(started.split()[1])
    assert ended == f" {folder} quit"
    until(lambda: not folder.exists())


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_daemon_that_does_not_start_says_why(control):
    control(says="no permission")
    with pytest.raises(ConfigurationError, match="no permission") as caught:
        Mps()
    assert caught.value.param == "mps"


def test_a_daemon_that_does_not_answer_is_given_up(control, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    control(seconds=10)
    with pytest.raises(
        ConfigurationError, match=r"mps could not be started: .* did not answer within 0\.2 s"
    ) as caught:
        Mps()
    assert caught.value.param == "mps"
    assert not Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]).exists()


@pytest.mark.parametrize("fault", [{"seconds": 10}, {"says": "busy"}])
def test_a_daemon_that_does_not_end_keeps_nobody_from_ending(control, monkeypatch, caplog, fault):
    control()
    mps = Mps()
    monkeypatch.setattr(module, "_SECONDS", 0.2)
    control(**fault)
    mps.stop()
    assert "mps could not be ended" in caplog.text
    assert not Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"]).exists()


def test_no_driver_no_mps(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigurationError, match=CONTROL) as caught:
        Mps()
    assert caught.value.param == "mps"
