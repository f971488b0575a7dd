"""The real program with its real processes, as a supervisor runs and ends it, and as they die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest

from chatterbox_vllm.checkpoint import Checkpoint
from tests.fake_engine import free_port, is_ready, wait_for

ROOT = Path(__file__).resolve().parent.parent
SPOKEN = {
    "model": "chatterbox",
    "input": " ".join(f"Sentence number {number} of a text that takes a while to speak." for number in range(8)),
    "voice": "default",
    "response_format": "pcm",
    "stream": True,
    "seed": 1,
}


class Server(NamedTuple):
    """The program, where it listens, and what it logs."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    @property
    def others(self) -> list[psutil.Process]:
        """All that it has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.process.poll() is not None or is_ready(self.url), seconds=120)
        assert self.process.poll() is None, self.log.read_text()


@contextmanager
def serving(demo: Checkpoint, cache: Path, folder: Path) -> Iterator[Server]:
    port = free_port()
    environment = {**os.environ, "CHATTERBOX_MODEL": str(demo.folder), "CHATTERBOX_CACHE_DIR": str(cache)}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [sys.executable, str(ROOT / "server.py"), "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=written, start_new_session=True)
        try:
            yield Server(process, f"http://127.0.0.1:{port}", log)
        finally:
            process.kill()
            process.wait()


def test_a_sigterm_for_all_processes_lets_a_request_be_finished(demo: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """As systemd sends it; it also reaches vLLM's processes, which are not ours."""
    with serving(demo, cache, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        whole = client.post("/v1/audio/speech", json=SPOKEN).content
        with client.stream("POST", "/v1/audio/speech", json=SPOKEN) as response:
            pieces = response.iter_raw()
            received = next(pieces)
            others = server.others
            assert len(others) >= 2, "vLLM has its own"
            os.killpg(server.process.pid, signal.SIGTERM)
            begun = time.monotonic()
            received += b"".join(pieces)
        assert received == whole
        assert len(whole) > 2 * 24_000
        assert server.process.wait(30) == 0
        assert time.monotonic() - begun < 30
        wait_for(lambda: not any(process.is_running() for process in others))
        assert "Traceback" not in server.log.read_text()
        assert "leaked" not in server.log.read_text()
        assert server.log.read_text().count("POST /v1/audio/speech") == 2
        assert '"GET /ready HTTP/1.1" 200' not in server.log.read_text()
        assert '"GET /ready HTTP/1.1" 503' in server.log.read_text()


def test_a_killed_engine_comes_back_and_dies_with_a_killed_server(
    demo: Checkpoint, cache: Path, tmp_path: Path
) -> None:
    with serving(demo, cache, tmp_path) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        server.wait_until_ready()
        (core,) = (process for process in server.others if "EngineCore" in process.name())
        with client.stream("POST", "/v1/audio/speech", json=SPOKEN) as response:
            pieces = response.iter_raw()
            next(pieces)
            core.kill()
            begun = time.monotonic()
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
        assert time.monotonic() - begun < 2
        assert not is_ready(server.url)
        server.wait_until_ready()
        assert client.post("/v1/audio/speech", json=SPOKEN).status_code == 200
        others = server.others
        server.process.kill()
        wait_for(lambda: not any(process.is_running() for process in others), seconds=15)


def test_a_sigterm_while_it_loads_ends_all_processes(demo: Checkpoint, cache: Path, tmp_path: Path) -> None:
    with serving(demo, cache, tmp_path) as server:
        wait_for(lambda: any("EngineCore" in process.name() for process in server.others), seconds=60)
        others = server.others
        server.process.terminate()
        assert server.process.wait(15) == 0, server.log.read_text()
        # One that vLLM starts at that moment notices when it has imported everything.
        wait_for(lambda: not any(process.is_running() for process in others), seconds=30)
