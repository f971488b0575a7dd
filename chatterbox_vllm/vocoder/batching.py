"""Which steps run together, and how rows of different lengths become one tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

T = TypeVar("T")


def packed(items: Iterable[T], length: Callable[[T], int], budget: int) -> Iterator[list[T]]:
    """Splits ``items`` so that no batch, padded to its longest, exceeds ``budget``; similar lengths stay together.

    An item longer than the budget makes a batch of its own.
    """
    batch: list[T] = []
    for item in sorted(items, key=length, reverse=True):  # the first of a batch is its longest
        if batch and (len(batch) + 1) * length(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def padded(rows: Sequence[Tensor]) -> Tensor:
    """(B, longest, ...) of rows (length, ...), zero past each row's end."""
    return rows[0][None] if len(rows) == 1 else pad_sequence(list(rows), batch_first=True)


def within(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """0 .. n - 1 for each n of ``counts``, one after the other: each element's place among its own."""
    counts = np.asarray(counts, dtype=np.int64)
    return np.arange(counts.sum()) - np.repeat(starts(counts), counts)


def starts(counts: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Where each row begins when rows of ``counts`` elements lie one after the other."""
    counts = np.asarray(counts, dtype=np.int64)
    return np.cumsum(counts) - counts


def is_ragged(lengths: Sequence[int]) -> bool:
    return len(set(lengths)) > 1


def row_mask(lengths: Sequence[int], device: torch.device) -> Tensor | None:
    """(B, longest) bool, true within each row; None when all rows are full, which is cheaper for everyone."""
    if not is_ragged(lengths):
        return None
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
