"""For how many positions a step of T3 has a CUDA graph."""

from __future__ import annotations

from typing import Final

LARGEST: Final = 512
"""vLLM's choice, up to which it makes graphs."""


def graph_sizes(most: int) -> list[int]:
    """vLLM's own sizes, as many as are not above ``most``; a step is padded to the next one."""
    return [size for size in (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16)) if size <= most]
