"""HiFT a few frames at a time, where memory is short: most of a vocoder's activations are HiFT's.

As in a stream, a piece begins and ends ``REACH`` frames beyond what is kept of it, and its phases go on from those that
the piece before it has reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from chatterbox_vllm.vocoder.hift import GAP, REACH, Stretch
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES

Run = Callable[[Stretch], tuple[Sequence[Tensor], Sequence[Tensor]]]


def in_pieces(run: Run, stretch: Stretch, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """``run(stretch)``, with no more than ``most`` frames at once; see ``Backend.hift``.

    Args:
        run: a backend's ``hift``, whose results last until its next call.
        stretch: of any length.
        most: frames, those between rows among them; more than 2 (``REACH`` + ``GAP``).
    """
    samples: list[Tensor] = []
    cycles: list[Tensor] = []
    for first, last in _batches(stretch.frames, most):
        rows = _rows(stretch, first, last)
        sounds, turned = _cut(run, rows, most - GAP) if rows.frames[0] + GAP > most else run(rows)
        for frames, sound, turns in zip(rows.frames, sounds, turned, strict=True):
            samples.append(sound[: FRAME_SAMPLES * frames].clone())
            cycles.append(turns[:, : frames + 1].clone())
    return samples, cycles


def _batches(frames: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """First and last row, exclusive, of those that run together."""
    first, together = 0, 0
    for row, length in enumerate(frames):
        if row > first and together + length + GAP > most:
            yield first, row
            first, together = row, 0
        together += length + GAP
    yield first, len(frames)


def _rows(stretch: Stretch, first: int, last: int) -> Stretch:
    frames = stretch.frames[first:last]
    return Stretch(
        mel=stretch.mel[first:last, : max(frames)],
        frames=frames,
        anchor=stretch.anchor[first:last],
        cycles=stretch.cycles[first:last],
        offsets=stretch.offsets[first:last],
        keys=stretch.keys[first:last],
        first=stretch.first[first:last],
    )


def _cut(run: Run, row: Stretch, most: int) -> tuple[list[Tensor], list[Tensor]]:
    """One row of more than ``most`` frames."""
    (frames,), step = row.frames, most - 2 * REACH
    samples, turned = [], []
    anchor, cycles = row.anchor, row.cycles
    for begin in range(0, frames, step):
        end = min(frames, begin + step)
        left, right = max(0, begin - REACH), min(frames, end + REACH)
        piece = replace(
            row,
            mel=row.mel[:, left:right],
            frames=[right - left],
            anchor=anchor - left,
            cycles=cycles,
            first=row.first + FRAME_SAMPLES * left,
        )
        (sound,), (turns,) = run(piece)
        samples.append(sound[FRAME_SAMPLES * (begin - left) : FRAME_SAMPLES * (end - left)].clone())
        turned.append(turns[:, begin - left : end - left + (end == frames)].clone())
        anchor, cycles = torch.full_like(anchor, end), turns[None, :, end - left].clone()
    return [torch.cat(samples)], [torch.cat(turned, dim=1)]
