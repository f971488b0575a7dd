"""Decoding of quantised matrices, in two Triton kernels.

Matrices lie one after the other, (outputs, inputs) each, and are cut into tiles of 64 outputs by 64 inputs: in NF4, a
block of each of 64 rows. A row of ``tiles`` says where a tile's first weight is among all weights, how many inputs its
matrix has, its first scale (in NF4 counted within its matrix, in int8 among all), where its matrix's outer scales
begin, where its first weight goes, and how far from that the next output goes or, TRANSPOSED, the next input.
"""

# Triton's language has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from chatterbox_vllm.quantization import matrices
from chatterbox_vllm.vocoder.cuda.kernels import _wait

_TILE: tl.constexpr = tl.constexpr(matrices.BLOCK)
_OUTER: tl.constexpr = tl.constexpr(matrices.OUTER_BLOCK)
_INT8_SHARE: tl.constexpr = tl.constexpr(matrices.INT8_SHARE)


@triton.jit
def _store(weight, tile, out, TRANSPOSED: tl.constexpr, OVERLAP: tl.constexpr):
    """Stores a tile, once those who read what was there before are done."""
    row, column = tl.arange(0, _TILE)[:, None], tl.arange(0, _TILE)[None, :]
    target, stride = tl.load(tile + 4), tl.load(tile + 5)
    at = row + column * stride if TRANSPOSED else row * stride + column
    _wait(OVERLAP)
    tl.store(out + target + at, weight.to(out.dtype.element_ty))


@triton.jit
def four_bit(
    codes,
    scales,
    outer,
    offsets,
    values,
    scale_values,
    tiles,
    out,
    TRANSPOSED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """NF4 with double quantisation, see ``quantization.matrices.FourBit``. Grid: (tiles,)."""
    tile = tiles + 6 * tl.program_id(0)
    first, inputs = tl.load(tile), tl.load(tile + 1)
    row, pair = tl.arange(0, _TILE), tl.arange(0, _TILE // 2)
    blocks = row * (inputs // _TILE)
    group = tl.load(tile + 3) + (tl.load(tile + 2) + blocks) // _OUTER
    scale_code = tl.load(scales + first // _TILE + blocks).to(tl.int32)
    scale = tl.load(scale_values + scale_code) * tl.load(outer + group) + tl.load(offsets + group)
    code = tl.load(codes + first // 2 + row[:, None] * (inputs // 2) + pair[None, :]).to(tl.int32)
    both = tl.join(tl.load(values + (code >> 4)), tl.load(values + (code & 15)))
    _store(tl.reshape(both, [_TILE, _TILE]) * scale[:, None], tile, out, TRANSPOSED, OVERLAP)


@triton.jit
def eight_bit(codes, scales, tiles, out, TRANSPOSED: tl.constexpr, OVERLAP: tl.constexpr):
    """LLM.int8, see ``quantization.matrices.EightBit``. Grid: (tiles,)."""
    tile = tiles + 6 * tl.program_id(0)
    first, inputs = tl.load(tile), tl.load(tile + 1)
    row, column = tl.arange(0, _TILE), tl.arange(0, _TILE)
    code = tl.load(codes + first + row[:, None] * inputs + column[None, :]).to(tl.float32)
    scale = tl.load(scales + tl.load(tile + 2) + row)
    _store(code * scale[:, None] * _INT8_SHARE, tile, out, TRANSPOSED, OVERLAP)
