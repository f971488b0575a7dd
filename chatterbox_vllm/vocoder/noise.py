"""Noise that belongs to a request: any value from (seed, stream, position, channel), in any order.

Upstream draws from the process-wide generator, so a sound depends on what was spoken before it. Here a value is a hash
of where it is used, so neither the batch nor the way an utterance is cut into chunks can change it. It is computed
with integer arithmetic on the device that needs it: nothing is copied and no state is kept.
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

_MASK: Final = (1 << 64) - 1
# SplitMix64 (Steele, Lea, Flood 2014): its increment, and the multipliers and shifts of its finaliser.
_INCREMENT: Final = 0x9E3779B97F4A7C15
_MULTIPLIERS: Final = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS: Final = (30, 27, 31)


class Stream(IntEnum):
    """What a value is for; each has noise of its own."""

    MEL = 1
    PHASE = 2
    SOURCE = 3


def key(seed: int, stream: Stream) -> int:
    """The signed 64-bit number that stands for one stream of one request."""
    return _signed(splitmix64(splitmix64(seed & _MASK) + stream))


def splitmix64(value: int) -> int:
    """SplitMix64's output for the state ``value``: what ``_hash`` computes, for one Python integer."""
    value = (value + _INCREMENT) & _MASK
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        value = ((value ^ (value >> shift)) * multiplier) & _MASK
    return value ^ (value >> _SHIFTS[2])


def normals(keys: Tensor, first: Tensor, count: int, channels: int) -> Tensor:
    """Standard normal values.

    Args:
        keys: (B,) int64, see ``key``.
        first: (B,) int64, the absolute position of each row's first value.
        count: positions per row.
        channels: values per position.

    Returns:
        (B, channels, count) float32. Of one key, a value depends on its position and channel only.
    """
    pairs = (channels + 1) // 2
    high, low = _hash(keys, first, count, pairs)
    radius = high.add_(1).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = low.mul_(2.0**-24 * 2.0 * math.pi)
    # Box and Muller: each hash gives two values.
    return torch.cat([angle.cos().mul_(radius), angle.sin_().mul_(radius)], dim=1)[:, :channels]


def phases(keys: Tensor, harmonics: int) -> Tensor:
    """Where the sine waves of a request start: uniform in [-pi, pi), 0 for the fundamental.

    Args:
        keys: (B,) int64, see ``key``.
        harmonics: overtones besides the fundamental.

    Returns:
        (B, harmonics + 1) float32 radians.
    """
    high, _ = _hash(keys, torch.zeros_like(keys), 1, harmonics + 1)
    angles = high.squeeze(-1).mul_(2.0**-24 * 2.0 * math.pi).sub_(math.pi)
    angles[:, 0] = 0.0
    return angles


def _hash(keys: Tensor, first: Tensor, count: int, lanes: int) -> tuple[Tensor, Tensor]:
    """Two independent floats in {0, 1, ..., 2**24 - 1} per (row, lane, position), as (B, lanes, count) tensors."""
    steps = torch.arange(count, device=keys.device)
    lane = torch.arange(lanes, device=keys.device)
    counter = (first[:, None, None] + steps) * lanes + lane[:, None]
    value = counter.add_(1).mul_(_signed(_INCREMENT)).add_(keys[:, None, None])
    for shift, multiplier in zip(_SHIFTS[:2], _MULTIPLIERS, strict=True):
        value = value.bitwise_xor_(_shifted(value, shift)).mul_(_signed(multiplier))
    value.bitwise_xor_(_shifted(value, _SHIFTS[2]))
    return _shifted(value, 40).float(), ((value >> 8) & 0xFFFFFF).float()


def _shifted(value: Tensor, by: int) -> Tensor:
    """``value >> by`` of the unsigned number; torch's own shift repeats the sign."""
    return (value >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same bits: products in torch wrap around, its constants do not."""
    return value - (1 << 64) if value >> 63 else value
