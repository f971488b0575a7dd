"""A computation of fixed shapes in a CUDA graph, for where launching takes longer than computing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Captured(Generic[T]):
    """``function`` of tensors with the shapes and dtypes of ``examples``, which must not look at their values.

    Args:
        function: launches kernels and nothing else.
        examples: inputs on the device.
        pool: memory shared with other graphs; none of them may run at the same time, and a result lasts until the next
            one of them runs.
    """

    def __init__(
        self, function: Callable[..., T], examples: tuple[Tensor, ...], pool: tuple[int, int] | None = None
    ) -> None:
        self._inputs = tuple(example.clone() for example in examples)
        function(*self._inputs)  # libraries take their workspaces: 32 MB for each stream that cuBLAS sees on an H200
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._result = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> T:
        """The result for ``inputs``, in memory that the next call overwrites.

        An input may be shorter than its example, and has the rest from the calls before; or be in pinned memory.
        """
        for own, given in zip(self._inputs, inputs, strict=True):
            own[: len(given)].copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result
