"""A stream from its tokens to its player, in simulated time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from chatterbox_vllm import streaming
from chatterbox_vllm.parts import speaking
from chatterbox_vllm.streaming import vocoded
from chatterbox_vllm.t3.prompt import STREAM_INTERVAL
from chatterbox_vllm.types import AT_ONCE, SAMPLE_RATE, Listening, SpeechOptions, SpeechRequest
from chatterbox_vllm.vocoder import pace, schedule, service
from chatterbox_vllm.vocoder.schedule import ChunkSchedule, Playback
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES
from chatterbox_vllm.vocoder.utterance import BESIDE_STEPS, Chunk, plan
from chatterbox_vllm.vocoder.wire import Speak
from tests.vocoder_support import voice

T = TypeVar("T")


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


def simulated_clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
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


WORK = SpeechOptions.diffusion_steps + BESIDE_STEPS
"""Of a frame."""


@dataclass
class SlowVocoder:
    """Says silence, one chunk at a time, in the order that a service has.

    Args:
        clock: of all.
        seconds_per_frame: that it takes.
        chunks: tokens of each.
    """

    clock: Clock
    seconds_per_frame: float
    chunks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._turns: dict[int, asyncio.Event] = {}
        self._waiting: list[Speak] = []
        self._busy = False

    async def submit(self, chunk: Chunk) -> Tensor:
        self.chunks.append(len(chunk.tokens))
        step, before = plan(chunk), chunk.utterance.released
        if step.is_idle:
            step.take()
            return torch.empty(0)
        async with self._turn(Speak(len(self.chunks), step, chunk.due, self.clock.now)):
            await asyncio.sleep(self.seconds_per_frame * step.flow_frames)
        step.take()
        chunk.utterance.released = step.released
        return torch.zeros(FRAME_SAMPLES * (step.released - before))

    @asynccontextmanager
    async def _turn(self, job: Speak) -> AsyncIterator[None]:
        if self._busy:
            self._waiting.append(job)
            turn = self._turns[job.job] = asyncio.Event()
            await turn.wait()  # the one before leaves it busy
        self._busy = True
        try:
            yield
        finally:
            self._busy = bool(self._waiting)
            if self._waiting:
                following = service.ordered(self._waiting, self.clock.now, self.seconds_per_frame / WORK)[0]
                self._waiting.remove(following)
                self._turns.pop(following.job).set()


@dataclass
class Heard:
    """What a player that starts with the first sound got.

    Args:
        pieces: samples of each.
        chunks: tokens of each that the vocoder got, from whomever.
        first: seconds until there was something to play.
        dry: seconds for which the player ran dry.
    """

    pieces: list[int]
    chunks: list[int]
    first: float = 0.0
    dry: float = 0.0


@dataclass(frozen=True)
class Stream:
    """One of those that are listened to.

    Args:
        texts, counts: text tokens and speech tokens of each part.
        begins: seconds until it is asked for.
        first: seconds until T3's first token.
    """

    alone: bool = False
    texts: Sequence[int] = (40,)
    counts: Sequence[int] = (120,)
    listening: Listening = AT_ONCE
    recording: int = 25
    first: float = 0.0
    begins: float = 0.0


def listen(clock: Clock, token: float, frame: float, **stream: Any) -> Heard:
    """To one stream: see ``Stream``."""
    return listen_to_all(clock, token, frame, [Stream(**stream)])[0]


def listen_to_all(clock: Clock, token: float, frame: float, streams: Sequence[Stream]) -> list[Heard]:
    """To streams that share a vocoder, not T3."""
    vocoder = SlowVocoder(clock, frame)

    async def play(stream: Stream) -> Heard:
        await asyncio.sleep(stream.begins)
        began, arrivals, pieces = clock.now, list[float](), list[int]()
        request = SpeechRequest("A text.", voice(stream.recording), SpeechOptions(seed=1))
        texts = [[1] * count for count in stream.texts]
        t3: Any = SlowT3(token, stream.counts, stream.first)
        own: Any = vocoder
        playback = Playback(stream.listening)
        async with speaking(t3, texts, request, interval=STREAM_INTERVAL, alone=stream.alone) as spoken:
            async for samples in vocoded(own, spoken, ChunkSchedule(), playback, alone=stream.alone):
                pieces.append(len(samples))
                arrivals.append(clock.now - began)
        first, dry = played(arrivals, pieces, stream.listening)
        return Heard(pieces, vocoder.chunks, first, dry)

    async def all_of_them() -> list[Heard]:
        return await asyncio.gather(*map(play, streams))

    return simulated(clock, all_of_them())


def played(arrivals: Sequence[float], pieces: Sequence[int], listening: Listening) -> tuple[float, float]:
    """When a player begins, and for how long it is dry."""
    there, until, first, dry = 0.0, None, 0.0, 0.0
    for index, (arrival, samples) in enumerate(zip(arrivals, pieces, strict=True)):
        kept = 0.0 if index == len(arrivals) - 1 else listening.behind
        total = max(there, sum(pieces[: index + 1]) / SAMPLE_RATE / listening.speed - kept)
        assert samples
        if until is None and total > 0.0:
            first, until = arrival, arrival + total
        elif until is not None:
            dry += max(0.0, arrival - until)
            until = max(until, arrival) + total - there
        there = total
    return first, dry
