"""Whether a stream's sound lasts until more of it comes.

Where T3 or the vocoder is slow, a player that starts with the first chunk's sound would run dry before the next one.
So ``streaming.vocoded`` holds the first sound back until, by the pace of this very stream, all that follows comes in
time. That decides when sound is handed out, never where it is cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
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
class Rest:
    """What is still to come of a part.

    Args:
        sizes: tokens of the chunks that follow, without end.
        spoken: tokens whose chunks are answered.
        arrivals: of its tokens.
        expected: tokens that it will have.
        recording: tokens of the voice's recording, over which the flow runs, too.
    """

    sizes: Iterable[int]
    spoken: int
    arrivals: Arrivals
    expected: int
    recording: int

    def chunks(self) -> Iterator[tuple[int, int, bool]]:
        """Of each: how many of the part's tokens are vocoded before it, how many with it, whether it is the last."""
        spoken = self.spoken
        for size in self.sizes:
            before, spoken = spoken, min(spoken + size, self.expected)
            final = before + size > self.expected
            yield before, spoken, final
            if final:
                return


@dataclass(frozen=True)
class Pace:
    """How fast a stream is made.

    Args:
        token: seconds that T3 takes for a token.
        frame: seconds that the vocoder takes for each frame its flow works on, the wait in its queue included.
    """

    token: float
    frame: float

    def lasts(self, sound: float, rests: Iterable[Rest], listening: Listening = AT_ONCE) -> bool:
        """Whether a player that starts now, with so many seconds of sound, would not run dry.

        Args:
            sound: all there is, in seconds.
            rests: of the part at hand and of those after it.
            listening: how it is heard.
        """
        arrival = 0.0
        for rest in rests:
            out, there = max(0, rest.spoken - HELD_TOKENS), rest.arrivals.count + rest.arrivals.complete
            for before, spoken, final in rest.chunks():
                more = max(0, before - HELD_TOKENS) - out
                lasting = (sound + more / TOKEN_RATE) / listening.speed - listening.behind
                # That there is no further token is known when T3 stops, which is one more.
                told = max(0, spoken + final - there) * self.token
                arrival = max(told, arrival) + self.frame * FRAMES_PER_TOKEN * (rest.recording + spoken)
                if arrival * SAFETY > lasting:
                    return False
            sound += (rest.expected - out) / TOKEN_RATE
        return True
