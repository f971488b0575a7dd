"""The flow's Euler steps on a CUDA card, a whole batch in one CUDA graph that runs once for each step.

Launched one by one, three hundred small kernels a step would wait for Python. A graph is captured for a number of
frames and serves every batch of at most so many: rows past those in use cost next to nothing (see ``kernels``), so that
sizes may double from one graph to the next, and rows of different lengths need no padding. Graphs never overlap, so all
compute in the same memory. One graph of all steps would be launched only after 2 ms, in which the card has nothing to
do; of one for each step, the first is launched at once, and the others while it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Final

import numpy as np
import torch
from torch import Tensor

from chatterbox_vllm.vocoder.batching import starts, within
from chatterbox_vllm.vocoder.cuda.estimator import PackedEstimator, Room, Rows
from chatterbox_vllm.vocoder.cuda.tiling import Tiling
from chatterbox_vllm.vocoder.flow import GUIDANCE, schedule
from chatterbox_vllm.vocoder.transfer import to_device

SMALLEST: Final = 640
"""Frames of the smallest graph: those of a stream's first chunk after a recording of 10 s, which alone has 500. It is
cut smaller than the next one's, which is for 1,024; after that, sizes double."""


@dataclass(frozen=True, eq=False)
class _Size:
    """What batches of up to so many frames share.

    Args:
        integers: the tables of ``rows``, one after the other, so that one copy brings them.
    """

    integers: Tensor
    rows: Rows
    tiling: Tiling


class GraphSolver:
    """Does what ``Flow.solve`` does, in half precision.

    Belongs to one thread at a time, and to the CUDA stream that is current when it is made.

    Args:
        estimator: computes one step.
        frames: the most that will be asked for at once. More is possible, and then takes memory and captures anew.
    """

    def __init__(self, estimator: PackedEstimator, *, frames: int) -> None:
        self._estimator = estimator
        self._device = estimator.device
        self._shared_memory = int(torch.cuda.get_device_properties(self._device).shared_memory_per_block_optin)
        # What the graphs read of the step they are at: its shifts, then its length.
        shifts = estimator.resnets * estimator.width
        self._step = torch.zeros(shifts + 1, device=self._device)
        self._shifts, self._length = self._step[:shifts].view(estimator.resnets, -1), self._step[shifts:]
        self._each: dict[int, tuple[Tensor, ...]] = {}
        self._make_room(_size_for(frames, 1))

    def warm_up(self, frames: int) -> None:
        """Compiles the kernels and captures the graphs of up to ``frames`` frames, so that no request waits for it."""
        largest = min(_size_for(frames, 1), self._frames)
        sizes = list(takewhile(lambda size: size <= largest, _sizes()))
        with ThreadPoolExecutor(len(sizes)) as pool:  # compilers run beside each other
            list(pool.map(self._compile, map(self._size, sizes)))
        for frames in sizes:
            self._graph(frames)

    def solve(
        self, noise: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, lengths: Sequence[int], steps: int
    ) -> list[Tensor]:
        """Guided Euler steps from noise to mel: ``Flow.solve`` without padding.

        Args:
            noise, mu, cond: (B, T, 80) float32; cond is the prompt's mel, then zeros.
            speaker: (B, 80) float32.
            lengths: frames of each row.
            steps: Euler steps.

        Returns:
            For each row (frames, 80) float32.

        Raises:
            torch.OutOfMemoryError: there is no room for so many frames.
        """
        total = sum(lengths)
        frames = _size_for(total, len(lengths))
        if frames > self._frames:
            self._make_room(frames)
        graph, size = self._graph(frames), self._size(frames)
        tables, order = _tables(lengths, noise.shape[1], size)
        size.integers.copy_(to_device(tables, self._device))
        # Everything side by side, as the estimator wants it; of that, the frames that exist, in their order.
        speakers = speaker[:, None].expand(-1, noise.shape[1], -1)
        given = torch.cat([noise, mu, speakers, cond], dim=-1).flatten(0, 1)[to_device(order, self._device)]
        mels = self._estimator.mels
        size.rows.mel[:total] = given[:, :mels]
        guided, free = size.rows.pairs[:total].long().unbind(1)
        size.rows.inputs.index_copy_(0, guided, given.to(size.rows.inputs.dtype))
        given[:, mels:] = 0.0
        size.rows.inputs.index_copy_(0, free, given.to(size.rows.inputs.dtype))
        for step in self._steps(steps):
            self._step.copy_(step)
            graph.replay()
        return list(size.rows.mel[:total].clone().split(list(lengths)))

    def _make_room(self, frames: int) -> None:
        """Takes memory for batches of so many frames. Graphs know addresses, so they go."""
        estimator = self._estimator
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._sizes: dict[int, _Size] = {}
        self._room: Room | None = None  # freed before the next one is made
        self._frames = 0  # should there be no memory for that
        self._room = estimator.room(2 * frames)
        self._inputs = torch.zeros(2 * frames, estimator.inputs, dtype=estimator.dtype, device=self._device)
        self._mel = torch.zeros(frames, estimator.mels, device=self._device)
        self._frames = frames

    def _graph(self, frames: int) -> torch.cuda.CUDAGraph:
        if frames not in self._graphs:
            self._graphs[frames] = self._captured(self._size(frames))
        return self._graphs[frames]

    def _size(self, frames: int) -> _Size:
        if frames not in self._sizes:
            self._sizes[frames] = self._made(frames)
        return self._sizes[frames]

    def _made(self, frames: int) -> _Size:
        rows = 2 * frames
        tiling = Tiling.of(rows, width=self._estimator.width, shared_memory=self._shared_memory)
        tiles = rows // tiling.attention.rows + 2 * _utterances(frames)
        integers = torch.zeros(4 + 3 * tiles + rows + rows, dtype=torch.int32, device=self._device)
        used, in_use, _, tile, pair, place = integers.split([1, 1, 2, 3 * tiles, rows, rows])
        return _Size(
            integers,
            Rows(
                place=place,
                used=used,
                tiles=tile.view(-1, 3),
                pairs=pair.view(-1, 2),
                frames=in_use,
                inputs=self._inputs[:rows],
                mel=self._mel[:frames],
            ),
            tiling,
        )

    def _steps(self, steps: int) -> tuple[Tensor, ...]:
        """What ``_step`` shall hold for each of them."""
        if steps not in self._each:
            moments = schedule(steps)
            shifts, lengths = self._estimator.shifts(moments[:-1]), to_device(moments.diff(), self._device)
            self._each[steps] = torch.cat([shifts.flatten(1), lengths[:, None]], dim=1).unbind()
        return self._each[steps]

    def _launch(self, size: _Size) -> None:
        """The kernels of one step."""
        assert self._room is not None
        self._estimator.step(size.rows, self._room, size.tiling, self._shifts, self._length, GUIDANCE)

    @torch.inference_mode()
    def _compile(self, size: _Size) -> None:
        """Launches each kernel once; as no row is in use, they do nothing."""
        with torch.cuda.device(self._device):  # a new thread begins with the first one
            size.integers.zero_()
            self._launch(size)
            torch.cuda.current_stream().synchronize()

    def _captured(self, size: _Size) -> torch.cuda.CUDAGraph:
        self._compile(size)
        graph = torch.cuda.CUDAGraph()
        # Another thread's work on the device, such as an enrolment's, must not spoil the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._launch(size)
        return graph


