"""What vLLM's worker does for us: vLLM mixes ``WorkerExtension`` into it, and ``T3Generator.call`` reaches it."""

from __future__ import annotations

import multiprocessing
import signal
from typing import Any, Final

from chatterbox_vllm.memory import torch_memory
from chatterbox_vllm.t3.footprint import weigh

EXTENSION: Final = f"{__name__}.WorkerExtension"
"""vLLM's ``worker_extension_cls``."""
_OWN_PROCESS: Final = "VllmWorker"
"""How vLLM names the process of a worker that is not the engine core itself."""


class WorkerExtension:
    """A worker's further methods."""

    get_model: Any

    def t3_footprint(self) -> dict[str, int]:
        """``T3Footprint`` of this rank, as a dictionary, which vLLM can send."""
        return {**weigh(self.get_model()), **torch_memory()._asdict()}

    def leave_signals(self) -> None:
        """Has a worker in a process of its own go on at a SIGTERM for all processes.

        The engine core finishes what it has then (``shutdown_timeout``), for which it needs its workers, and ends them
        itself.
        """
        if multiprocessing.current_process().name.startswith(_OWN_PROCESS):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
