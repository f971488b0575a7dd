"""The vocoder's front for asyncio: one or several workers, and whose chunk goes to which.

A chunk goes to the worker with the least to do. What waits there is spoken in the order of ``service.ordered``. When a
worker dies, only the chunks of the batch that it ran fail; the others go to another one, or wait for it to come back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.errors import EngineDead, EngineError
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.host import GRACE, Host
from chatterbox_vllm.vocoder.utterance import Chunk, Due, Said, Step, Utterance, plan
from chatterbox_vllm.vocoder.wire import Begun, Drop, Ended, Failed, News, Read, Ready, Speak, Spoken

logger: Final = logging.getLogger(__name__)

GONE: Final = "the vocoder has died"
RESTARTING: Final = "the vocoder is restarting"
HANGING: Final = "the vocoder does not answer"
MOVES: Final = 3
"""A chunk that was in the queues of so many workers that died is given up: it may be what they died of."""
TOO_LONG: Final = 3
"""A worker that tells nothing for so many times its host's patience is ended."""
TICK: Final = 1.0
"""Seconds between two looks at who tells nothing."""


@dataclass(frozen=True)
class VocoderStats:
    """What the vocoder's workers did so far, together.

    Args:
        batches: that were finished.
        chunks: in those.
        frames: of mel that the flow worked on for them, recordings included.
        busy_seconds: in which a batch ran.
        queue_wait_seconds: that those chunks waited for their batch to begin, summed up.
        failures: batches that failed, or that a worker died of.
        restarts: times that a worker died and was started anew.
        waiting: chunks that wait now.
    """

    batches: int = 0
    chunks: int = 0
    frames: int = 0
    busy_seconds: float = 0.0
    queue_wait_seconds: float = 0.0
    failures: int = 0
    restarts: int = 0
    waiting: int = 0


