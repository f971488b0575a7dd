"""How a stream's pace is measured, and whether its sound lasts at it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import pytest

from chatterbox_vllm.parts import Part
from chatterbox_vllm.types import AT_ONCE, TOKEN_RATE, Listening, SpeechOptions, SpeechRequest
from chatterbox_vllm.vocoder.pace import HELD_TOKENS, SAFETY, Arrivals, Pace, Rest
from chatterbox_vllm.vocoder.schedule import ChunkSchedule
from tests.streaming_support import Clock
from tests.vocoder_support import voice

RECORDING = 250
REQUEST = SpeechRequest("A text.", voice(25), SpeechOptions(seed=1))


def arrived(count: int, *, complete: bool = False) -> Arrivals:
    arrivals = Arrivals()
    arrivals.note(count)
    arrivals.complete = complete
    return arrivals


def rest(sizes: Iterable[int], spoken: int, arrivals: Arrivals, expected: int) -> list[Rest]:
    return [Rest(sizes, spoken, arrivals, expected, RECORDING)]


def sound_of(spoken: int) -> float:
    """Seconds that there are of a part of which so many tokens are vocoded, and not the last ones."""
    return (spoken - HELD_TOKENS) / TOKEN_RATE


def releases(speed: Pace, *, expected: int, alone: bool = False) -> int:
    """After how many chunks the sound is let go, if T3 and the vocoder keep to ``speed``; 0: after the last one."""
    spoken, now, chunks = 0, 0.0, ChunkSchedule()
    for count, size in enumerate(chunks.sizes(alone=alone), start=1):
        if spoken + size > expected:
            return 0
        spoken += size
        now = max(now, spoken * speed.token) + speed.frame * 2 * (RECORDING + spoken)
        arrivals = arrived(min(expected, int(now / speed.token)))
        sizes = islice(chunks.sizes(alone=alone), count, None)
        if speed.lasts(sound_of(spoken), rest(sizes, spoken, arrivals, expected)):
            return count
    raise AssertionError


def test_what_the_vocoder_holds_back() -> None:
    assert HELD_TOKENS == 13


@pytest.mark.parametrize("expected", [30, 100, 400, 1000])
@pytest.mark.parametrize(
    ("token", "answer", "alone"), [(0.0026, 0.039, True), (0.007, 0.130, False), (0.0026, 0.039, False)]
)
def test_a_fast_device_holds_nothing_back(token: float, answer: float, alone: bool, expected: int) -> None:
    frames = 2 * (RECORDING + (15 if alone else 26))
    assert releases(Pace(token, answer / frames), expected=expected, alone=alone) == 1


@pytest.mark.parametrize(
    ("speed", "expected", "chunks"),
    [
        (Pace(0.060, 1e-5), 160, 0),  # slower than it is heard: until the end
        (Pace(0.060, 1e-5), 400, 4),  # or nearly: 390 tokens are in
        (Pace(0.025, 1e-5), 400, 3),
        (Pace(0.0026, 0.0015), 400, 2),  # a slow vocoder
        (Pace(0.0026, 0.0100), 400, 4),
        (Pace(0.0026, 0.1000), 400, 0),
        (Pace(0.060, 1e-5), 30, 1),  # what is to come is short
    ],
)
def test_a_slow_device_holds_sound_back(speed: Pace, expected: int, chunks: int) -> None:
    assert releases(speed, expected=expected) == chunks


def test_tokens_that_are_there_are_not_waited_for() -> None:
    """And neither is T3's stop, once it is known."""
    speed = Pace(10.0, 1e-5)

    def lasts(arrivals: Arrivals, expected: int) -> bool:
        return speed.lasts(sound_of(26), rest([52, 104], 26, arrivals, expected))

    assert lasts(arrived(60, complete=True), 60)
    assert not lasts(arrived(60), 60)
    assert not lasts(arrived(60), 61)
    # 78 tokens end exactly with a chunk: the empty one that follows is the last.
    assert lasts(arrived(78, complete=True), 78)
    assert not lasts(arrived(78), 78)


