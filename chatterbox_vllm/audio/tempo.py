"""Speech faster or slower at the same pitch, as it comes: FFmpeg's ``atempo`` through PyAV."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import av
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.types import SAMPLE_RATE

Samples = NDArray[np.float32]

SPEEDS: Final = (0.25, 4.0)
"""OpenAI's range."""
_PIECE: Final = 480
"""atempo holds back about as much as it is handed at once."""
_BEHIND: Final = 0.1
"""Seconds of sound in which atempo looks for where two pieces fit."""
_SLOWEST_FILTER, _FASTEST_FILTER = 0.5, 2.0
"""What one atempo does well: it refuses less and drops samples over more. More is done in two steps."""


class Tempo:
    """Speeds one utterance up by ``speed``: 2.0 takes half the time. 1.0 changes nothing.

    Raises:
        InvalidRequest: ``speed`` is not within ``SPEEDS`` (``param="speed"``).
    """

    def __init__(self, speed: float, rate: int = SAMPLE_RATE) -> None:
        if isinstance(speed, bool) or not isinstance(speed, int | float) or not SPEEDS[0] <= speed <= SPEEDS[1]:
            low, high = SPEEDS
            raise InvalidRequest(f"speed must be a number from {low:g} to {high:g}, not {speed!r:.40}", param="speed")
        self._rate, self._position, self._speed = rate, 0, float(speed)
        self._graph = None if speed == 1.0 else _chain(list(_steps(float(speed))), rate)

    @property
    def behind(self) -> float:
        """Seconds of what it gives that it keeps back, at most: a tenth of a second of what is slower."""
        return 0.0 if self._graph is None else _BEHIND / min(1.0, self._speed)

    def feed(self, samples: Samples) -> Samples:
        """The (m,) float32 samples ready after these (n,); may be none, as some are held back: see ``behind``."""
        if self._graph is None or not len(samples):
            return samples
        for at in range(0, len(samples), _PIECE):
            self._push(np.ascontiguousarray(samples[at : at + _PIECE], np.float32))
        return self._ready()

    def finish(self) -> Samples:
        """The last samples. The object is of no use afterwards."""
        if self._graph is None or not self._position:
            return np.zeros(0, np.float32)
        self._graph.push(None)
        return self._ready()

    def _push(self, samples: Samples) -> None:
        frame = av.AudioFrame.from_ndarray(samples[None], "flt", "mono")
        frame.sample_rate, frame.pts = self._rate, self._position
        self._position += len(samples)
        assert self._graph is not None
        self._graph.push(frame)

    def _ready(self) -> Samples:
        parts = list(self._pull())
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _pull(self) -> Iterator[Samples]:
        assert self._graph is not None
        while True:
            try:
                frame = self._graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            assert isinstance(frame, av.AudioFrame)
            yield frame.to_ndarray()[0].astype(np.float32, copy=False)


def _steps(speed: float) -> Iterator[float]:
    """Factors within one filter's range whose product is ``speed``."""
    while speed < _SLOWEST_FILTER:
        yield _SLOWEST_FILTER
        speed /= _SLOWEST_FILTER
    while speed > _FASTEST_FILTER:
        yield _FASTEST_FILTER
        speed /= _FASTEST_FILTER
    yield speed


def _chain(steps: list[float], rate: int) -> Graph:
    graph = Graph()
    last = graph.add_abuffer(sample_rate=rate, format="flt", layout="mono")
    for step in steps:
        stretched = graph.add("atempo", f"{step:.6f}")
        last.link_to(stretched)
        last = stretched
    last.link_to(graph.add("abuffersink"))
    graph.configure()
    return graph
