"""How far a stream's sound is from the whole file's."""

from __future__ import annotations

import math
from functools import cache
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.types import SAMPLE_RATE

_FFT: Final = 1920
_HOP: Final = 480
_MELS: Final = 80
_TOP_HERTZ: Final = 8000.0
_FLOOR: Final = 1e-5
_DECIBELS: Final = 20.0 / math.log(10.0)


def streaming_distance(whole: Tensor, streamed: Tensor) -> float:
    """Mean absolute difference of two sounds' log-mel spectrograms, in decibels.

    The spectrogram has the grid of the one S3Gen works on: 80 mels up to 8 kHz, windows of 80 ms every 20 ms,
    magnitudes below 1e-5 taken as 1e-5. With the tiny demo checkpoint and the default ``ChunkSchedule`` it is 2.1 dB,
    and 3.1 dB between two seeds: random weights turn a slightly different pitch into a different sound.

    Args:
        whole, streamed: (n,) float32 samples at 24 kHz, equally many.

    Raises:
        ValueError: the lengths differ, or there is less than one window.
    """
    if whole.shape != streamed.shape or whole.ndim != 1 or len(whole) < _FFT:
        raise ValueError(f"sounds of one length, at least {_FFT} samples, are needed")
    return float((log_mel(whole) - log_mel(streamed)).abs().mean())


def mel_distance(whole: Tensor, streamed: Tensor) -> float:
    """The same for what the flow gives: two (frames, 80) mels in natural logarithms, such as ``Utterance.mel``.

    With the tiny demo checkpoint and the default ``ChunkSchedule`` it is 0.6 dB, and 13.5 dB between two seeds.
    """
    return float((whole - streamed).abs().mean()) * _DECIBELS


def log_mel(samples: Tensor) -> Tensor:
    """(n,) float32 samples at 24 kHz to (80, 1 + n // 480) decibels."""
    window = torch.hann_window(_FFT, device=samples.device)
    spectrum = torch.stft(samples, _FFT, _HOP, window=window, return_complex=True).abs()
    return (_filters().to(samples.device) @ spectrum).clamp(min=_FLOOR).log() * _DECIBELS


@cache
def _filters() -> Tensor:
    """(80, 961) triangles, evenly spaced on the mel scale 2595 log10(1 + f / 700), each of unit area in hertz."""
    top = 2595.0 * math.log10(1.0 + _TOP_HERTZ / 700.0)
    corners = 700.0 * (10.0 ** (torch.linspace(0.0, top, _MELS + 2) / 2595.0) - 1.0)
    hertz = torch.linspace(0.0, SAMPLE_RATE / 2, _FFT // 2 + 1)
    low, centre, high = (corners[start : start + _MELS, None] for start in range(3))
    triangles = torch.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)).clamp(min=0.0)
    return triangles * (2.0 / (high - low))
