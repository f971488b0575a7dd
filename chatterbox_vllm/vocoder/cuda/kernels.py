"""The estimator's arithmetic for CUDA cards, in five Triton kernels.

The estimator is narrow (256 channels) and deep (56 transformer blocks, ten times, twice), so layer by layer it waits
for memory and for the host. A row of it fits a tile, so whatever concerns one row alone, norms included, is done where
the row is at hand: a transformer block is five launches (projections; attention; output and norm; up; down and the next
norm), a resnet two.

Rows are packed: sequences lie one after another, of any lengths, without padding between them. ``place`` says how far
into its sequence a row is, which is all that a causal convolution has to know, and ``tiles`` says which rows attend to
which. Tiles without a row in use, of which there are ``used``, are not computed: so a kernel launched for many rows, in
a CUDA graph, costs what the rows in use cost. In a tile with some, the other rows are computed from whatever they hold;
no row in use depends on them. Every buffer's rows are a multiple of a tile's.

Where kernels overlap, what does not depend on the kernel before is loaded before that is waited for: tables, which were
written before the graph began, biases, and in ``matmul`` for few rows the weights. (Decoded weights are written by a
kernel, but never by the one just before; see ``_wait``.)

Matrices are (inputs, outputs), contiguous, in half precision, as are the activations between kernels; the residual
stream, norms, biases and sums are float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _wait(OVERLAP: tl.constexpr):
    """Waits for the kernel before, which this one was launched beside, and lets the next one be launched.

    So a kernel begins when all of the one before have waited: only that one can still be running.
    """
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
    """The exact one, x times the normal distribution function of x, off by 3e-6 at most.

    That function's logit is a smooth odd function; this polynomial is fitted to it, in powers of 2. A reciprocal square
    root, squared, is half the instructions of a division.
    """
    s = x * x
    logit = x * (2.30204539 + s * (0.105226681 + s * (-0.000360269926 + s * (-0.0000882391109 + s * 0.00000322904818))))
    root = tl.rsqrt(1.0 + tl.exp2(-logit))
    return x * (root * root)


@triton.jit
def _normed(x, weight, bias, WIDTH: tl.constexpr):
    """Layer norm of (rows, WIDTH) float32."""
    channel = tl.arange(0, WIDTH)
    mean = tl.sum(x, 1) / WIDTH
    x = x - mean[:, None]
    scale = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + 1e-5)
    return x * scale[:, None] * tl.load(weight + channel)[None, :] + tl.load(bias + channel)[None, :]


@triton.jit
def _add_product(acc, left, right, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, DEPTH: tl.constexpr):
    """``acc`` plus rows (M, INPUTS) times columns of a matrix (INPUTS, OUTPUTS), DEPTH inputs at a time.

    Args:
        left: (M, DEPTH) pointers to the rows' first piece.
        right: (DEPTH, N) pointers to the columns' first piece.
    """
    tl.static_assert(INPUTS % DEPTH == 0)
    for start in range(0, INPUTS, DEPTH):
        acc = tl.dot(tl.load(left + start), tl.load(right + start * OUTPUTS), acc)
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
    """out = x matrix; with GELU, out = gelu(x matrix + bias). Grid: (column tiles, row tiles).

    With a DEPTH of all INPUTS, the weights are loaded before the kernel before is waited for.
    """
    first = tl.program_id(1) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = x + first.to(tl.int64) * INPUTS + row[:, None] * INPUTS + depth[None, :]
    right = matrix + depth[:, None] * OUTPUTS + column[None, :]
    count = tl.load(used)
    if GELU:
        shift = tl.load(bias + column)
    if DEPTH == INPUTS:
        weights = tl.load(right)
    _wait(OVERLAP)
    if first >= count:
        return
    if DEPTH == INPUTS:
        acc = tl.dot(tl.load(left), weights)
    else:
        acc = _add_product(tl.zeros([ROWS, COLUMNS], tl.float32), left, right, INPUTS, OUTPUTS, DEPTH)
    if GELU:
        acc = _gelu(acc + shift[None, :])
    at = out + first.to(tl.int64) * OUTPUTS + row[:, None] * OUTPUTS + column[None, :]
    tl.store(at, acc.to(out.dtype.element_ty))


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
    """Softmax attention within sequences; ``scale`` is that of the scores times log2(e). Grid: (heads, tiles).

    ``qkv`` is (M, 3 INNER): queries, keys, values, each head's DIM together.
    """
    tile = tiles + 3 * tl.program_id(1)
    first, begin, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    _wait(OVERLAP)
    if begin >= end:
        return
    stride: tl.constexpr = 3 * INNER
    row, key, dim = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, DIM)
    head = tl.program_id(0) * DIM
    inside = row < end - first
    at = qkv + first.to(tl.int64) * stride + head + row[:, None] * stride + dim[None, :]
    query = tl.load(at, mask=inside[:, None], other=0.0)
    sequence = qkv + begin.to(tl.int64) * stride + head
    keys = sequence + INNER + key[None, :] * stride + dim[:, None]
    values = sequence + 2 * INNER + key[:, None] * stride + dim[None, :]
    highest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    heard = tl.zeros([ROWS, DIM], tl.float32)
    length = end - begin
    whole = length // KEYS * KEYS
    for start in range(0, whole, KEYS):
        scores = tl.dot(query, tl.load(keys + start * stride))
        shares, kept, highest, total = _shares(scores, highest, total, scale)
        value = tl.load(values + start * stride)
        heard = tl.dot(shares.to(value.dtype), value, heard * kept[:, None])
    if whole < length:
        exists = key < length - whole
        scores = tl.dot(query, tl.load(keys + whole * stride, mask=exists[None, :], other=0.0))
        scores = tl.where(exists[None, :], scores, -float("inf"))
        shares, kept, highest, total = _shares(scores, highest, total, scale)
        value = tl.load(values + whole * stride, mask=exists[:, None], other=0.0)
        heard = tl.dot(shares.to(value.dtype), value, heard * kept[:, None])
    heard = heard / total[:, None]
    at = out + first.to(tl.int64) * INNER + head + row[:, None] * INNER + dim[None, :]
    tl.store(at, heard.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _finish(acc, out, half, norm_weight, norm_bias, at, WIDTH: tl.constexpr, KEEP: tl.constexpr, NORM: tl.constexpr):
    """Stores rows: as they are (KEEP) and in half precision, normed for what comes next (NORM) or not."""
    if KEEP:
        tl.store(out + at, acc)
    if NORM:
        acc = _normed(acc, norm_weight, norm_bias, WIDTH)
    tl.store(half + at, acc.to(half.dtype.element_ty))


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
    first = tl.program_id(0) * ROWS
    row, channel, depth = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, DEPTH)
    left = source + first.to(tl.int64) * INPUTS + row[:, None] * INPUTS + depth[None, :]
    right = matrix + depth[:, None] * WIDTH + channel[None, :]
    count = tl.load(used)
    _wait(OVERLAP)
    if first >= count:
        return
    acc = _add_product(tl.zeros([ROWS, WIDTH], tl.float32), left, right, INPUTS, WIDTH, DEPTH)
    at = first.to(tl.int64) * WIDTH + (row[:, None] * WIDTH + channel[None, :])
    acc += tl.load(x + at) + tl.load(bias + channel)[None, :]
    _finish(acc, x, half, norm_weight, norm_bias, at, WIDTH, True, NORM)


@triton.jit
def _taps(
    acc,
    left,
    right,
    place,
    WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    ALL: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``acc`` plus the causal convolution of WIDTH channels, which are some of the matrix's ALL inputs at each tap.

    Args:
        left, right: as those of ``_add_product``, for the current rows and the first tap.
        place: (M,), the rows'.
    """
    tl.static_assert(WIDTH % DEPTH == 0)
    pieces: tl.constexpr = WIDTH // DEPTH
    for piece in range(3 * pieces):
        tap = piece // pieces
        start = (piece - tap * pieces) * DEPTH
        there = (place >= 2 - tap)[:, None]
        part = tl.load(left + ((tap - 2) * WIDTH + start), mask=there, other=0.0)
        acc = tl.dot(part, tl.load(right + (tap * ALL + start) * OUTPUTS), acc)
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
    first = tl.program_id(0) * ROWS
    row, output, depth = tl.arange(0, ROWS), tl.arange(0, OUTPUTS), tl.arange(0, DEPTH)
    begin = first.to(tl.int64)
    right = depth[:, None] * OUTPUTS + output[None, :]
    count = tl.load(used)
    position = tl.load(place + first + row)
    _wait(OVERLAP)
    if first >= count:
        return
    acc = tl.zeros([ROWS, OUTPUTS], tl.float32)
    left = source + begin * WIDTH + row[:, None] * WIDTH + depth[None, :]
    acc = _taps(acc, left, matrix + right, position, WIDTH, OUTPUTS, WIDTH + SECOND, DEPTH)
    if SECOND:
        left = second + begin * SECOND + row[:, None] * SECOND + depth[None, :]
        acc = _taps(acc, left, matrix + WIDTH * OUTPUTS + right, position, SECOND, OUTPUTS, WIDTH + SECOND, DEPTH)
    acc += tl.load(bias + output)[None, :]
    if ACTIVATE:
        acc = _mish(_normed(acc, norm_weight, norm_bias, OUTPUTS))
    if SHIFT:
        acc += tl.load(shift + output)[None, :]
    if SKIP:
        acc += tl.load(skip_bias + output)[None, :]
        left = skip + begin * SKIP + row[:, None] * SKIP + depth[None, :]
        acc = _add_product(acc, left, skip_matrix + right, SKIP, OUTPUTS, DEPTH)
        if SKIP_SECOND:
            left = skip_second + begin * SKIP_SECOND + row[:, None] * SKIP_SECOND + depth[None, :]
            acc = _add_product(acc, left, skip_matrix + SKIP * OUTPUTS + right, SKIP_SECOND, OUTPUTS, DEPTH)
    at = begin * OUTPUTS + (row[:, None] * OUTPUTS + output[None, :])
    _finish(acc, out, half, next_weight, next_bias, at, OUTPUTS, KEEP, NORM)


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
    first = tl.program_id(0) * ROWS
    count = tl.load(frames)
    _wait(OVERLAP)
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