@dataclass(eq=False)
class _Job:
    speak: Speak
    answer: asyncio.Future[Said]
    begun: bool = False
    moves: int = 0

    def fail(self, error: EngineError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(eq=False)
class _Worker:
    """One host, and what it was given.

    Args:
        runs: a batch of it runs, though its clients may have left.
        silence: ticks in which it had something to do and told nothing. By the clock, it would be blamed when the event
            loop stood still.
    """

    host: Host
    read: asyncio.Future[None]
    ready: asyncio.Future[None]
    jobs: dict[int, _Job] = field(default_factory=dict)
    up: bool = False
    dead: bool = False
    footprint: VocoderFootprint | None = None
    runs: bool = False
    silence: int = 0

    @property
    def hangs(self) -> bool:
        return self.silence * TICK >= self.host.patience

    @property
    def work(self) -> int:
        """Of its jobs, those that run among them."""
        return sum(job.speak.step.work for job in self.jobs.values())

    def taken(self, numbers: Sequence[int]) -> Iterator[_Job]:
        """Takes jobs off its list; some may have been taken back."""
        return (job for number in numbers if (job := self.jobs.pop(number, None)) is not None)


class VocoderPool:
    """Has chunks spoken by one or several workers. All belongs to one event loop.

    Args:
        hosts: where the workers run; from now on the pool's alone.
        max_waiting: the most chunks in the queues and in work; further ``submit`` calls wait for a place.
    """

    def __init__(self, hosts: Sequence[Host], *, max_waiting: int = 1024) -> None:
        self._hosts = hosts
        self._workers: list[_Worker] = []
        self._places = asyncio.Semaphore(max_waiting)
        self._numbers = count()
        self._homeless: dict[int, _Job] = {}
        self._speaking: set[Utterance] = set()
        self._stats = VocoderStats()
        self._watching: asyncio.TimerHandle | None = None
        self._closing = False

    @property
    def waiting(self) -> int:
        """Chunks that were submitted and have not begun."""
        begun = sum(job.begun for worker in self._workers for job in worker.jobs.values())
        return len(self._homeless) + sum(len(worker.jobs) for worker in self._workers) - begun

    @property
    def stats(self) -> VocoderStats:
        return replace(self._stats, waiting=self.waiting)

    @property
    def footprints(self) -> list[VocoderFootprint]:
        """Of each worker that has ever been ready, after its latest batch."""
        return [worker.footprint for worker in self._workers if worker.footprint is not None]

    @property
    def trouble(self) -> str | None:
        """Why no chunk can be spoken now; None if it can."""
        if not self.is_alive:
            return GONE
        up = [worker for worker in self._workers if worker.up]
        if not up:
            return RESTARTING
        return HANGING if all(worker.hangs for worker in up) else None

    @property
    def is_alive(self) -> bool:
        """Takes chunks, and speaks them now or when a worker is back."""
        return not self._closing and self._has_workers

    @property
    def _has_workers(self) -> bool:
        return any(not worker.dead for worker in self._workers)

    def start(self) -> None:
        """Has the workers read their checkpoint, where that disturbs nobody; to be called once."""
        loop = asyncio.get_running_loop()
        self._workers = [_Worker(host, loop.create_future(), loop.create_future()) for host in self._hosts]
        for worker in self._workers:
            worker.host.start(partial(self._heard, worker))
        self._watch()

    async def read(self) -> None:
        """Waits until that is done.

        Raises:
            CheckpointError, ConfigurationError, EngineError: a worker's checkpoint cannot be read.
        """
        await asyncio.gather(*(worker.read for worker in self._workers))

    async def ready(self) -> None:
        """Has the workers take their devices' memory, and waits until all of them speak.

        Raises:
            CheckpointError, ConfigurationError, EngineError: a worker cannot be loaded.
        """
        for worker in self._workers:
            worker.host.build()
        await asyncio.gather(*(worker.ready for worker in self._workers))

    async def submit(self, chunk: Chunk) -> Tensor:
        """Has one chunk spoken. Of one utterance, a chunk is submitted when the one before it is answered.

        After an error, or if it is cancelled, the utterance is as it was before.

        Returns:
            (n,) float32 samples on the CPU, as ``Vocoder.advance`` gives them.

        Raises:
            EngineError: its batch failed, its worker died with it, or what it says is no sound.
            EngineDead: the pool is closed, was closed meanwhile, was never started, or all its workers are dead.
            ValueError: another chunk of the utterance is not answered yet, or was its final one.
        """
        async with self._places:
            if not self.is_alive:
                raise EngineDead("the vocoder is not running")
            if chunk.utterance in self._speaking:
                raise ValueError("a chunk of this utterance is not answered yet; await it first")
            step = plan(chunk)
            if step.is_idle:
                step.take()
                return torch.empty(0)
            said = await self._said(step, chunk.due)
            step.settle(said)
            return said.samples

    async def close(self, *, drain: bool = True) -> None:
        """Ends the workers, after what waits is spoken or, without ``drain``, refused. May be called again."""
        self._closing = True
        if not drain:
            self._refuse(EngineDead("the vocoder has ended"))
        running = [job.answer for job in self._jobs()]
        if running:
            await asyncio.wait(running, timeout=None if drain else GRACE)
        await asyncio.gather(*(worker.host.end() for worker in self._workers))
        if self._watching is not None:
            self._watching.cancel()
        for job in self._jobs():
            job.fail(EngineDead("the vocoder has ended"))

    async def _said(self, step: Step, due: Due) -> Said:
        number = next(self._numbers)
        speak = Speak(number, step, due, came=time.monotonic())
        job = _Job(speak, asyncio.get_running_loop().create_future())
        self._speaking.add(step.utterance)
        try:
            self._place(job)
            return await job.answer
        finally:
            self._speaking.discard(step.utterance)
            self._forget(number)

    def _jobs(self) -> list[_Job]:
        return [*self._homeless.values(), *(job for worker in self._workers for job in worker.jobs.values())]

    def _place(self, job: _Job) -> None:
        """Gives a job to the worker that has least to do; to one that hangs only if all do."""
        up = [worker for worker in self._workers if worker.up]
        if up:
            worker = min(up, key=lambda worker: (worker.hangs, worker.work))
            worker.jobs[job.speak.job] = job
            worker.host.send(job.speak)
        elif self._has_workers:
            self._homeless[job.speak.job] = job
        else:
            job.fail(EngineDead(GONE))

    def _forget(self, number: int) -> None:
        """Takes back what nobody waits for any more; nothing if it was answered."""
        self._homeless.pop(number, None)
        for worker in self._workers:
            if worker.jobs.pop(number, None):
                worker.host.send(Drop(number))

    def _refuse(self, error: EngineError) -> None:
        """Fails what has not begun."""
        for job in self._jobs():
            if not job.begun:
                job.fail(error)

    def _watch(self) -> None:
        """Notes who tells nothing, and ends who does so for too long."""
        for worker in self._workers:
            worker.silence = worker.silence + 1 if worker.jobs or worker.runs else 0
            if worker.silence * TICK >= TOO_LONG * worker.host.patience:
                worker.host.kill()
        self._watching = asyncio.get_running_loop().call_later(TICK, self._watch)

    def _heard(self, worker: _Worker, news: News) -> None:
        worker.runs, worker.silence = isinstance(news, Begun), 0
        match news:
            case Read():
                _settle(worker.read)
            case Ready(footprint):
                worker.footprint = footprint
                _settle(worker.ready)
                self._up(worker)
            case Ended(error, final):
                self._ended(worker, error, final=final)
            case Begun(numbers):
                for job in filter(None, map(worker.jobs.get, numbers)):
                    job.begun = True
            case Spoken():
                self._spoken(worker, news)
            case Failed(numbers, reason):
                self._count(failures=1)
                for job in worker.taken(numbers):
                    job.fail(EngineError(f"the vocoder failed: {reason}"))

    def _up(self, worker: _Worker) -> None:
        """Shares out again what has not begun. What has, and has not told so yet, is spoken twice and heard once."""
        worker.up = True
        waiting = [job for job in self._jobs() if not job.begun]
        for job in waiting:
            self._forget(job.speak.job)
        for job in sorted(waiting, key=lambda job: job.speak.due.at):
            self._place(job)

    def _spoken(self, worker: _Worker, news: Spoken) -> None:
        self._count(
            batches=1,
            chunks=len(news.jobs),
            frames=news.frames,
            busy_seconds=news.busy_seconds,
            queue_wait_seconds=sum(news.waits),
        )
        worker.footprint = news.footprint
        for number, said in zip(news.jobs, news.said, strict=True):
            job = worker.jobs.pop(number, None)
            if job is not None and not job.answer.done():
                job.answer.set_result(said)

    def _ended(self, worker: _Worker, error: Exception, *, final: bool) -> None:
        """Fails what the worker was speaking, and finds another place for the rest."""
        worker.up, worker.dead = False, final
        if not self._closing:
            _log_end(error, final=final, was_ready=worker.ready.done())
            self._count(failures=int(any(job.begun for job in worker.jobs.values())), restarts=int(not final))
        jobs, worker.jobs = worker.jobs, {}
        for job in jobs.values():
            job.moves += 1
            if job.begun or job.moves == MOVES:
                job.fail(EngineError(f"the vocoder died with this, try again: {error}"))
            else:
                self._place(job)
        if final:
            _settle(worker.read, error)
            _settle(worker.ready, error)
            if not self._has_workers:
                self._refuse(EngineDead(GONE))

    def _count(self, **more: float) -> None:
        self._stats = replace(self._stats, **{name: getattr(self._stats, name) + value for name, value in more.items()})


def _settle(future: asyncio.Future[None], error: Exception | None = None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # it may be that nobody waits


def _log_end(error: Exception, *, final: bool, was_ready: bool) -> None:
    if not final:
        logger.error("%s; starting it again", error)
    elif was_ready:
        logger.error("the vocoder is given up: %s", error, exc_info=error)
