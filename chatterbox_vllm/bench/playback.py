"""What a listener would have heard: a stream's chunks against a player that starts at the first one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

TOLERANCE: Final = 0.001
"""Seconds that a chunk may be late unnoticed: this program's clock is no finer, and no sound card's buffer smaller."""


@dataclass(frozen=True)
class Playback:
    """How playing went.

    Args:
        ends: when the last sample has sounded, on the arrivals' clock.
        dry_seconds: silence between the first and the last sample, because the next chunk was late.
        worst_gap: the longest such silence.
    """

    ends: float
    dry_seconds: float = 0.0
    worst_gap: float = 0.0

    @property
    def ran_dry(self) -> bool:
        return self.dry_seconds > 0


def playback(chunks: Iterable[tuple[float, int]], *, sample_rate: int) -> Playback | None:
    """Plays ``chunks``, pairs of (arrival in seconds, samples), in real time from the first that has samples.

    A player that has run dry goes on as soon as the next chunk comes. None when nothing came at all.
    """
    ends: float | None = None
    dry = worst = 0.0
    for arrival, samples in chunks:
        if not samples:
            continue
        if ends is None:
            ends = arrival
        gap = arrival - ends
        if gap > TOLERANCE:
            dry += gap
            worst = max(worst, gap)
        ends = max(ends, arrival) + samples / sample_rate
    return None if ends is None else Playback(ends, dry, worst)
