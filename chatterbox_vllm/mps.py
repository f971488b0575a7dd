"""NVIDIA's Multi-Process Service, under which processes use a GPU at the same time instead of by turns.

T3 and the vocoder are processes of their own. By turns, each waits for the other's slice of time, of about two
milliseconds, even where both together would not fill the card.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from chatterbox_vllm.errors import ConfigurationError

logger = logging.getLogger(__name__)

CONTROL: Final = "nvidia-cuda-mps-control"
_CARDS: Final = "CUDA_VISIBLE_DEVICES"
_SECONDS: Final = 20.0
_GUARD: Final = """cat > /dev/null
echo quit | "$0"
status=$?
rm -rf "$CUDA_MPS_PIPE_DIRECTORY"
exit $status"""
"""Ends the daemon when its standard input is closed: by us, or because this program is gone, however it ended."""


class Mps:
    """A control daemon of our own, which ends with ``stop`` or with the program, be that killed.

    From now on this process and those that it starts share the GPU this way, if they have not used CUDA before.

    Raises:
        ConfigurationError: it cannot be started; ``param`` is ``mps``.
    """

    def __init__(self) -> None:
        program = shutil.which(CONTROL)
        if program is None:
            raise ConfigurationError(
                f"mps needs {CONTROL}, part of NVIDIA's driver, which was not found; leave mps out, or install it",
                param="mps",
            )
        self._folder: Path | None = Path(tempfile.mkdtemp(prefix="chatterbox-mps-"))
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            os.environ[name] = str(self._folder)
        if trouble := _answer(self._run(program, "-d")):
            self._remove()
            raise ConfigurationError(f"mps could not be started: {trouble}; leave mps out, or mend that", param="mps")
        self._guard = self._run("sh", "-c", _GUARD, program)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the daemon, once the processes that use it are gone. May be called again."""
        if self._folder is not None:
            if trouble := _answer(self._guard):
                logger.warning("mps could not be ended: %s", trouble)
            self._remove()

    def _run(self, *command: str) -> subprocess.Popen[str]:
        environment = dict(os.environ)
        if all(card.strip().isdigit() for card in environment.get(_CARDS, "all").split(",")):
            # It would number the cards that are left anew, and who uses them would choose by these numbers once more.
            del environment[_CARDS]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for whoever uses the daemon first
        )

    def _remove(self) -> None:
        assert self._folder is not None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None


def _answer(process: subprocess.Popen[str]) -> str | None:
    """Closes its standard input and waits for its end; returns what went wrong, if anything did."""
    try:
        said, complaint = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return f"{CONTROL} did not answer within {_SECONDS:g} s"
    if process.returncode == 0:
        return None
    return f"{CONTROL} says: {(complaint or said).strip() or f'exit status {process.returncode}'}"
