"""The first sound of a stream waits until it lasts, and no longer. All in simulated time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from chatterbox_vllm import parts
from chatterbox_vllm.parts import speaking, vocoded
from chatterbox_vllm.t3.prompt import LONE_INTERVAL, STREAM_INTERVAL
from chatterbox_vllm.types import AT_ONCE, SAMPLE_RATE, SAMPLES_PER_TOKEN, Listening, SpeechOptions, SpeechRequest
from chatterbox_vllm.vocoder import pace, schedule
from chatterbox_vllm.vocoder.pace import HELD_TOKENS, Arrivals, Pace
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
        if speed.lasts(sizes, spoken=spoken, arrivals=arrivals, expected=expected, recording=RECORDING):
            return count
    raise AssertionError


def test_what_a_watermark_keeps_back_does_not_last() -> None:
    speed, chunks = Pace(0.0026, 0.039 / 530), ChunkSchedule()
    known = {"arrivals": arrived(31), "expected": 400, "recording": RECORDING}

    def lasts(spoken: int, listening: Listening) -> bool:
        sizes = islice(chunks.sizes(alone=True, listening=listening), 1, None)
        return speed.lasts(sizes, spoken=spoken, listening=listening, **known)

    assert lasts(15, AT_ONCE)
    assert not lasts(15, Listening(behind=0.04))
    assert lasts(16, Listening(behind=0.04))
    assert not lasts(15, Listening(speed=2.0))
    assert lasts(16, Listening(speed=2.0))


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
        return speed.lasts([52, 104], spoken=26, arrivals=arrivals, expected=expected, recording=RECORDING)

    assert lasts(arrived(60, complete=True), 60)
    assert not lasts(arrived(60), 60)
    assert not lasts(arrived(60), 61)
    assert not speed.lasts([1], spoken=13, arrivals=arrived(13, complete=True), expected=13, recording=RECORDING)


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
    for module in (pace, parts, schedule):
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


@dataclass
class SlowT3:
    """Says ``count`` tokens, so many seconds each."""

    token: float
    count: int
    intervals: list[int | None] = field(default_factory=list)

    async def tokens(self, *_: Any, interval: int | None) -> AsyncGenerator[list[int], None]:
        self.intervals.append(interval)
        assert interval is not None
        told = 0
        for count in [*range(1, self.count, interval), self.count]:
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
        first: seconds until the first piece.
        dry: seconds for which the player ran dry.
    """

    pieces: list[int]
    chunks: list[int]
    urgent: list[bool]
    first: float = 0.0
    dry: float = 0.0


def listen(clock: Clock, token: float, frame: float, *, alone: bool = False, count: int = 1) -> Heard:
    """To a text of ``count`` parts, of 120 tokens each, where 160 are expected."""
    vocoder = SlowVocoder(clock, frame)
    heard = Heard([], vocoder.chunks, vocoder.urgent)

    async def play() -> None:
        began, lasting, playback = clock.now, 0.0, Playback()
        t3: Any = SlowT3(token, 120)
        async with speaking(t3, [[1] * 40] * count, REQUEST, interval=STREAM_INTERVAL, alone=alone) as spoken:
            for part in spoken:
                own: Any = vocoder
                async for samples in vocoded(own, part, ChunkSchedule(), playback, alone=alone):
                    if heard.pieces:
                        heard.dry += max(0.0, clock.now - lasting)
                    else:
                        heard.first = clock.now - began
                    heard.pieces.append(len(samples))
                    lasting = max(clock.now, lasting) + len(samples) / SAMPLE_RATE

    simulated(clock, play())
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


@pytest.mark.parametrize("alone", [False, True])
def test_a_fast_device_s_listener_does_not_wait(clock: Clock, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    kept = listen(clock, 0.0026, 0.0001, alone=alone)
    monkeypatch.setattr(Pace, "lasts", lambda *_, **__: True)
    assert listen(clock, 0.0026, 0.0001, alone=alone).first == pytest.approx(kept.first)
    assert kept.dry == 0.0


def test_while_sound_is_held_the_next_chunk_is_due_at_once(clock: Clock) -> None:
    assert listen(clock, 0.060, 1e-5).urgent == [True, True, True]
    assert listen(clock, 0.0026, 1e-5).urgent == [True, False, False]


def test_only_the_first_part_waits(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    decided: list[int] = []
    lasts = Pace.lasts

    def noted(speed: Pace, *sizes: Any, **more: Any) -> bool:
        decided.append(more["spoken"])
        return lasts(speed, *sizes, **more)

    monkeypatch.setattr(Pace, "lasts", noted)
    assert len(listen(clock, 0.060, 1e-5, count=2).pieces) == 6
    assert decided == [26, 78]


def test_only_a_lone_stream_s_first_part_is_told_token_by_token(clock: Clock) -> None:
    async def intervals(**options: Any) -> list[int | None]:
        t3: Any = SlowT3(0.0, 1)
        async with speaking(t3, [[1], [1]], REQUEST, **options) as spoken:
            for part in spoken:
                await part.take()
        said: list[int | None] = t3.intervals
        return said

    assert simulated(clock, intervals(interval=STREAM_INTERVAL, alone=True)) == [LONE_INTERVAL, STREAM_INTERVAL]
    assert simulated(clock, intervals(interval=STREAM_INTERVAL)) == [STREAM_INTERVAL, STREAM_INTERVAL]
