"""How many tokens make a chunk of a stream.

Every chunk recomputes the flow over the recording and all tokens so far. Chunks that grow keep that work within a small
multiple of the whole file's, and the first sound early; a largest size bounds how far a stream can fall silent behind
a slow language model. The vocoder holds back ``encoder.LOOKAHEAD_TOKENS`` and ``hift.REACH`` frames, 13 tokens
together, so a first chunk of n tokens gives n - 13 tokens' sound, 40 ms each, of which the first 20 ms are silence and
the next 20 ms fade in. 20 tokens give a player 280 ms to start with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from chatterbox_vllm.errors import ConfigurationError


@dataclass(frozen=True)
class ChunkSchedule:
    """Sizes of the chunks of one stream.

    Args:
        first: tokens of the first chunk.
        growth: by what each chunk is longer than the one before.
        largest: no chunk is longer.

    Raises:
        ConfigurationError: a value is out of range; ``param`` names it.
    """

    first: int = 20
    growth: float = 2.0
    largest: int = 240

    def __post_init__(self) -> None:
        if self.first < 1:
            raise ConfigurationError(f"first must be at least 1 token, not {self.first}", param="first")
        if not 1.0 <= self.growth < math.inf:
            raise ConfigurationError(f"growth must be at least 1, not {self.growth}", param="growth")
        if self.largest < self.first:
            raise ConfigurationError(f"largest must be at least first, not {self.largest}", param="largest")

    def sizes(self) -> Iterator[int]:
        """Token counts of the chunks, without end."""
        size = float(self.first)
        while True:
            yield min(self.largest, int(size))
            size = min(float(self.largest), size * self.growth)
