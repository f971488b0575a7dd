"""Samples to the bytes of a format at a speed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from chatterbox_vllm.audio.encode import StreamEncoder, encode_whole
from chatterbox_vllm.audio.tempo import Tempo
from chatterbox_vllm.types import SAMPLE_RATE, Listening

if TYPE_CHECKING:
    from chatterbox_vllm.audio.encode import Samples

_INLINE: Final = SAMPLE_RATE
"""Up to a second of sound is encoded where it is (a few ms); longer pieces in a thread."""


class Renderer:
    """One streamed file: (n,) float32 samples in, the bytes that are ready out, which may be none.

    ``listening`` says what becomes of the samples on their way.
    """

    def __init__(self, format: str, speed: float) -> None:
        self._tempo = Tempo(speed)
        self._encoder = StreamEncoder(format)
        self.listening: Final = Listening(speed, self._tempo.behind + self._encoder.behind)

    async def feed(self, samples: Samples) -> bytes:
        if len(samples) <= _INLINE:
            return self._feed(samples)
        return await asyncio.to_thread(self._feed, samples)

    def _feed(self, samples: Samples) -> bytes:
        return self._encoder.encode(self._tempo.feed(samples))

    def finish(self) -> bytes:
        """The rest of the file."""
        return self._encoder.encode(self._tempo.finish()) + self._encoder.finish()


def render(samples: Samples, format: str, speed: float) -> bytes:
    """A whole file. Slow: 10 ms or so for each second of sound."""
    import numpy as np

    tempo = Tempo(speed)
    return encode_whole(np.concatenate([tempo.feed(samples), tempo.finish()]), format)
