"""NVIDIA's Multi-Process Service, under which processes use a GPU at the same time instead of by turns.

T3 and the vocoder are processes of their own. By turns, each waits for the other's slice of time, of about two
milliseconds, even where both together would not fill the card.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from chatterbox_vllm.errors import ConfigurationError

logger = logging.getLogger(__name__)

CONTROL: Final = "nvidia-cuda-mps-control"
_SECONDS: Final = 20.0


class Mps:
    """A control daemon of our own, which ends with ``stop`` or with the program.

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
        self._program = program
        self._folder: Path | None = Path(tempfile.mkdtemp(prefix="chatterbox-mps-"))
        for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
            os.environ[name] = str(self._folder)
        if trouble := self._run("-d"):
            self._remove()
            raise ConfigurationError(f"mps could not be started: {trouble}; leave mps out, or mend that", param="mps")
        atexit.register(self.stop)

    def stop(self) -> None:
        """Ends the daemon, once the processes that use it are gone. May be called again."""
        if self._folder is not None:
            if trouble := self._run(text="quit\n"):
                logger.warning("mps could not be ended: %s", trouble)
            self._remove()

    def _run(self, *arguments: str, text: str = "") -> str | None:
        """Hands ``text`` to the program; returns what went wrong, if anything did."""
        # It would number the cards that the variable leaves anew, and who uses them would choose by it once more.
        environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        try:
            reply = subprocess.run(
                [self._program, *arguments],
                input=text,
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            return f"{CONTROL} did not answer within {_SECONDS:g} s"
        if reply.returncode == 0:
            return None
        return f"{CONTROL} says: {(reply.stderr or reply.stdout).strip() or f'exit status {reply.returncode}'}"

    def _remove(self) -> None:
        assert self._folder is not None
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
