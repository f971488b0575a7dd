"""The few functions of torchaudio that chatterbox and Perth call, for machines that have no torchaudio.

Same results as torchaudio 2.11: ``Resample`` and ``fbank`` mirror ``torchaudio.transforms.Resample`` (its
default, the Hann-windowed sinc) and ``torchaudio.compliance.kaldi.fbank`` (its defaults); the three spectrogram
classes mirror the constructors Perth uses. Arguments nobody passes are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ZERO_CROSSINGS: Final = 6
_ROLLOFF: Final = 0.99


class Resample(nn.Module):
    """Changes the rate of (..., time) float32 audio from ``orig_freq`` to ``new_freq``, both in Hz."""

    kernel: Tensor

    def __init__(self, orig_freq: int = 16000, new_freq: int = 16000) -> None:
        super().__init__()
        divisor = math.gcd(orig_freq, new_freq)
        self.orig, self.new = orig_freq // divisor, new_freq // divisor
        if self.orig != self.new:
            kernel, self.width = _sinc_kernel(self.orig, self.new)
            self.register_buffer("kernel", kernel)

    def forward(self, waveform: Tensor) -> Tensor:
        if self.orig == self.new:
            return waveform
        length = waveform.shape[-1]
        flat = F.pad(waveform.reshape(-1, 1, length), (self.width, self.width + self.orig))
        phases = F.conv1d(flat, self.kernel, stride=self.orig)  # (waves, new, steps): one row a phase
        samples = phases.transpose(1, 2).reshape(flat.shape[0], -1)
        return samples[:, : -(-self.new * length // self.orig)].reshape(*waveform.shape[:-1], -1)


def _sinc_kernel(orig: int, new: int) -> tuple[Tensor, int]:
    """One low-pass filter for each of ``new`` phases: ((new, 1, taps) float32, the taps before the centre)."""
    cutoff = min(orig, new) * _ROLLOFF
    width = math.ceil(_ZERO_CROSSINGS * orig / cutoff)
    taps = torch.arange(-width, width + orig, dtype=torch.float64)[None, None] / orig
    # torchaudio leaves the phases in the default dtype; so the last digit is the same only if this does too.
    time = torch.arange(0, -new, -1)[:, None, None] / new + taps
    time = (time * cutoff).clamp_(-_ZERO_CROSSINGS, _ZERO_CROSSINGS)
    window = torch.cos(time * math.pi / _ZERO_CROSSINGS / 2) ** 2
    time = time * math.pi
    sinc = torch.where(time == 0, torch.ones_like(time), time.sin() / time)
    return (sinc * window * (cutoff / orig)).float(), width


def fbank(waveform: Tensor, num_mel_bins: int = 23, sample_frequency: float = 16000.0) -> Tensor:
    """Kaldi's log-mel filter bank of (1, n) audio: (frames, num_mel_bins), 25 ms Povey windows every 10 ms."""
    size, shift = int(sample_frequency * 0.025), int(sample_frequency * 0.010)
    padded = 1 << (size - 1).bit_length()
    frames = waveform[0].unfold(0, size, shift)
    frames = frames - frames.mean(dim=1, keepdim=True)
    previous = F.pad(frames[None], (1, 0), mode="replicate")[0, :, :-1]
    window = torch.hann_window(size, periodic=False, device=frames.device, dtype=frames.dtype).pow(0.85)
    power = torch.fft.rfft(F.pad((frames - 0.97 * previous) * window, (0, padded - size))).abs().pow(2.0)
    mel: Tensor = power @ _mel_banks(num_mel_bins, padded, sample_frequency).to(power)
    return mel.clamp(min=torch.finfo(torch.float32).eps).log()


@cache
def _mel_banks(bins: int, size: int, rate: float) -> Tensor:
    """Triangles equally spaced in mels from 20 Hz to half the rate, as (size // 2 + 1, bins)."""
    low, high = (1127.0 * math.log(1.0 + hertz / 700.0) for hertz in (20.0, 0.5 * rate))
    step = (high - low) / (bins + 1)
    left = low + torch.arange(bins)[:, None] * step
    centre, right = (low + (torch.arange(bins)[:, None] + k) * step for k in (1.0, 2.0))
    mel = (1127.0 * (1.0 + rate / size * torch.arange(size / 2) / 700.0).log())[None]
    triangles = torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
    return F.pad(triangles.clamp(min=0.0), (0, 1)).T.contiguous()


Window = Callable[[int], Tensor]


class Spectrogram(nn.Module):
    """(..., time) float32 -> (..., n_fft // 2 + 1, frames) complex64."""

    window: Tensor

    def __init__(
        self, n_fft: int, win_length: int, hop_length: int, window_fn: Window, power: None, normalized: bool
    ) -> None:
        super().__init__()
        if power is not None or normalized:
            raise ValueError("this stand-in computes only complex, unnormalised spectrograms; install torchaudio")
        self.sizes = (n_fft, hop_length, win_length)
        self.register_buffer("window", window_fn(win_length))

    def forward(self, waveform: Tensor) -> Tensor:
        return torch.stft(waveform, *self.sizes, window=self.window, center=True, return_complex=True)


class InverseSpectrogram(nn.Module):
    """(frequencies, frames) complex64 -> (time,) float32, the inverse of ``Spectrogram``."""

    window: Tensor

    def __init__(self, n_fft: int, win_length: int, hop_length: int, window_fn: Window, normalized: bool) -> None:
        super().__init__()
        if normalized:
            raise ValueError("this stand-in inverts only unnormalised spectrograms; install torchaudio")
        self.sizes = (n_fft, hop_length, win_length)
        self.register_buffer("window", window_fn(win_length))

    def forward(self, spectrogram: Tensor) -> Tensor:
        return torch.istft(spectrogram, *self.sizes, window=self.window, center=True)


class TimeStretch(nn.Module):
    """Only the buffer that Perth's checkpoint has a key for; Perth stretches nothing when it marks or reads."""

    def __init__(self, n_freq: int, hop_length: int) -> None:
        super().__init__()
        self.register_buffer("phase_advance", torch.linspace(0, math.pi * hop_length, n_freq)[..., None])


torchaudio: Final = SimpleNamespace(
    transforms=SimpleNamespace(
        Resample=Resample,
        Spectrogram=Spectrogram,
        InverseSpectrogram=InverseSpectrogram,
        TimeStretch=TimeStretch,
    ),
    compliance=SimpleNamespace(kaldi=SimpleNamespace(fbank=fbank)),
)
