"""The loop that owns a vocoder: it takes what is due first, speaks it together, and tells what became of it.

The same loop runs on a thread of the server's process and in a process of its own; only the ways in and out differ.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Final

import torch

from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.wire import Begun, Drop, Failed, Limits, Order, Speak, Spoken, Tell

logger: Final = logging.getLogger(__name__)

DEVICE_LOST: Final[tuple[type[Exception], ...]] = (torch.AcceleratorError,)
"""What a failed kernel raises. The device's context does not survive it. Want of memory is no such error."""


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
        while self._turn(vocoder):
            pass

    def _turn(self, vocoder: Vocoder) -> bool:
        """Speaks one batch and lets go of it, so that an idle service holds no utterance; False to end."""
        batch = self._next_batch(self._limits.max_frames or vocoder.max_frames)
        if batch:
            self._speak(vocoder, batch)
        return bool(batch)

    def _next_batch(self, max_frames: int) -> list[Speak]:
        """Waits for jobs and takes them off the queue; empty when it is closed."""
        limits = self._limits
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if limits.max_wait > 0:
                    self._changed.wait_for(
                        lambda: len(self._jobs) >= limits.max_batch or self._closing, limits.max_wait
                    )
                if self._closing:
                    return []
                if batch := pick(self._jobs, limits.max_batch, max_frames):
                    taken = {job.job for job in batch}
                    self._jobs = [job for job in self._jobs if job.job not in taken]
                    return batch

    def _speak(self, vocoder: Vocoder, batch: list[Speak]) -> None:
        jobs, began = tuple(job.job for job in batch), time.monotonic()
        self._tell(Begun(jobs))
        try:
            said = vocoder.speak([job.step for job in batch])
        except Exception as error:
            # Whatever it is, what is outside of this batch must not suffer.
            logger.exception("the vocoder failed on a batch of %d chunks", len(batch))
            self._tell(Failed(jobs, f"{type(error).__name__}: {error}"))
            if isinstance(error, DEVICE_LOST):
                raise
            return
        took = time.monotonic() - began
        logger.debug("spoke %d chunks in %.0f ms", len(batch), 1e3 * took)
        frames = sum(job.step.flow_frames for job in batch)
        waits = tuple(began - job.came for job in batch)
        self._tell(Spoken(jobs, said, frames, took, waits, vocoder.footprint()))


def pick(jobs: Sequence[Speak], max_batch: int, max_frames: int) -> list[Speak]:
    """The next batch: earliest due first, all with as many diffusion steps as the first; at least one job.

    With a stream in it, a batch is a quarter as large as it may be, so that who comes next does not wait long; where
    many wait already, up to half as large, which is faster.
    """
    batch: list[Speak] = []
    frames, waiting = 0, sum(job.step.flow_frames for job in jobs)
    streamed = min(max(max_frames // 4, waiting // 4), max_frames // 2)
    for job in sorted(jobs, key=lambda job: job.due):
        if batch and job.step.utterance.diffusion_steps != batch[0].step.utterance.diffusion_steps:
            continue
        frames += job.step.flow_frames
        if job.step.is_streamed:
            max_frames = streamed
        if len(batch) == max_batch or (batch and frames > max_frames):
            break
        batch.append(job)
    return batch
