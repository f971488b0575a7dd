"""What HiFT does between its convolutions, in two Triton kernels.

Launched operation by operation, the sums and sines between HiFT's convolutions take longer than the convolutions. Here
each place between two of them is read once and written once, and the excitation is made where it is needed, noise
included, without the nine waves of each ever being in memory.

Activations are (rows, channels). Utterances lie one after the other with some frames between them, in which everything
is zero. For each frame, ``place`` is its distance from its utterance's start and ``length`` the frames of that: it is
between utterances where ``place`` is not less.
"""

from __future__ import annotations

import triton
import triton.language as tl

_INCREMENT: tl.constexpr = tl.constexpr(0x9E3779B97F4A7C15)
_FIRST: tl.constexpr = tl.constexpr(0xBF58476D1CE4E5B9)
_SECOND: tl.constexpr = tl.constexpr(0x94D049BB133111EB)
_TURN: tl.constexpr = tl.constexpr(6.283185307179586)


@triton.jit
def activate(
    x,
    bias,
    add,
    alpha,
    total,
    active,
    place,
    length,
    count,
    CHANNELS: tl.constexpr,
    RATE: tl.constexpr,
    EXTRA: tl.constexpr,
    MIRROR: tl.constexpr,
    ADD: tl.constexpr,
    KEEP: tl.constexpr,
    SNAKE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """total = x + bias (+ add), zero between the utterances; active = snake(total). Grid: (row tiles,).

    There are RATE rows a frame, ``count`` together. With EXTRA, an utterance has one row more than that. With MIRROR, x
    has not: it comes one row later, its second row mirrored to the left of its first.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    exists = row < count
    frame = row // RATE
    at = tl.load(place + frame, mask=exists, other=1)
    end = tl.load(length + frame, mask=exists, other=0)
    counts = at < end
    on_frame = row == frame * RATE
    if EXTRA:
        counts = counts | ((at == end) & on_frame)
    source = row
    if MIRROR:
        source = tl.where((at == 0) & on_frame, row + 1, row - 1)
    counts = (counts & exists)[:, None]
    here = row[:, None].to(tl.int64) * CHANNELS + channel[None, :]
    there = source[:, None].to(tl.int64) * CHANNELS + channel[None, :]
    value = tl.load(x + there, mask=counts, other=0.0) + tl.load(bias + channel)[None, :]
    if ADD:
        value += tl.load(add + here, mask=counts, other=0.0)
    value = tl.where(counts, value, 0.0)
    if KEEP:
        tl.store(total + here, value, mask=exists[:, None])
    if SNAKE:
        rate_of = tl.load(alpha + channel)[None, :]
        wave = tl.sin(value * rate_of)
        tl.store(active + here, value + wave * wave / (rate_of + 1e-9), mask=exists[:, None])


@triton.jit
def _hash(key, counter):
    """SplitMix64, see ``noise``: unsigned 64-bit numbers."""
    value = (counter + 1) * _INCREMENT + key
    value = (value ^ (value >> 30)) * _FIRST
    value = (value ^ (value >> 27)) * _SECOND
    return value ^ (value >> 31)


@triton.jit
def _normals(key, counter):
    """Two standard normal values, by Box and Muller."""
    value = _hash(key, counter)
    high = (value >> 40).to(tl.float32)
    low = ((value >> 8) & 0xFFFFFF).to(tl.float32)
    radius = tl.sqrt(-2.0 * tl.log((high + 1.0) * 5.9604644775390625e-08))
    angle = low * (5.9604644775390625e-08 * _TURN)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normals(
    keys, first, out, count, LANES: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """``noise.normals``, as (B, count, CHANNELS). Grid: (row tiles, B)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PADDED)
    key = tl.load(keys + tl.program_id(1)).to(tl.uint64)
    start = tl.load(first + tl.program_id(1))
    counter = (start + row)[:, None] * LANES + lane[None, :]
    with_cos, with_sin = _normals(key, counter.to(tl.uint64))
    at = (tl.program_id(1).to(tl.int64) * count + row)[:, None] * CHANNELS + lane[None, :]
    exists = (row < count)[:, None]
    tl.store(out + at, with_cos, mask=exists & (lane < LANES)[None, :])
    tl.store(out + at + LANES, with_sin, mask=exists & (lane + LANES < CHANNELS)[None, :])


