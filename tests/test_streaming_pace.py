"""The first sound of a stream waits until it lasts, and no longer. All in simulated time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncGenerator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from chatterbox_vllm import streaming
from chatterbox_vllm.parts import Part, speaking
from chatterbox_vllm.streaming import vocoded
from chatterbox_vllm.t3.prompt import LONE_INTERVAL, STREAM_INTERVAL
from chatterbox_vllm.types import (
    AT_ONCE,
    SAMPLE_RATE,
    SAMPLES_PER_TOKEN,
    SPOKEN_TOKENS,
    TOKEN_RATE,
    Listening,
    SpeechOptions,
    SpeechRequest,
)
from chatterbox_vllm.vocoder import pace, schedule
from chatterbox_vllm.vocoder.pace import HELD_TOKENS, SAFETY, Arrivals, Pace, Rest
from chatterbox_vllm.vocoder.schedule import ChunkSchedule, Playback
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES
from chatterbox_vllm.vocoder.utterance import Chunk, plan
from tests.vocoder_support import voice

T = TypeVar("T")
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


# --- a stream from its tokens to its player ---


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


class Skipping(selectors.SelectSelector):
    """Does not wait, but moves the clock on."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> Any:
        self._clock.now += timeout or 0.0
        return super().select(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of the modules under test, and of the loops that ``simulated`` runs; other threads have the real one."""
    made = Clock()
    for module in (pace, streaming, schedule):
        monkeypatch.setattr(module, "time", made)
    return made


def simulated(clock: Clock, work: Coroutine[Any, Any, T]) -> T:
    def loop() -> asyncio.AbstractEventLoop:
        made = asyncio.SelectorEventLoop(Skipping(clock))
        made.time = clock.monotonic
        return made

    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(work)


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


@dataclass
class SlowT3:
    """Says so many tokens of each part, the first after ``first`` seconds, the others after ``token`` each."""

    token: float
    counts: Sequence[int]
    first: float = 0.0
    intervals: list[int | None] = field(default_factory=list)

    async def tokens(self, *_: Any, interval: int | None) -> AsyncGenerator[list[int], None]:
        last = self.counts[len(self.intervals)]
        self.intervals.append(interval)
        assert interval is not None
        told = 0
        await asyncio.sleep(self.first)
        for count in [*range(1, last, interval), last]:
            await asyncio.sleep(self.token * (count - told))
            yield list(range(told, count))
            told = count
        await asyncio.sleep(self.token)


@dataclass
class SlowVocoder:
    """Says silence, so many seconds a frame.

    Args:
        clock: by which chunks are due.
        chunks: tokens of each.
        urgent: whether each was due at once, as when nobody listens yet.
    """

    clock: Clock
    frame: float
    chunks: list[int] = field(default_factory=list)
    urgent: list[bool] = field(default_factory=list)

    async def submit(self, chunk: Chunk) -> Tensor:
        self.chunks.append(len(chunk.tokens))
        self.urgent.append(chunk.due == self.clock.now)
        step, before = plan(chunk), chunk.utterance.released
        if step.is_idle:
            step.take()
            return torch.empty(0)
        await asyncio.sleep(self.frame * step.flow_frames)
        step.take()
        chunk.utterance.released = step.released
        return torch.zeros(FRAME_SAMPLES * (step.released - before))


@dataclass
class Heard:
    """What a player that starts with the first sound got.

    Args:
        pieces: samples of each.
        chunks: tokens of each that the vocoder got.
        urgent: see ``SlowVocoder``.
        first: seconds until there was something to play.
        dry: seconds for which the player ran dry.
    """

    pieces: list[int]
    chunks: list[int]
    urgent: list[bool]
    first: float = 0.0
    dry: float = 0.0


def listen(
    clock: Clock,
    token: float,
    frame: float,
    *,
    alone: bool = False,
    texts: Sequence[int] = (40,),
    counts: Sequence[int] = (120,),
    listening: Listening = AT_ONCE,
    recording: int = 25,
    first: float = 0.0,
) -> Heard:
    """To parts of so many text and speech tokens each."""
    vocoder = SlowVocoder(clock, frame)
    heard, arrivals = Heard([], vocoder.chunks, vocoder.urgent), list[float]()
    request = SpeechRequest("A text.", voice(recording), SpeechOptions(seed=1))

    async def play() -> None:
        began = clock.now
        t3: Any = SlowT3(token, counts, first)
        own: Any = vocoder
        async with speaking(
            t3, [[1] * count for count in texts], request, interval=STREAM_INTERVAL, alone=alone
        ) as spoken:
            async for samples in vocoded(own, spoken, ChunkSchedule(), Playback(listening), alone=alone):
                heard.pieces.append(len(samples))
                arrivals.append(clock.now - began)

    simulated(clock, play())
    there, until = 0.0, None
    for index, (arrival, samples) in enumerate(zip(arrivals, heard.pieces, strict=True)):
        kept = 0.0 if index == len(arrivals) - 1 else listening.behind
        total = max(there, sum(heard.pieces[: index + 1]) / SAMPLE_RATE / listening.speed - kept)
        assert samples
        if until is None and total > 0.0:
            heard.first, until = arrival, arrival + total
        elif until is not None:
            heard.dry += max(0.0, arrival - until)
            until = max(until, arrival) + total - there
        there = total
    return heard


SLOW = [(0.060, 1e-5), (0.030, 1e-5), (0.002, 0.006), (0.020, 0.003)]
"""Seconds a token and a frame."""


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("token", "frame"), SLOW)
def test_a_slow_device_s_listener_never_runs_dry(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, token: float, frame: float, alone: bool
) -> None:
    """And would, if the first sound came at once. What is said is the same."""
    held = listen(clock, token, frame, alone=alone)
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    eager = listen(clock, token, frame, alone=alone)
    assert held.dry == 0.0
    assert eager.dry > 0.1
    assert eager.first < held.first
    assert (eager.pieces, eager.chunks) == (held.pieces, held.chunks)
    assert sum(held.pieces) == 120 * SAMPLES_PER_TOKEN


CASES: dict[str, dict[str, Any]] = {
    "a text shorter than its silences": {"token": 0.015, "frame": 1e-5, "texts": [4], "counts": [30], "alone": True},
    "more speech than expected": {"token": 0.030, "frame": 1e-5, "texts": [10], "counts": [60]},
    "much more": {"token": 0.020, "frame": 1e-5, "texts": [4], "counts": [60]},
    "less": {"token": 0.050, "frame": 1e-5, "texts": [100], "counts": [60]},
    "the second next chunk is late": {
        "token": 0.010,
        "frame": 0.0002,
        "texts": [120],
        "counts": [356],
        "recording": 100,
    },
    "slowly spoken": {
        "token": 0.045,
        "frame": 0.004,
        "texts": [120],
        "counts": [468],
        "alone": True,
        "recording": 250,
        "listening": Listening(0.5),
    },
    "twice as fast": {"token": 0.015, "frame": 1e-5, "listening": Listening(2.0, 0.1)},
    "an encoder": {"token": 0.007, "frame": 0.0002, "listening": Listening(behind=0.5)},
    "a long recording": {"token": 0.002, "frame": 0.002, "recording": 250},
    "a short part first": {"token": 0.030, "frame": 1e-5, "texts": [5, 90], "counts": [22, 280]},
    "a short part first, slower": {"token": 0.060, "frame": 1e-5, "texts": [5, 90], "counts": [22, 280]},
    "three parts": {"token": 0.030, "frame": 0.001, "texts": [5, 5, 90], "counts": [20, 22, 200]},
}


@pytest.mark.parametrize("case", CASES)
def test_nobody_runs_dry(clock: Clock, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """And would, if the first sound came at once."""
    given = {"first": 0.2, **CASES[case]}
    assert listen(clock, **given).dry == 0.0
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    assert listen(clock, **given).dry > 0.0


@pytest.mark.parametrize(
    ("alone", "listening"),
    [
        (False, AT_ONCE),
        (False, Listening(behind=0.112)),
        (True, AT_ONCE),
        (True, Listening(behind=0.112)),
        (True, Listening(2.0, 0.172)),
    ],
)
def test_a_fast_device_s_listener_does_not_wait(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, listening: Listening, alone: bool
) -> None:
    kept = listen(clock, 0.0022, 0.00005, alone=alone, listening=listening)
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    assert listen(clock, 0.0022, 0.00005, alone=alone, listening=listening).first == pytest.approx(kept.first)
    assert kept.dry == 0.0


def test_while_sound_is_held_the_next_chunk_is_due_at_once(clock: Clock) -> None:
    assert listen(clock, 0.060, 1e-5).urgent == [True, True, True]
    assert listen(clock, 0.0026, 1e-5).urgent == [True, False, False]


def test_once_it_has_begun_nothing_waits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a part that follows, either."""
    decided: list[tuple[int, list[int]]] = []
    lasts = Pace.lasts

    def noted(speed: Pace, sound: float, rests: Sequence[Rest], *listening: Any) -> bool:
        decided.append((round(sound * TOKEN_RATE), [coming.spoken for coming in rests]))
        return lasts(speed, sound, rests, *listening)

    monkeypatch.setattr(Pace, "lasts", noted)
    assert len(listen(clock, 0.060, 1e-5, texts=[40, 40], counts=[120, 120]).pieces) == 6
    assert decided == [(13, [26, 0]), (65, [78, 0]), (120, [0])]


def test_the_pace_is_that_of_the_latest_chunk() -> None:
    part = Part([1], REQUEST, 0)
    piece = streaming._Piece(torch.empty(0), 1, 75, 0.5, final=False)
    assert streaming._pace(part, piece) == Pace(0.0, 0.5 / (2 * (25 + 75)))


def test_chunks_are_longer_for_who_hears_less_of_them(clock: Clock) -> None:
    """And only those of a lone stream's first part are short."""
    two = {"texts": [40, 40], "counts": [40, 40], "alone": True}
    assert listen(clock, 0.002, 1e-5, **two).chunks == [15, 15, 10, 26, 14]
    assert listen(clock, 0.002, 1e-5, **two, listening=Listening(behind=0.112)).chunks == [18, 18, 4, 26, 14]


def test_what_is_no_sound_does_not_count(clock: Clock) -> None:
    class Stuttering(SlowT3):
        async def tokens(self, *_: Any, interval: int | None) -> AsyncGenerator[list[int], None]:
            yield [1, SPOKEN_TOKENS]
            yield [2, SPOKEN_TOKENS + 1, 3]

    async def said() -> Part:
        t3: Any = Stuttering(0.0, [])
        async with speaking(t3, [[1]], REQUEST, interval=STREAM_INTERVAL) as (part,):
            while not (await part.take())[1]:
                pass
            return part

    arrivals = simulated(clock, said()).arrivals
    assert (arrivals.count, arrivals.complete) == (3, True)


def test_only_a_lone_stream_s_first_part_is_told_token_by_token(clock: Clock) -> None:
    async def intervals(**options: Any) -> list[int | None]:
        t3: Any = SlowT3(0.0, [1, 1])
        async with speaking(t3, [[1], [1]], REQUEST, **options) as spoken:
            for part in spoken:
                await part.take()
        said: list[int | None] = t3.intervals
        return said

    assert simulated(clock, intervals(interval=STREAM_INTERVAL, alone=True)) == [LONE_INTERVAL, STREAM_INTERVAL]
    assert simulated(clock, intervals(interval=STREAM_INTERVAL)) == [STREAM_INTERVAL, STREAM_INTERVAL]