@pytest.mark.parametrize(
    ("expected", "chunks"),
    [
        (20, [(0, 20, True)]),
        (26, [(0, 26, False), (26, 26, True)]),  # that these are all is known later
        (100, [(0, 26, False), (26, 78, False), (78, 100, True)]),
    ],
)
def test_which_chunks_are_still_to_come(expected: int, chunks: list[tuple[int, int, bool]]) -> None:
    (coming,) = rest([26, 52, 104, 208], 0, arrived(0), expected)
    assert list(coming.chunks()) == chunks


def test_the_sound_of_a_part_is_there_when_the_next_one_is_to_come() -> None:
    speed = Pace(0.0, 0.0005)
    (ends,), (follows,) = (rest([200], 0, arrived(100, complete=True), 100) for _ in range(2))
    assert speed.lasts(0.5, [ends, follows])
    assert not speed.lasts(0.3, [ends, follows])


def test_what_is_predicted_may_take_longer() -> None:
    """By ``SAFETY``, and no more. 600 frames take a second here."""
    speed, following = Pace(0.0, 1 / 600), rest([51], 0, arrived(50, complete=True), 50)
    assert speed.lasts(1.001 * SAFETY, following)
    assert not speed.lasts(0.999 * SAFETY, following)
    assert SAFETY > 1.1


def test_a_chunk_far_ahead_may_be_the_one_that_is_late() -> None:
    """The vocoder takes longer with each, and one waits for the other."""
    speed, arrivals = Pace(0.0, 0.002), arrived(500, complete=True)
    assert speed.lasts(1.6, rest([25, 25], 0, arrivals, 24))
    assert not speed.lasts(1.6, rest([25] * 20, 0, arrivals, 400))


def test_what_is_kept_back_on_the_way_does_not_last() -> None:
    speed, chunks = Pace(0.0026, 0.039 / 530), ChunkSchedule()

    def lasts(spoken: int, listening: Listening) -> bool:
        sizes = islice(chunks.sizes(alone=True, listening=listening), 1, None)
        return speed.lasts(sound_of(spoken), rest(sizes, spoken, arrived(31), 400), listening)

    assert lasts(15, AT_ONCE)
    assert not lasts(15, Listening(behind=0.04))
    assert lasts(16, Listening(behind=0.04))
    assert not lasts(15, Listening(speed=2.0))
    assert lasts(17, Listening(speed=2.0))


@pytest.mark.parametrize("speed", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("behind", [0.0, 0.1, 0.212])
def test_a_lone_stream_s_first_chunk_lasts_equally_long_in_any_format(speed: float, behind: float) -> None:
    first = next(ChunkSchedule().sizes(alone=True, listening=Listening(speed, behind)))
    assert 0.08 - 1e-9 <= sound_of(first) / speed - behind < 0.12


def test_how_fast_tokens_come(clock: Clock) -> None:
    arrivals = Arrivals()
    arrivals.note(0)  # ids that are no sound
    assert arrivals.seconds_per_token == 0.0
    clock.now += 3.0
    arrivals.note(1)
    assert arrivals.seconds_per_token == 0.0
    clock.now += 1.0
    arrivals.note(5)
    assert (arrivals.count, arrivals.seconds_per_token) == (6, 0.2)


def test_how_much_a_part_is_expected_to_say() -> None:
    """Four tokens for one of the text's, and a second more until the end is known; no more than is allowed."""
    part = Part([1] * 40, REQUEST, 0)
    assert part.expected == 4 * 40 + 25
    part.arrivals.note(200)
    assert part.expected == 200 + 25
    few = Part([1] * 40, replace(REQUEST, options=SpeechOptions(max_tokens=100)), 0, arrivals=part.arrivals)
    assert few.expected == 200
    part.arrivals.complete = True
    assert part.expected == 200
    assert Part([1] * 40, few.request, 0).expected == 100
