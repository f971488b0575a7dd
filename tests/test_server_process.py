"""The real program with its real processes, as a supervisor runs and ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil

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


def test_a_sigterm_for_all_processes_lets_a_request_be_finished(demo: Checkpoint, cache: Path, tmp_path: Path) -> None:
    """As systemd sends it; it also reaches vLLM's processes, which are not ours."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "CHATTERBOX_MODEL": str(demo.folder), "CHATTERBOX_CACHE_DIR": str(cache)}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [sys.executable, str(ROOT / "server.py"), "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log"
    with log.open("wb") as written, httpx.Client(base_url=url, timeout=60) as client:
        server = subprocess.Popen(command, env=environment, cwd=ROOT, stderr=written, start_new_session=True)
        try:
            wait_for(lambda: server.poll() is not None or is_ready(url), seconds=120)
            assert server.poll() is None, log.read_text()
            whole = client.post("/v1/audio/speech", json=SPOKEN).content
            with client.stream("POST", "/v1/audio/speech", json=SPOKEN) as response:
                pieces = response.iter_raw()
                received = next(pieces)
                processes = psutil.Process(server.pid).children(recursive=True)
                assert len(processes) >= 2, "vLLM has its own"
                os.killpg(server.pid, signal.SIGTERM)
                begun = time.monotonic()
                received += b"".join(pieces)
            assert received == whole
            assert len(whole) > 2 * 24_000
            assert server.wait(30) == 0
            assert time.monotonic() - begun < 30
            wait_for(lambda: not any(process.is_running() for process in processes))
        finally:
            server.kill()
            server.wait()
    assert "Traceback" not in log.read_text()
    assert "leaked" not in log.read_text()