@triton.jit
def excite(
    pitch,
    cycles,
    offsets,
    weight,
    bias,
    keys,
    first,
    utterance,
    place,
    length,
    out,
    frames,
    WAVES: tl.constexpr,
    LANES: tl.constexpr,
    SAMPLES: tl.constexpr,
    RATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``Source.forward`` with its noise: one program makes part of one frame's samples. Grid: (parts, frames)."""
    frame = tl.program_id(1)
    within = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = out + frame.to(tl.int64) * SAMPLES + within
    at = tl.load(place + frame)
    if at >= tl.load(length + frame):
        tl.store(here, tl.zeros([BLOCK], tl.float32), mask=within < SAMPLES)
        return
    row = tl.load(utterance + frame)
    hertz = tl.load(pitch + frame)
    loudness = tl.where(hertz > 10.0, 0.003, 0.1 / 3)
    key = tl.load(keys + row).to(tl.uint64)
    position = tl.load(first + row) + at * SAMPLES + within
    merged = tl.zeros([BLOCK], tl.float32) + tl.load(bias)
    for lane in tl.static_range(LANES):
        with_cos, with_sin = _normals(key, (position * LANES + lane).to(tl.uint64))
        merged += tl.load(weight + lane) * loudness * with_cos
        if lane + LANES < WAVES:
            merged += tl.load(weight + lane + LANES) * loudness * with_sin
    if hertz > 10.0:
        for wave in tl.static_range(WAVES):
            step = tl.div_rn(hertz * (wave + 1), RATE).to(tl.float64)
            begun = tl.load(cycles + wave * frames + frame)
            turns = (begun + step * (within + 1).to(tl.float64)).to(tl.float32)
            turns = turns - turns.to(tl.int32).to(tl.float32)
            sine = tl.sin(turns * _TURN + tl.load(offsets + row * WAVES + wave))
            merged += tl.load(weight + wave) * 0.1 * sine
    e = tl.exp(-2.0 * tl.abs(merged))
    level = (1.0 - e) / (1.0 + e)
    tl.store(here, tl.where(merged < 0, -level, level), mask=within < SAMPLES)


@triton.jit
def analyse(
    samples,
    kernels,
    out,
    place,
    length,
    count,
    SAMPLES: tl.constexpr,
    RATE: tl.constexpr,
    FFT: tl.constexpr,
    HOP: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Short-time Fourier transform: (COLUMNS) numbers a row, RATE rows a frame, by ``kernels`` (FFT, COLUMNS).

    Samples are mirrored at both ends of an utterance, which has a row more than RATE a frame. Grid: (row tiles,).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < count
    frame = row // RATE
    at = tl.load(place + frame, mask=exists, other=1)
    end = tl.load(length + frame, mask=exists, other=0)
    inside = exists & (end > 0) & ((at < end) | ((at == end) & (row == frame * RATE)))
    begin = (frame - at).to(tl.int64) * SAMPLES
    last = end * SAMPLES - 1
    column = tl.arange(0, PADDED)
    total = tl.zeros([ROWS, PADDED], tl.float32)
    for tap in tl.static_range(FFT):
        position = tl.abs(at * SAMPLES + (row - frame * RATE) * HOP + tap - FFT // 2)
        position = last - tl.abs(last - position)
        heard = tl.load(samples + begin + position, mask=inside, other=0.0)
        share = tl.load(kernels + tap * COLUMNS + column, mask=column < COLUMNS, other=0.0)
        total += heard[:, None] * share[None, :]
    here = row[:, None].to(tl.int64) * COLUMNS + column[None, :]
    tl.store(out + here, total, mask=exists[:, None] & (column < COLUMNS)[None, :])
