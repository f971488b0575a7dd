"""Has vLLM's engine core end when the program that started it is gone, however that came to be.

vLLM's workers end with their core. The core would wait for requests for ever, and keep the GPU's memory.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import wait
from threading import Thread
from typing import Final

CORE: Final = "EngineCore"
"""How the name of vLLM's process begins."""


def end_with_parent() -> None:
    """Watches over the parent, if this process is an engine core."""
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.current_process().name.startswith(CORE):
        Thread(target=_end_after, args=(parent.sentinel,), name="parent", daemon=True).start()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)  # nobody is left for whom to end in order
