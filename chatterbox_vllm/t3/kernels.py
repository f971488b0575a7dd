"""The Triton kernel of ``sampler``."""

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
