"""Whether a stream's sound lasts until more of it comes.

Where T3 or the vocoder is slow, a player that starts with the first chunk's sound would run dry before the next one.
So ``parts.vocoded`` holds the first sound back until, by the pace of this very stream, all that follows comes in time.
That decides when sound is handed out, never where it is cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from chatterbox_vllm.types import AT_ONCE, TOKEN_RATE, Listening
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN, LOOKAHEAD_TOKENS
from chatterbox_vllm.vocoder.hift import REACH

HELD_TOKENS: Final = LOOKAHEAD_TOKENS + REACH // FRAMES_PER_TOKEN
"""Tokens at the end of all so far whose sound the vocoder holds back, unless they are the last."""
SAFETY: Final = 1.15
"""So many times what is predicted may a chunk take, and still come in time."""


class Arrivals:
    """When a part's tokens came.

    Attributes:
        count: of tokens that came.
        complete: whether no more will.
    """

    def __init__(self) -> None:
        self.count = 0
        self.complete = False
        self._first_count = 0
        self._first = self._latest = 0.0

    def note(self, tokens: int) -> None:
        """So many more are there now."""
        self._latest = time.monotonic()
        if not self.count:
            self._first_count, self._first = tokens, self._latest
        self.count += tokens

    @property
    def seconds_per_token(self) -> float:
        """Without the wait for the first ones; 0 before others came."""
        return (self._latest - self._first) / max(1, self.count - self._first_count)


@dataclass(frozen=True)
class Pace:
    """How fast a stream is made.

    Args:
        token: seconds that T3 takes for a token.
        frame: seconds that the vocoder takes for each frame its flow works on, the wait in its queue included.
    """

    token: float
    frame: float

    def lasts(
        self,
        sizes: Iterable[int],
        *,
        spoken: int,
        arrivals: Arrivals,
        expected: int,
        recording: int,
        listening: Listening = AT_ONCE,
    ) -> bool:
        """Whether a player that starts now, with all sound so far, would never run dry.

        Args:
            sizes: tokens of the chunks that follow, without end.
            spoken: tokens whose chunks are answered.
            arrivals: of the part's tokens.
            expected: tokens that the part will have.
            recording: tokens of the voice's recording, over which the flow runs, too.
            listening: how its sound is heard.
        """
        arrival, there = 0.0, arrivals.count + arrivals.complete
        for size in sizes:
            lasting = (spoken - HELD_TOKENS) / TOKEN_RATE / listening.speed - listening.behind
            final = spoken + size > expected
            spoken = min(spoken + size, expected)
            # That there is no further token is known when T3 stops, which is one more.
            told = max(0, spoken + final - there) * self.token
            arrival = max(told, arrival) + self.frame * FRAMES_PER_TOKEN * (recording + spoken)
            if arrival * SAFETY > lasting:
                return False
            if final:
                break
        return True