def _utterances(frames: int) -> int:
    """The most in a batch of so many frames: there are attention tiles for so many that begin a sequence."""
    return 64 + frames // 256


def _sizes() -> Iterator[int]:
    """Frames of all graphs that there can be."""
    size = SMALLEST
    while True:
        yield size
        size = 1 << size.bit_length()


def _size_for(frames: int, utterances: int) -> int:
    """The smallest of ``_sizes`` that is enough."""
    return next(size for size in _sizes() if size >= frames and _utterances(size) >= utterances)


def _tables(lengths: Sequence[int], padded: int, size: _Size) -> tuple[Tensor, Tensor]:
    """What ``size.integers`` shall hold, and where each frame is in rows of ``padded`` frames: int32 and int64.

    An utterance's guided rows come first, then as many unguided ones, then the next utterance's.
    """
    counts, first, frame = np.asarray(lengths), starts(lengths), within(lengths)
    total = len(frame)
    guided = 2 * np.repeat(first, counts) + frame
    free = guided + np.repeat(counts, counts)
    table = np.zeros(len(size.integers), dtype=np.int32)
    table[:2] = 2 * total, total
    tiles, pairs, place = np.split(table[4:], np.cumsum([size.rows.tiles.numel(), size.rows.pairs.numel()]))
    step = size.tiling.attention.rows
    sequences = np.repeat(counts, 2)
    many = -(-sequences // step)
    begin = np.repeat(starts(sequences), many)
    used = tiles.reshape(-1, 3)[: len(begin)]
    used[:] = np.stack([begin + step * within(many), begin, begin + np.repeat(sequences, many)], axis=1)
    pairs.reshape(-1, 2)[:total] = np.stack([guided, free], axis=1)
    place[guided] = place[free] = frame
    order = np.repeat(np.arange(len(counts)) * padded, counts) + frame
    return torch.from_numpy(table), torch.from_numpy(order)
