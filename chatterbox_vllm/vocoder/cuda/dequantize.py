"""Quantised matrices on a CUDA card: they stay as they are, and are decoded just before they are used.

Tensor cores want half precision. So the matrices of a few layers at a time are decoded into memory that all layers
share, in one launch, within the CUDA graph that uses them: it reads a quarter of what it writes, and what it writes is
still in the card's cache when it is read. Decoding inside the products would do it again for every tile of rows.

The decoded numbers are bitsandbytes' own, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from chatterbox_vllm.quantization.matrices import BLOCK, EightBit, FourBit, Matrix, tables
from chatterbox_vllm.vocoder.cuda import dequantize_kernels

_TILE: Final = 64
"""Weights of a tile in either direction; the kernels know it, too."""
_Row = tuple[int, int, int, int, int, int]
"""Of a tile, see ``dequantize_kernels``."""


class _Counts(NamedTuple):
    """What matrices have, together."""

    weights: int = 0
    scales: int = 0
    outer: int = 0

    def and_of(self, matrix: Matrix) -> _Counts:
        outer = len(matrix.outer) if isinstance(matrix, FourBit) else 0
        return _Counts(self.weights + math.prod(matrix.shape), self.scales + len(matrix.scales), self.outer + outer)


class Scratch:
    """Memory in which matrices are while they are used.

    Args:
        elements: that it holds.
        dtype: of the decoded matrices.
        device: a CUDA device.
    """

    def __init__(self, elements: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(elements, dtype=dtype, device=device)

    @staticmethod
    def fits(matrices: Sequence[Matrix]) -> bool:
        """Whether the kernels can decode matrices of these sizes."""
        return all(size % _TILE == 0 for matrix in matrices for size in matrix.shape)

    def group(self, places: Sequence[Sequence[Matrix]], *, transposed: bool = False) -> Group:
        """Matrices that are decoded together.

        Args:
            places: matrices of one method; those of a place become one, their outputs one after the other.
            transposed: decoded as (inputs, outputs) instead of (outputs, inputs).
        """
        return Group.of(places, self.memory, transposed=transposed)


@dataclass(frozen=True, eq=False)
class Group:
    """Matrices that are decoded together.

    Args:
        matrices: decoded, a place each; they hold what was decoded last into the scratch.
        stored: arguments of the kernel.
        tiles: (T, 6) int32, see ``dequantize_kernels``.
        memory: the scratch.
        is_four_bit: or int8.
        transposed: see ``Scratch.group``.
    """

    matrices: list[Tensor]
    stored: list[Tensor]
    tiles: Tensor
    memory: Tensor
    is_four_bit: bool
    transposed: bool

    @classmethod
    def of(cls, places: Sequence[Sequence[Matrix]], memory: Tensor, *, transposed: bool) -> Group:
        """See ``Scratch.group``."""
        matrices = [matrix for place in places for matrix in place]
        views: list[Tensor] = []
        rows: list[_Row] = []
        before, end = _Counts(), 0
        for place in places:
            outputs, inputs = sum(matrix.shape[0] for matrix in place), place[0].shape[1]
            views.append(
                memory[end : end + outputs * inputs].view((inputs, outputs) if transposed else (outputs, inputs))
            )
            target = end
            for matrix in place:
                rows += _tiles(matrix, before, target, outputs if transposed else 0)
                before = before.and_of(matrix)
                target += matrix.shape[0] * (1 if transposed else inputs)
            end += outputs * inputs
        return cls(
            matrices=views,
            stored=[part.to(memory.device) for part in _stored(matrices, memory.device)],
            tiles=torch.tensor(rows, dtype=torch.int32).to(memory.device),
            memory=memory,
            is_four_bit=isinstance(matrices[0], FourBit),
            transposed=transposed,
        )

    def decode(self, *, overlap: bool) -> None:
        """Launches it; with ``overlap``, as the kernels of ``kernels`` are on cards that can."""
        kernel = dequantize_kernels.four_bit if self.is_four_bit else dequantize_kernels.eight_bit
        kernel[(len(self.tiles),)](
            *self.stored,
            self.tiles,
            self.memory,
            TRANSPOSED=self.transposed,
            OVERLAP=overlap,
            enable_fp_fusion=False,  # a product and a sum in one, which bitsandbytes rounds separately
            **({"launch_pdl": True} if overlap else {}),
        )


def _tiles(matrix: Matrix, before: _Counts, target: int, transposed_width: int) -> Iterator[_Row]:
    """Rows of ``Group.tiles``; ``transposed_width`` is 0, or that of a matrix of (inputs, transposed_width)."""
    outputs, inputs = matrix.shape
    stride = transposed_width or inputs
    for output in range(0, outputs, _TILE):
        for first in range(0, inputs, _TILE):
            weight = output * inputs + first
            scale = weight // BLOCK if isinstance(matrix, FourBit) else before.scales + output
            to = first * stride + output if transposed_width else output * stride + first
            yield before.weights + weight, inputs, scale, before.outer, target + to, stride


def _stored(matrices: Sequence[Matrix], device: torch.device) -> list[Tensor]:
    """Arguments of the kernel, one matrix after the other."""
    four = [matrix for matrix in matrices if isinstance(matrix, FourBit)]
    eight = [matrix for matrix in matrices if isinstance(matrix, EightBit)]
    assert not (four and eight)
    if eight:
        return [torch.cat([m.codes.flatten() for m in eight]), torch.cat([m.scales for m in eight])]
    return [
        torch.cat([m.codes for m in four]),
        torch.cat([m.scales for m in four]),
        torch.cat([m.outer for m in four]),
        torch.cat([m.offset.expand(len(m.outer)) for m in four]),
        *tables(device),
    ]
