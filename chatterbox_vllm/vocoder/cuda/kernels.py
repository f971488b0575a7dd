"""The estimator's arithmetic for CUDA cards, in five Triton kernels.

The estimator is narrow (256 channels) and deep (56 transformer blocks, ten times, twice), so layer by layer it waits
for memory and for the host. A row of it fits a tile, so whatever concerns one row alone, norms included, is done where
the row is at hand: a transformer block is five launches (projections; attention; output and norm; up; down and the next
norm), a resnet two.

Rows are packed: sequences lie one after another, of any lengths, without padding between them. ``place`` says how far
into its sequence a row is, which is all that a causal convolution has to know, and ``tiles`` says which rows attend to
which. Rows past ``used`` are not computed: so a kernel launched for many rows, in a CUDA graph, costs what the rows in
use cost.

Matrices are (inputs, outputs), contiguous, in half precision, as are the activations between kernels; the residual
stream, norms, biases and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _begin(OVERLAP: tl.constexpr):
    """Waits for the kernel before, which this one was launched beside, and lets the next one be launched."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _mish(x):
    """x tanh(log(1 + e^x)), with the logarithm and tanh's exponential cancelled."""
    e = tl.exp(tl.minimum(x, 20.0))
    n = e * (e + 2.0)
    return tl.where(x > 20.0, x, x * n / (n + 2.0))


@triton.jit
def _gelu(x):
    """The exact one: erf by Abramowitz and Stegun 7.1.28, off by 3e-7, for a third of the instructions."""
    z = tl.abs(x) * 0.7071067811865476
    p = 1.0 + z * (
        0.0705230784
        + z * (0.0422820123 + z * (0.0092705272 + z * (0.0001520143 + z * (0.0002765672 + z * 0.0000430638))))
    )
    p = p * p
    p = p * p
    p = p * p
    p = p * p
    erf = 1.0 - 1.0 / p
    return 0.5 * (x + tl.abs(x) * erf)


@triton.jit
def _normed(x, weight, bias, WIDTH: tl.constexpr):
    """Layer norm of (rows, WIDTH) float32."""
    channel = tl.arange(0, WIDTH)
    mean = tl.sum(x, 1) / WIDTH
    x = x - mean[:, None]
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + 1e-5)
    return x * scale[:, None] * tl.load(weight + channel)[None, :] + tl.load(bias + channel)[None, :]


