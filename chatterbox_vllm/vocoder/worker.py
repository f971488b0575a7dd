"""A thread that owns a vocoder, and its front for asyncio.

Whatever waits when the vocoder is free makes the next batch, up to ``max_batch`` chunks and ``max_frames`` mel frames.
The oldest goes first, but a stream's first chunk counts as ``FIRST_CHUNK_BONUS`` older than it is, because somebody
waits for it; not more, lest new streams silence those that sound. After an error that leaves the device unusable the
thread ends, so that whoever watches ``is_alive`` can start the program anew.
A vocoder that speaks every utterance alone, as on a CPU, gets them one by one, so that none waits for another's end.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.errors import EngineDead, EngineError
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk, Utterance

logger: Final = logging.getLogger(__name__)

FIRST_CHUNK_BONUS: Final = 0.5
"""Seconds by which a stream's first chunk may overtake: about what a listening client has in its buffer."""
DEVICE_LOST: Final[tuple[type[Exception], ...]] = (torch.AcceleratorError,)
"""What a failed kernel raises. The device's context does not survive it. Want of memory is no such error."""


@dataclass(eq=False)
class _Job:
    chunk: Chunk
    answer: asyncio.Future[Tensor]
    cancelled: bool = field(default=False)
    came: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> float:
        """When it came, less the bonus; whole files, which are final from the start, have none."""
        chunk = self.chunk
        return self.came - (FIRST_CHUNK_BONUS if chunk.utterance.is_silent and not chunk.final else 0.0)


class VocoderWorker:
    """Batches the chunks of many utterances. Its methods belong to one event loop.

    Args:
        vocoder: from now on the worker's alone, but for ``Vocoder.open``.
        max_batch: the most chunks in one batch.
        max_frames: the most mel frames in one batch, recordings included; None is what the vocoder runs at once.
        max_wait: seconds to wait for company once a chunk is there; 0 takes what is there.
        max_waiting: the most chunks in the queue and in work; further ``submit`` calls wait for a place.
    """

    def __init__(
        self,
        vocoder: Vocoder,
        *,
        max_batch: int = 32,
        max_frames: int | None = None,
        max_wait: float = 0.0,
        max_waiting: int = 1024,
    ) -> None:
        self.vocoder = vocoder
        self.max_batch = max_batch
        self.max_frames = max_frames or vocoder.max_frames
        self.max_wait = max_wait
        self._places = asyncio.Semaphore(max_waiting)
        self._jobs: list[_Job] = []
        self._refused: list[_Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._device_lost = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="vocoder", daemon=True)

    @property
    def waiting(self) -> int:
        """Chunks in the queue, the batch that runs not among them."""
        return len(self._jobs)

    @property
    def is_alive(self) -> bool:
        """The thread runs and takes chunks."""
        return self._thread.is_alive() and not self._closing and not self._device_lost

    def start(self) -> None:
        """Starts the thread; to be called once, within the event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def submit(self, chunk: Chunk) -> Tensor:
        """Has one chunk spoken. An utterance's chunks are spoken in the order of their submission.

        Cancelling drops the chunk if it has not begun; its utterance is then of no more use.

        Returns:
            (n,) float32 samples on the CPU, as ``Vocoder.advance`` gives them.

        Raises:
            EngineError: its batch failed; ``__cause__`` is what went wrong.
            EngineDead: the worker is closed, was closed meanwhile, or never started.
        """
        async with self._places:
            job = _Job(chunk, asyncio.get_running_loop().create_future())
            with self._changed:
                if self._loop is None or self._closing:
                    raise EngineDead("the vocoder is not running")
                self._jobs.append(job)
                self._changed.notify()
            try:
                return await job.answer
            finally:
                job.cancelled = job.answer.cancelled()

    async def close(self, *, drain: bool = True) -> None:
        """Ends the thread, after what waits is spoken or, without ``drain``, refused. May be called again."""
        with self._changed:
            self._closing = True
            if not drain:
                self._refused, self._jobs = self._jobs, []
            self._changed.notify()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            with self._changed:
                self._closing = True
                left = self._refused + self._jobs
            self._deliver([(job, EngineDead("the vocoder has ended")) for job in left])

    def _turn(self) -> bool:
        """Speaks one batch and lets go of it, so that an idle worker holds no utterance; False to end the thread."""
        batch = self._next_batch()
        if batch:
            answers = self._speak([job.chunk for job in batch])
            self._deliver(list(zip(batch, answers, strict=True)))
        return bool(batch) and not self._device_lost

    def _next_batch(self) -> list[_Job]:
        """Waits for jobs and takes them off the queue; empty when there will be no more."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if self.max_wait > 0:
                    self._changed.wait_for(lambda: len(self._jobs) >= self.max_batch or self._closing, self.max_wait)
                self._jobs = [job for job in self._jobs if not job.cancelled]
                batch = pick(self._jobs, self.max_batch, self.max_frames)
                taken = set(batch)
                self._jobs = [job for job in self._jobs if job not in taken]
                if batch or self._closing:
                    return batch

    def _speak(self, chunks: list[Chunk]) -> Sequence[Tensor | EngineError]:
        began = time.perf_counter()
        try:
            sounds = self.vocoder.advance(chunks)
        except Exception as error:  # whatever it is, the requests outside this batch must not suffer
            logger.exception("the vocoder failed on a batch of %d chunks", len(chunks))
            self._device_lost = isinstance(error, DEVICE_LOST)
            return [_failure(error) for _ in chunks]
        logger.debug("spoke %d chunks in %.0f ms", len(chunks), 1e3 * (time.perf_counter() - began))
        return sounds

    def _deliver(self, answers: list[tuple[_Job, Tensor | EngineError]]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(_answer, answers)
        except RuntimeError:
            logger.debug("the event loop has ended; nobody waits for %d chunks", len(answers))


def pick(jobs: Sequence[_Job], max_batch: int, max_frames: int) -> list[_Job]:
    """The next batch, in the order of ``due``: one chunk of each utterance, and at least one chunk."""
    batch: list[_Job] = []
    taken: set[Utterance] = set()
    frames = 0
    for job in sorted(jobs, key=lambda job: job.due):
        if job.chunk.utterance in taken:
            continue
        frames += job.chunk.flow_frames
        if len(batch) == max_batch or (batch and frames > max_frames):
            break
        taken.add(job.chunk.utterance)
        batch.append(job)
    return batch


def _failure(cause: Exception) -> EngineError:
    error = EngineError(f"the vocoder failed: {type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error


def _answer(answers: Sequence[tuple[_Job, Tensor | EngineError]]) -> None:
    """Runs in the event loop, to which futures belong."""
    for job, answer in answers:
        if job.answer.done():
            continue
        if isinstance(answer, Tensor):
            job.answer.set_result(answer)
        else:
            job.answer.set_exception(answer)
