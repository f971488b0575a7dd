"""The loop that owns a vocoder: it takes what is to go first, speaks it together, and tells what became of it.

The same loop runs on a thread of the server's process and in a process of its own; only the ways in and out differ.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final

import torch

from chatterbox_vllm.errors import EngineError
from chatterbox_vllm.types import SpeechOptions
from chatterbox_vllm.vocoder.sounding import Sounding
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import BESIDE_STEPS, Listener, Said
from chatterbox_vllm.vocoder.wire import Begun, Drop, Failed, Limits, Order, Speak, Spoken, Tell

logger: Final = logging.getLogger(__name__)

DEVICE_LOST: Final[tuple[type[Exception], ...]] = (torch.AcceleratorError,)
"""What a failed kernel raises. The device's context does not survive it. Want of memory is no such error."""
FADING: Final = 0.9
"""By what the weight of each batch in ``Service.seconds_per_work`` shrinks with the next."""
OVERDUE: Final = 2.0
"""A job of other diffusion steps than a batch's is passed over until so many seconds after it is due."""


class Service:
    """Batches chunks. ``put`` and ``close`` may be called from any thread.

    A vocoder that speaks every utterance alone, as on a CPU, gets them one by one, so that none waits for another's
    end.

    Args:
        tell: is told of each batch; from the thread that calls ``run``.
        limits: of a batch.
    """

    def __init__(self, tell: Tell, limits: Limits) -> None:
        self._tell = tell
        self._limits = limits
        self._jobs: list[Speak] = []
        self._changed = threading.Condition()
        self._closing = False
        self._seconds = self._work = 0.0

    @property
    def seconds_per_work(self) -> float:
        """That the vocoder takes for each unit of ``Step.work``, by the latest batches; 0 before any."""
        return self._seconds / max(1.0, self._work)

    def put(self, order: Order) -> None:
        """Adds a job, or takes one back; one that has begun is finished all the same."""
        with self._changed:
            if isinstance(order, Drop):
                self._jobs = [job for job in self._jobs if job.job != order.job]
            else:
                self._jobs.append(order)
                self._changed.notify()

    def close(self) -> None:
        """Has ``run`` return after its batch."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self, vocoder: Vocoder) -> None:
        """Speaks until it is closed.

        Raises:
            torch.AcceleratorError: the device is lost; the batch's jobs were told of it.
        """
        running: _Batch | None = None
        while running is not None or not self._closing:
            running = self._turn(vocoder, running)

    def _turn(self, vocoder: Vocoder, running: _Batch | None) -> _Batch | None:
        """Begins a batch if none is running; else ends that one, and begins the next one shortly before.

        So the device has work while the one's sound is sent and the other's tables are made. A batch that was launched
        early is told of when the one before it is done: if the device is lost with that, it had not begun.

        Returns:
            The batch that is running now, if any.
        """
        if running is None:
            if following := self._picked(vocoder, wait=True):
                self._tell(following.begun())
                following.launch(vocoder)
            return following
        following = None
        if running.has_something_left() and (following := self._picked(vocoder, wait=False)):
            following.launch(vocoder)
        self._finish(vocoder, running)
        if following is not None:
            self._tell(following.begun())
        return following

    def _picked(self, vocoder: Vocoder, *, wait: bool) -> _Batch | None:
        """Takes the next batch off the queue, if need be after waiting for jobs; None when it is closed or empty."""
        limits = self._limits
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: self._jobs or self._closing)
            if wait and limits.max_wait > 0:
                self._changed.wait_for(lambda: len(self._jobs) >= limits.max_batch or self._closing, limits.max_wait)
            if self._closing:
                return None
            now = time.monotonic()
            jobs = ordered(self._jobs, now, self.seconds_per_work)
            batch = pick(jobs, limits.max_batch, limits.max_frames or vocoder.max_frames, now)
            taken = {job.job for job in batch}
            self._jobs = [job for job in self._jobs if job.job not in taken]
        return _Batch(batch) if batch else None

    def _finish(self, vocoder: Vocoder, batch: _Batch) -> None:
        """Waits for a batch and tells what became of it."""
        try:
            said = batch.arrive()
        except Exception as error:
            # Whatever it is, what is outside of this batch must not suffer.
            logger.exception("the vocoder failed on a batch of %d chunks", len(batch.jobs))
            self._tell(Failed(batch.numbers, f"{type(error).__name__}: {error}"))
            if isinstance(error, DEVICE_LOST):
                raise
            return
        took = time.monotonic() - batch.began
        logger.debug("spoke %d chunks in %.0f ms", len(batch.jobs), 1e3 * took)
        frames = sum(job.step.flow_frames for job in batch.jobs)
        waits = tuple(batch.began - job.came for job in batch.jobs)
        work = sum(job.step.work for job in batch.jobs)
        self._seconds, self._work = FADING * self._seconds + took, FADING * self._work + work
        self._tell(Spoken(batch.numbers, said, frames, took, waits, vocoder.footprint()))


class _Batch:
    """Jobs that are spoken together.

    Args:
        jobs: at least one.
    """

    def __init__(self, jobs: list[Speak]) -> None:
        self.jobs = jobs
        self.numbers = tuple(job.job for job in jobs)
        self.began = 0.0
        self._sounding: Sounding | None = None
        self._error: Exception | None = None

    def begun(self) -> Begun:
        """Its time runs from now on."""
        self.began = time.monotonic()
        return Begun(self.numbers)

    def launch(self, vocoder: Vocoder) -> None:
        """Has it spoken; what goes wrong is raised by ``arrive``."""
        try:
            self._sounding = vocoder.launch([job.step for job in self.jobs])
        except Exception as error:  # noqa: BLE001  # raised when its turn has come
            self._error = error

    def has_something_left(self) -> bool:
        """Waits until the device has little left to do for it, and says whether there is anything."""
        if self._sounding is None:
            return False
        with suppress(*DEVICE_LOST):  # which ``arrive`` raises again
            self._sounding.wait_for_flow()
            return not self._sounding.is_here
        return False

    def arrive(self) -> list[Said]:
        """Waits for what its jobs say."""
        if self._sounding is None:
            error, self._error = self._error or EngineError("a batch was not launched"), None
            try:
                raise error
            finally:
                del error  # its traceback has the batch's tensors, and this frame: they would keep each other
        return self._sounding.arrive()


def ordered(jobs: Iterable[Speak], now: float, seconds_per_work: float) -> list[Speak]:
    """What waits, in the order in which it is to go: as it is due, but nobody falls silent for who hears nothing yet.

    If a chunk that somebody hears were late after all that is due before it, it goes first, and with it whatever else
    is heard and due before it. So new streams begin at once as long as all others go on; where there are too many for
    the device, they wait until some have ended. Streams whose first sound is held back come next, in the same way.

    Args:
        jobs: in any order.
        now: by the clock of ``Due``.
        seconds_per_work: see ``Service``.
    """
    queue, work = sorted(jobs, key=lambda job: job.due.at), 0
    hurried = {Listener.HEARING: -math.inf, Listener.HELD: -math.inf}  # until when they are due
    for job in queue:
        work += job.step.work
        if job.due.listener in hurried and now + work * seconds_per_work >= job.due.at:
            hurried[job.due.listener] = job.due.at

    def place(job: Speak) -> int:
        is_hurried = job.due.at <= hurried.get(job.due.listener, -math.inf)
        return job.due.listener if is_hurried else len(Listener)

    return sorted(queue, key=place)


def pick(jobs: Sequence[Speak], max_batch: int, max_frames: int, now: float) -> list[Speak]:
    """The next batch: the first of them, all with as many diffusion steps as the very first; at least one job.

    It is no more work than ``max_frames`` with the usual steps. With a stream in it, a batch is a quarter of that, so
    that who comes next does not wait long; where much waits already, up to half, which is faster.

    Args:
        jobs: ordered.
        max_batch: see ``Limits``.
        max_frames: that the vocoder has room for.
        now: by the clock of ``Due``.
    """
    batch: list[Speak] = []
    frames = work = 0
    most, waiting = max_frames * (SpeechOptions.diffusion_steps + BESIDE_STEPS), sum(job.step.work for job in jobs)
    streamed = min(max(most // 4, waiting // 4), most // 2)
    for job in jobs:
        if batch and job.step.utterance.diffusion_steps != batch[0].step.utterance.diffusion_steps:
            if now - job.due.at > OVERDUE:
                break
            continue
        frames += job.step.flow_frames
        work += job.step.work
        if job.due.is_streamed:
            most = streamed
        if len(batch) == max_batch or (batch and (frames > max_frames or work > most)):
            break
        batch.append(job)
    return batch