@triton.jit
def _add_product(
    acc,
    source,
    matrix,
    row,
    column,
    inside,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``acc`` plus some columns of the product of some rows of ``source``, (M, INPUTS), and rows FIRST.. of the matrix.

    Rows that are not ``inside`` count as zeros.
    """
    depth = tl.arange(0, DEPTH)
    left = source + row[:, None].to(tl.int64) * INPUTS + depth[None, :]
    right = matrix + (FIRST + depth)[:, None] * OUTPUTS + column[None, :]
    for start in range(0, INPUTS, DEPTH):
        part = tl.load(left + start, mask=inside[:, None], other=0.0)
        acc = tl.dot(part, tl.load(right + start * OUTPUTS), acc)
    return acc


@triton.jit
def matmul(
    x,
    matrix,
    bias,
    out,
    used,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    GELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out = x matrix; with GELU, out = gelu(x matrix + bias). Grid: (column tiles, row tiles)."""
    _begin(OVERLAP)
    first = tl.program_id(1) * ROWS
    count = tl.load(used)
    if first >= count:
        return
    row = first + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < count
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc = _add_product(acc, x, matrix, row, column, inside, INPUTS, OUTPUTS, 0, DEPTH)
    if GELU:
        acc = _gelu(acc + tl.load(bias + column)[None, :])
    at = out + row[:, None].to(tl.int64) * OUTPUTS + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _shares(scores, highest, total, scale):
    """One step of a softmax over keys that come in pieces.

    Returns:
        The piece's exponentials, by what the sums so far shrink, the highest score and the total up to here.
    """
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    shares = tl.exp2(scores * scale - new[:, None])
    kept = tl.exp2(highest - new)
    return shares, kept, new, total * kept + tl.sum(shares, 1)


@triton.jit
def attention(
    qkv,
    out,
    tiles,
    scale,
    INNER: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Softmax attention within sequences; ``scale`` is that of the scores times log2(e). Grid: (tiles, heads).

    ``qkv`` is (M, 3 INNER): queries, keys, values, each head's DIM together.
    """
    _begin(OVERLAP)
    first = tl.load(tiles + 3 * tl.program_id(0))
    begin = tl.load(tiles + 3 * tl.program_id(0) + 1)
    end = tl.load(tiles + 3 * tl.program_id(0) + 2)
    if begin >= end:
        return
    head = tl.program_id(1) * DIM
    row = first + tl.arange(0, ROWS)
    dim = tl.arange(0, DIM)
    inside = row < end
    base = qkv + head
    query = tl.load(base + row[:, None].to(tl.int64) * (3 * INNER) + dim[None, :], mask=inside[:, None], other=0.0)
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    heard = tl.zeros([ROWS, DIM], tl.float32)
    whole = begin + (end - begin) // KEYS * KEYS
    for start in range(begin, whole, KEYS):
        key_row = (start + tl.arange(0, KEYS)).to(tl.int64) * (3 * INNER)
        scores = tl.dot(query, tl.load(base + INNER + key_row[None, :] + dim[:, None]))
        shares, kept, highest, total = _shares(scores, highest, total, scale)
        value = tl.load(base + 2 * INNER + key_row[:, None] + dim[None, :])
        heard = tl.dot(shares.to(value.dtype), value, heard * kept[:, None])
    if whole < end:
        key_row = whole + tl.arange(0, KEYS)
        exists = key_row < end
        key_row = key_row.to(tl.int64) * (3 * INNER)
        key = tl.load(base + INNER + key_row[None, :] + dim[:, None], mask=exists[None, :], other=0.0)
        scores = tl.where(exists[None, :], tl.dot(query, key), -float("inf"))
        shares, kept, highest, total = _shares(scores, highest, total, scale)
        value = tl.load(base + 2 * INNER + key_row[:, None] + dim[None, :], mask=exists[:, None], other=0.0)
        heard = tl.dot(shares.to(value.dtype), value, heard * kept[:, None])
    heard = heard / total[:, None]
    at = out + row[:, None].to(tl.int64) * INNER + head + dim[None, :]
    tl.store(at, heard.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _finish(
    acc, out, half, norm_weight, norm_bias, row, inside, WIDTH: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr
):
    """Stores rows: as they are (KEEP) and in half precision, normed for what comes next (NORM) or not."""
    at = row[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
    if KEEP:
        tl.store(out + at, acc, mask=inside[:, None])
    if NORM:
        acc = _normed(acc, norm_weight, norm_bias, WIDTH)
    tl.store(half + at, acc.to(half.dtype.element_ty), mask=inside[:, None])


@triton.jit
def add_linear(
    x,
    source,
    matrix,
    bias,
    norm_weight,
    norm_bias,
    half,
    used,
    INPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """x += source matrix + bias; half = norm(x), or x. Grid: (row tiles,)."""
    _begin(OVERLAP)
    first = tl.program_id(0) * ROWS
    count = tl.load(used)
    if first >= count:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < count
    channel = tl.arange(0, WIDTH)
    acc = tl.zeros([ROWS, WIDTH], tl.float32)
    acc = _add_product(acc, source, matrix, row, channel, inside, INPUTS, WIDTH, 0, DEPTH)
    at = row[:, None].to(tl.int64) * WIDTH + channel[None, :]
    acc += tl.load(x + at, mask=inside[:, None], other=0.0) + tl.load(bias + channel)[None, :]
    _finish(acc, x, half, norm_weight, norm_bias, row, inside, WIDTH, True, NORM)


@triton.jit
def _taps(
    acc,
    source,
    matrix,
    row,
    place,
    inside,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FIRST: tl.constexpr,
    ALL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Adds the causal convolution of ``source``'s WIDTH channels, which are FIRST.. of the matrix's ALL inputs."""
    output = tl.arange(0, OUTPUTS)
    for tap in tl.static_range(3):
        there = inside & (place >= 2 - tap)
        acc = _add_product(
            acc, source, matrix, row - (2 - tap), output, there, WIDTH, OUTPUTS, tap * ALL + FIRST, DEPTH
        )
    return acc


@triton.jit
def convolution(
    source,
    second,
    matrix,
    bias,
    norm_weight,
    norm_bias,
    shift,
    skip,
    skip_second,
    skip_matrix,
    skip_bias,
    out,
    half,
    next_weight,
    next_bias,
    place,
    used,
    WIDTH: tl.constexpr,
    SECOND: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ACTIVATE: tl.constexpr,
    SHIFT: tl.constexpr,
    SKIP: tl.constexpr,
    SKIP_SECOND: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A causal convolution of three taps over one or two sources side by side. Grid: (row tiles,).

    With ACTIVATE, mish(norm(.)) of it; with SHIFT, plus a row; with SKIP, plus the product of the skipped channels.
    """
    _begin(OVERLAP)
    first = tl.program_id(0) * ROWS
    count = tl.load(used)
    if first >= count:
        return
    row = first + tl.arange(0, ROWS)
    inside = row < count
    output = tl.arange(0, OUTPUTS)
    position = tl.load(place + row, mask=inside, other=0)
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    acc = _taps(acc, source, matrix, row, position, inside, WIDTH, OUTPUTS, 0, WIDTH + SECOND, DEPTH)
    if SECOND:
        acc = _taps(acc, second, matrix, row, position, inside, SECOND, OUTPUTS, WIDTH, WIDTH + SECOND, DEPTH)
    acc += tl.load(bias + output)[None, :]
    if ACTIVATE:
        acc = _mish(_normed(acc, norm_weight, norm_bias, OUTPUTS))
    if SHIFT:
        acc += tl.load(shift + output)[None, :]
    if SKIP:
        acc += tl.load(skip_bias + output)[None, :]
        acc = _add_product(acc, skip, skip_matrix, row, output, inside, SKIP, OUTPUTS, 0, DEPTH)
        if SKIP_SECOND:
            acc = _add_product(acc, skip_second, skip_matrix, row, output, inside, SKIP_SECOND, OUTPUTS, SKIP, DEPTH)
    _finish(acc, out, half, next_weight, next_bias, row, inside, OUTPUTS, KEEP, NORM)


@triton.jit
def euler(
    hidden,
    matrix,
    bias,
    mel,
    inputs,
    rows,
    frames,
    length,
    guidance,
    WIDTH: tl.constexpr,
    MELS: tl.constexpr,
    MELS_PADDED: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One guided Euler step: mel += length ((1 + g) v(guided row) - g v(free row)); also into both rows' inputs.

    ``rows`` (F, 2) int32 says where a frame's two rows are; ``frames`` (1,) int32 how many frames are in use, and
    ``length`` (1,) float32 is the step's.
    """
    _begin(OVERLAP)
    first = tl.program_id(0) * ROWS
    count = tl.load(frames)
    if first >= count:
        return
    frame = first + tl.arange(0, ROWS)
    inside = frame < count
    channel = tl.arange(0, WIDTH)
    bin = tl.arange(0, MELS_PADDED)
    real = bin < MELS
    guided = tl.load(rows + 2 * frame, mask=inside, other=0).to(tl.int64)[:, None]
    free = tl.load(rows + 2 * frame + 1, mask=inside, other=0).to(tl.int64)[:, None]
    weight = tl.load(matrix + channel[:, None] * MELS + bin[None, :], mask=real[None, :], other=0.0)
    with_text = tl.dot(tl.load(hidden + guided * WIDTH + channel[None, :], mask=inside[:, None], other=0.0), weight)
    without = tl.dot(tl.load(hidden + free * WIDTH + channel[None, :], mask=inside[:, None], other=0.0), weight)
    velocity = (1.0 + guidance) * with_text - guidance * without + tl.load(bias + bin, mask=real, other=0.0)[None, :]
    both = inside[:, None] & real[None, :]
    at = mel + frame[:, None].to(tl.int64) * MELS + bin[None, :]
    moved = tl.load(at, mask=both, other=0.0) + tl.load(length) * velocity
    tl.store(at, moved, mask=both)
    tl.store(inputs + guided * INPUTS + bin[None, :], moved.to(inputs.dtype.element_ty), mask=both)
    tl.store(inputs + free * INPUTS + bin[None, :], moved.to(inputs.dtype.element_ty), mask=both)
