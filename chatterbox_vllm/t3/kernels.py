"""The Triton kernels of ``sampler`` and ``attention``."""

# Triton's language has no types.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from vllm.triton_utils import tl, triton
from vllm.v1.worker.gpu.sample.gumbel import gumbel_noised_argmax


@triton.jit
def draw(
    logits,
    stride,
    rows,
    position,
    repetition,
    prompt,
    prompt_stride,
    counts,
    counts_stride,
    temperature,
    min_p,
    seeds,
    stops,
    shortest,
    out,
    COUNT: tl.constexpr,
    SILENT: tl.constexpr,
    STOP: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Draws one of the first COUNT ids, but not SILENT, for each row. Grid: (N,).

    ``rows`` says where a request's parameters are; ``prompt``, a bit an id, and ``counts`` say which ids it has seen.
    Where there are ``stops``, STOP may not be drawn before ``shortest`` positions.
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + token)
    place = tl.load(position + token)
    id = tl.arange(0, SIZE)
    real = (id < COUNT) & (id != SILENT)
    if (tl.load(stops + row) > 0) & (place + 1 < tl.load(shortest + row)):
        real = real & (id != STOP)
    value = tl.load(logits + token * stride + id, mask=real, other=-float("inf")).to(tl.float32)
    bits = tl.load(prompt + row * prompt_stride + id // 32, mask=real, other=0)
    seen = ((bits >> (id % 32)) & 1) != 0
    seen = seen | (tl.load(counts + row * counts_stride + id, mask=real, other=0) > 0)
    scale = tl.where(seen, tl.load(repetition + row), 1.0)
    value *= tl.where(value > 0, 1.0 / scale, scale)
    heat = tl.load(temperature + row).to(tl.float32)
    if heat != 0.0:
        value = value / heat
    least = tl.load(min_p + row).to(tl.float32)
    if least != 0.0:
        value = tl.where(value < tl.max(value) + tl.log(least), -float("inf"), value)
    seed = tl.load(seeds + row)
    _, drawn = gumbel_noised_argmax(
        value, id, real, seed, place, heat, IS_DRAFTING=False, USE_FP64=False, APPLY_TEMPERATURE=False
    )
    tl.store(out + token, drawn.to(tl.int64))


@triton.jit
def decode(
    query,
    query_stride,
    key,
    key_stride,
    value,
    value_stride,
    out,
    out_stride,
    cache,
    page_stride,
    head_stride,
    token_stride,
    lengths,
    pages,
    pages_stride,
    scale,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of one new token a request to itself and to all before it, and its key and value into the cache.

    Grid: (heads, requests), so that the heads of a position, which lie side by side, are read together. A request's
    positions are in ``pages`` of PAGE; in the ``cache`` a head's value of WIDTH lies behind its key. ``lengths`` count
    the new token; requests that fill up a CUDA graph have 0, and only their rows of ``out`` are written.

    A tile is loaded while the one before it is computed, and the page of the one after it looked up: a program has too
    few threads to hide what each of the two takes. Each row of a tile keeps its own maximum and its own sums, which are
    added up once, at the end: so the loop has no sum but that of the products of queries and keys.
    """
    head = tl.program_id(0)
    request = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, WIDTH)
    row = tl.arange(0, TILE)
    length = tl.load(lengths + request)
    last = tl.maximum(length - 1, 0)
    cache += head * head_stride
    pages += request * pages_stride

    there = row < last
    page = tl.load(pages + row // PAGE, mask=there, other=0).to(tl.int64)
    old = cache + (page * page_stride + (row % PAGE) * token_stride)[:, None] + place[None, :]
    keys = tl.load(old, mask=there[:, None], other=0.0)
    values = tl.load(old + WIDTH, mask=there[:, None], other=0.0)
    page = tl.load(pages + (row + TILE) // PAGE, mask=row + TILE < last, other=0).to(tl.int64)

    at = head * WIDTH + place
    new_key = tl.load(key + request * key_stride + at)
    new_value = tl.load(value + request * value_stride + at)
    asked = tl.load(query + request * query_stride + at).to(tl.float32) * scale
    own_page = tl.load(pages + last // PAGE).to(tl.int64)
    mine = cache + own_page * page_stride + (last % PAGE) * token_stride + place
    tl.store(mine, new_key, mask=length > 0)
    tl.store(mine + WIDTH, new_value, mask=length > 0)

    first = row == 0
    most = tl.where(first, tl.sum(asked * new_key.to(tl.float32)), -1e30)
    total = tl.where(first, 1.0, 0.0)
    mixed = tl.where(first[:, None], new_value.to(tl.float32)[None, :], 0.0)
    for start in tl.range(0, last, TILE, num_stages=1):
        position = start + row
        after = position + TILE
        old = cache + (page * page_stride + (after % PAGE) * token_stride)[:, None] + place[None, :]
        next_keys = tl.load(old, mask=(after < last)[:, None], other=0.0)
        next_values = tl.load(old + WIDTH, mask=(after < last)[:, None], other=0.0)
        page = tl.load(pages + (after + TILE) // PAGE, mask=after + TILE < last, other=0).to(tl.int64)

        there = position < last
        score = tl.where(there, tl.sum(keys.to(tl.float32) * asked[None, :], 1), -1e30)
        higher = tl.maximum(most, score)
        kept = tl.exp2(most - higher)
        part = tl.where(there, tl.exp2(score - higher), 0.0)
        total = total * kept + part
        mixed = mixed * kept[:, None] + part[:, None] * values.to(tl.float32)
        most = higher
        keys = next_keys
        values = next_values
    share = tl.exp2(most - tl.max(most))
    result = tl.sum(mixed * share[:, None], 0) / tl.sum(total * share)
    tl.store(out + request * out_stride + at, result.to(out.dtype.element_ty))
