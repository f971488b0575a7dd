"""What torch need not warn of, in each process that imports vLLM."""

from __future__ import annotations

import logging
from typing import Final

NEEDLESS: Final = ("torch._library.triton", "torch.utils.cpp_extension", "torch.utils.flop_counter")
"""Torch's modules that warn of a GPU's tools, because they are absent, or there without a GPU.

Where they are needed, more than a warning says so.
"""


def quieten() -> None:
    """Hides their warnings in this process."""
    for name in NEEDLESS:
        logging.getLogger(name).setLevel(logging.ERROR)
