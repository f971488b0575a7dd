"""For how many positions a step of T3 has a CUDA graph."""

from __future__ import annotations

from typing import Final

LARGEST_BATCH: Final = 512
"""vLLM's choice, up to which it makes graphs."""
LARGEST: Final = 2_048
"""A step with more keeps the card busy for longer than the host needs to launch it."""
USUAL_PROMPT: Final = 128
"""Positions of a prompt: a step need not hold more of them than there are requests."""
_FEWEST: Final = 256
"""Of the largest graph of a step that may read a prompt, however few requests there are."""
_SIZES: Final = (1, 2, 4, *range(8, 256, 8), *range(256, LARGEST_BATCH + 1, 16), 640, 768, 1_024, 1_536, LARGEST)


def graph_sizes(most: int) -> list[int]:
    """vLLM's own sizes and, above them, a few for prompts, as many as are not above ``most``.

    A step is padded to the next one.
    """
    return [size for size in _SIZES if size <= most]


def step_graph_sizes(requests: int, positions: int) -> list[int]:
    """For steps that read prompts, of an engine with room for so many requests, and positions in a step."""
    return graph_sizes(min(max(USUAL_PROMPT * requests, _FEWEST), positions))
