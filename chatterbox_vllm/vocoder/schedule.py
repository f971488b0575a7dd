"""How many tokens make a chunk of a stream, and when its sound is due.

Every chunk recomputes the flow over the recording and all tokens so far. Chunks that grow keep that work within a small
multiple of the whole file's, and the first sound early; a largest size bounds how far a stream can fall silent behind a
slow language model. The vocoder holds back ``encoder.LOOKAHEAD_TOKENS`` and ``hift.REACH`` frames, 13 tokens together,
so a first chunk of n tokens gives n - 13 tokens' sound, 40 ms each, of which the first 20 ms are silence and the next
20 ms fade in. T3 tells the first token at once and then five at a time: a chunk of 5 k + 1 tokens never waits for
tokens that it does not need.

A stream that has the vocoder to itself begins with a short chunk, for which T3 tells each token as it comes: its 80 ms
of sound last until the second one, whose tokens came while the first was spoken. In company the second one would have
to wait, and the listener would hear a pause: there the first chunk is longer, which gives a player 520 ms to start
with, and growing from it is a third of the work less. A stream with a seed always begins so, lest its sound depend on
its company.

Where the first sound would not last until the second chunk, on a slow device, it is held back: see ``pace``. Chunks are
cut the same. What a watermark, an encoder or a faster speech keeps back of it on the way does not last either, so a
lone stream's chunks are longer by that (``Listening``).

When a chunk is spoken is another matter: a stream's first chunk is due at once, a later one shortly before its listener
has heard all there is, and a whole file after some patience. What is due first goes first, so nothing waits for ever,
but who hears something does not fall silent for who does not: see ``service.ordered``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.types import AT_ONCE, SAMPLE_RATE, TOKEN_RATE, Listening
from chatterbox_vllm.vocoder.pace import HELD_TOKENS
from chatterbox_vllm.vocoder.utterance import Due, Listener

MARGIN: Final = 0.25
"""Seconds before its listener's last sample that a stream's next chunk is due: it takes time to be spoken and sent."""
PATIENCE: Final = 2.0
"""Seconds after which a whole file is due; meanwhile streams go first."""


@dataclass(frozen=True)
class ChunkSchedule:
    """Sizes of the chunks of one stream: with the defaults 26, 52, 104, ..., of one that is alone 15, 15, 30, ...

    Args:
        first: tokens of the first chunk.
        alone: tokens of the first two chunks each, if there is no other stream when it begins.
        growth: by what each further chunk is longer than the one before.
        largest: no chunk is longer.

    Raises:
        ConfigurationError: a value is out of range; ``param`` names it.
    """

    first: int = 26
    alone: int = 15
    growth: float = 2.0
    largest: int = 240

    def __post_init__(self) -> None:
        for name, size in (("first", self.first), ("alone", self.alone)):
            if size < 1:
                raise ConfigurationError(f"{name} must be at least 1 token, not {size}", param=name)
        if not 1.0 <= self.growth < math.inf:
            raise ConfigurationError(f"growth must be at least 1, not {self.growth}", param="growth")
        if self.largest < self.first:
            raise ConfigurationError(f"largest must be at least first, not {self.largest}", param="largest")

    def sizes(self, *, alone: bool, listening: Listening = AT_ONCE) -> Iterator[int]:
        """Token counts of the chunks, without end.

        Args:
            alone: there is no other stream.
            listening: the short chunks of a stream that is alone are longer where it would hear less of them.
        """
        size = float(self.first)
        if alone:
            kept = listening.behind * listening.speed * TOKEN_RATE
            faster = max(0, self.alone - HELD_TOKENS) * max(0.0, listening.speed - 1.0)
            size = float(self.alone + math.ceil(round(kept + faster, 6)))
            yield min(self.largest, int(size))
        while True:
            yield min(self.largest, int(size))
            size = min(float(self.largest), size * self.growth)


class Playback:
    """When a listener who plays a stream from its first sound on has heard all there is.

    After a pause in the sound the player goes on from where it was. Of a stream whose first sound is held back, chunks
    are due as if it had begun with its first one: so it begins before more streams do.

    Args:
        listening: how the stream is heard.
    """

    def __init__(self, listening: Listening = AT_ONCE) -> None:
        self.listening = listening
        self.has_begun = False
        """Whether the player runs."""
        self.sound = 0.0
        """Seconds of speech that are there, at speed 1."""
        self._dry: float | None = None

    def made(self, samples: int) -> None:
        """Notes that so many more samples are there."""
        if samples:
            now, seconds = time.monotonic(), samples / SAMPLE_RATE
            self.sound += seconds
            self._dry = max(now, self._dry or now) + seconds / self.listening.speed

    def begin(self) -> None:
        """Notes that what is there, and what follows, may be heard from now on."""
        if self.sound and not self.has_begun:
            self.has_begun, self._dry = True, time.monotonic() + self.sound / self.listening.speed

    @property
    def due(self) -> Due:
        """When the stream's next chunk is due."""
        if self._dry is None:
            return Due(time.monotonic(), Listener.WAITING)
        listener = Listener.HEARING if self.has_begun else Listener.HELD
        return Due(self._dry - self.listening.behind - MARGIN, listener)


def due_of_file() -> Due:
    """When a whole file that is asked for now is due."""
    return Due(time.monotonic() + PATIENCE)
