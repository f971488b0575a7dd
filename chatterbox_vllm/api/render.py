"""Samples to the bytes of a format at a speed."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from chatterbox_vllm.audio.encode import StreamEncoder, encode_whole
from chatterbox_vllm.audio.tempo import Tempo
from chatterbox_vllm.errors import EngineError
from chatterbox_vllm.types import SAMPLE_RATE, Listening

if TYPE_CHECKING:
    from chatterbox_vllm.audio.encode import Samples

_INLINE: Final = SAMPLE_RATE
"""Up to a second of sound is encoded where it is (a few ms); longer pieces in a thread."""


class Renderer:
    """One streamed file: (n,) float32 samples in, the bytes that are ready out, which may be none.

    Attributes:
        listening: what becomes of the samples on their way.
        sounds: whether any of them are in the file.
    """

    def __init__(self, format: str, speed: float) -> None:
        self._tempo = Tempo(speed)
        self._encoder = StreamEncoder(format)
        self.listening: Final = Listening(speed, self._tempo.behind + self._encoder.behind)
        self.sounds = False

    async def feed(self, samples: Samples) -> bytes:
        if len(samples) <= _INLINE:
            return self._feed(samples)
        return await asyncio.to_thread(self._feed, samples)

    def _feed(self, samples: Samples) -> bytes:
        return self._encoded(self._tempo.feed(samples))

    def finish(self) -> bytes:
        """The rest of the file.

        Raises:
            EngineError: the speed has left nothing of the sound.
        """
        rest = self._encoded(self._tempo.finish())
        if not self.sounds:
            raise _vanished(self.listening.speed)
        return rest + self._encoder.finish()

    def _encoded(self, samples: Samples) -> bytes:
        self.sounds = self.sounds or len(samples) > 0
        return self._encoder.encode(samples)


def render(samples: Samples, format: str, speed: float) -> bytes:
    """A whole file. Slow: 10 ms or so for each second of sound.

    Raises:
        EngineError: the speed leaves nothing of the sound.
    """
    import numpy as np

    tempo = Tempo(speed)
    heard = np.concatenate([tempo.feed(samples), tempo.finish()])
    if not len(heard):
        raise _vanished(speed)
    return encode_whole(heard, format)


def _vanished(speed: float) -> EngineError:
    return EngineError(f"speed {speed:g} leaves nothing of so short a sound; choose a lower one")
