"""What vLLM's worker does for us beside T3: let the vocoder into its process.

vLLM mixes ``Tenancy`` into its worker (``worker_extension_cls``); ``T3Generator.call`` reaches its methods.
"""

from __future__ import annotations

from typing import Any, Final

from chatterbox_vllm.t3.worker import WorkerExtension
from chatterbox_vllm.vocoder import guest

EXTENSION: Final = f"{__name__}.Tenancy"


class Tenancy(WorkerExtension):
    """A worker's further methods."""

    rank: Any

    def admit_vocoder(self, path: str) -> None:
        """Has the first rank's process connect to the Unix socket ``path`` and speak for whoever is there."""
        if self.rank == 0:
            guest.serve(path)
