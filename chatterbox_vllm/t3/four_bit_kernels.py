"""The Triton kernels of ``four_bit``.

A row of ``codes`` is an output. A word of 16 bits has the codes of four inputs, PLANE inputs apart, and PLANE words lie
side by side: so the same four bits of each are a piece of the matrix as it is. Tensor cores take a left factor out of
registers, where it was widened, and a right one only out of shared memory; so the matrix is on the left, and what is
computed is the transposed product.

A number of ``groups`` has a group's scale in its lower half and, in the upper one, the code that means 0 plus MAGIC's
value. With MAGIC's bits before them, four bits are their own value plus that, exactly and without a conversion.
"""

# Triton's language has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _four_bits(plane: int, magic: int) -> str:
    """Of two words at a time: the compiler takes twice as many instructions for it."""
    return f"shr.u32 $0, $1, {4 * plane}; lop3.b32 $0, $0, 0x000F000F, {0x10001 * magic}, 0xEA;"


@triton.jit
def _widened(words, groups, plane: tl.constexpr, like, MAGIC: tl.constexpr, ON_CARD: tl.constexpr):
    """(outputs, PLANE) weights: the words' codes in ``plane``, by the outputs' ``groups``; of ``like``'s dtype."""
    if ON_CARD:
        code: tl.constexpr = _four_bits(plane, MAGIC)
        codes = tl.inline_asm_elementwise(code, "=r,r", [words], dtype=like.dtype.element_ty, is_pure=True, pack=2)
    else:
        codes = (((words >> (4 * plane)) & 15) | MAGIC).to(like.dtype.element_ty, bitcast=True)
    scale = (groups & 0xFFFF).to(tl.int16).to(like.dtype.element_ty, bitcast=True)
    zero = (groups >> 16).to(tl.int16).to(like.dtype.element_ty, bitcast=True)
    return (codes - zero[:, None]) * scale[:, None]


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x,
    codes,
    groups,
    out,
    rows,
    outputs,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    MAGIC: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    ON_CARD: tl.constexpr,
):
    """x (rows, INPUTS) by the matrix. Grid: (outputs / OUTPUTS, rows / ROWS, SPLITS).

    With one of SPLITS ``out`` is (rows, outputs); with several it is (SPLITS, rows, outputs) float32, of each the part
    of the sums over its own inputs.
    """
    blocks: tl.constexpr = INPUTS // (4 * PLANE * SPLITS)
    first = tl.program_id(2) * blocks
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, PLANE)
    real = (row < rows)[None, :]
    words = codes + output[:, None] * (INPUTS // 4) + (first * PLANE + place)[None, :]
    right = x + row[None, :] * INPUTS + (first * 4 * PLANE + place)[:, None]
    acc = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for block in tl.range(0, blocks, num_stages=STAGES):
        word = tl.load(words)
        for plane in tl.static_range(4):
            group = tl.load(groups + ((first + block) * 4 + plane) * PLANE // GROUP * outputs + output)
            weight = _widened(word, group, plane, x, MAGIC, ON_CARD)
            acc = tl.dot(weight, tl.load(right + plane * PLANE, mask=real, other=0.0), acc)
        words += PLANE
        right += 4 * PLANE
    at = out + tl.program_id(2) * rows * outputs + row[None, :] * outputs + output[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["size"])
def add(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """(SPLITS, size) float32, always summed in the same order, into (size,). Grid: (size / BLOCK,)."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = at < size
    total = tl.load(parts + at, mask=real)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * size + at, mask=real)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=real)


@triton.jit
def widen(
    codes,
    groups,
    out,
    outputs,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    PLANE: tl.constexpr,
    MAGIC: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ON_CARD: tl.constexpr,
):
    """The matrix, (outputs, INPUTS). Grid: (outputs / OUTPUTS, INPUTS / PLANE / 4)."""
    block = tl.program_id(1)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    place = tl.arange(0, PLANE)
    word = tl.load(codes + output[:, None] * (INPUTS // 4) + (block * PLANE + place)[None, :])
    for plane in tl.static_range(4):
        start = (block * 4 + plane) * PLANE
        group = tl.load(groups + start // GROUP * outputs + output)
        weight = _widened(word, group, plane, out, MAGIC, ON_CARD)
        tl.store(out + output[:, None] * INPUTS + (start + place)[None, :], weight)
