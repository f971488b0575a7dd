"""From a mel spectrogram to samples: a harmonic source, filtered by a network that writes a spectrum.

Mirrors ``chatterbox.models.s3gen.hifigan.HiFTGenerator``. Its convolutions see both ways, so in a batch every layer's
padding is cleared and the source is mirrored at the end of each row; the two Fourier transforms, 16 samples long, are
convolutions, in float64: those of float32 are rounded to TF32 by cuDNN, which upstream's cuFFT never does. The noise's
keys, phase offsets and the phases reached so far are arguments, so any stretch of an utterance gives the samples it has
in the whole, except within ``REACH`` frames of where it was cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.vocoder import noise, teams
from chatterbox_vllm.vocoder.batching import is_ragged
from chatterbox_vllm.vocoder.edges import Edges
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES, PITCH_REACH, PitchPredictor, Source, cycles_at_frames
from chatterbox_vllm.vocoder.transfer import to_device

DECODER_REACH: Final = 15
"""Frames on either side on which a frame's samples depend, given the source (14.2) and the mel (13.1)."""
REACH: Final = DECODER_REACH + PITCH_REACH
"""The same, given the mel alone."""
UPSAMPLING: Final = (8, 5, 3)
_DILATIONS: Final = (1, 3, 5)
FFT: Final = 16
HOP: Final = 4
BINS: Final = FFT // 2 + 1
SPECTRA: Final = FRAME_SAMPLES // HOP
"""Spectra per frame."""
LOUDEST: Final = 0.99
GAP: Final = 4
"""Frames between utterances that lie one after the other: what the widest convolution sees on either side, 25 rows at 8
a frame."""

Clear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HiftSizes:
    mels: int
    width: int
    pitch_width: int
    harmonics: int
    up_kernels: tuple[int, ...]
    kernels: tuple[int, ...]
    source_kernels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stretch:
    """Stretches of utterances, one a row.

    Args:
        mel: (B, F, 80) float32 log-mel.
        frames: how many of the F frames each row has.
        anchor: (B,) int64, the frame of the row for which ``cycles`` is known.
        cycles: (B, waves) float64, cycles gone through before that frame.
        offsets: (B, waves) float32 radians.
        keys: (B,) int64, whose noise, see ``noise.key``.
        first: (B,) int64, the position in it of each row's first sample.
    """

    mel: Tensor
    frames: list[int]
    anchor: Tensor
    cycles: Tensor
    offsets: Tensor
    keys: Tensor
    first: Tensor


class Hift(nn.Module):
    """Mirrors ``HiFTGenerator``, its weight norms folded."""

    def __init__(self, sizes: HiftSizes) -> None:
        super().__init__()
        widths = [sizes.width >> stage for stage in range(len(UPSAMPLING) + 1)]
        self.f0_predictor = PitchPredictor(sizes.mels, sizes.pitch_width)
        self.m_source = Source(sizes.harmonics)
        self.conv_pre = nn.Conv1d(sizes.mels, sizes.width, 7, padding=3)
        self.ups = nn.ModuleList(map(_upsampling, widths, widths[1:], sizes.up_kernels, UPSAMPLING))
        self.source_downs = nn.ModuleList(map(_downsampling, widths[1:], (15, 3, 1)))
        self.source_resblocks = nn.ModuleList(map(ResBlock, widths[1:], sizes.source_kernels))
        self.resblocks = nn.ModuleList(ResBlock(width, kernel) for width in widths[1:] for kernel in sizes.kernels)
        self.conv_post = nn.Conv1d(widths[-1], 2 * BINS, 7, padding=3)

    def forward(self, stretch: Stretch) -> tuple[Tensor, Tensor]:
        """Mirrors ``HiFTGenerator.inference``.

        Returns:
            (B, 480 F) float32 samples, and (B, waves, F + 1) float64 cycles before each frame.
        """
        lengths = to_device(torch.tensor(stretch.frames), stretch.mel.device)
        edges = Edges(lengths, ragged=is_ragged(stretch.frames))
        mel = edges.clear(stretch.mel.transpose(1, 2))
        pitch = self.f0_predictor(mel, edges)
        cycles = cycles_at_frames(pitch, self.m_source.waves, stretch.cycles, stretch.anchor)
        normals = noise.normals(stretch.keys, stretch.first, FRAME_SAMPLES * pitch.shape[1], self.m_source.waves)
        source = self.m_source(pitch, cycles[..., :-1], stretch.offsets, normals)
        return self.decode(mel, source, edges), cycles

    def decode(self, mel: Tensor, source: Tensor, edges: Edges) -> Tensor:
        """Mirrors ``HiFTGenerator.decode``: (B, 80, F) and (B, 480 F) to (B, 480 F)."""
        spectra = _spectra(source, edges)
        x, rate = edges.clear(self.conv_pre(mel)), 1
        for stage, factor in enumerate(UPSAMPLING):
            rate, extra = rate * factor, int(rate * factor == SPECTRA)
            x = edges.clear(self.ups[stage](F.leaky_relu(x, 0.1)), rate)
            x = F.pad(x, (extra, 0), mode="reflect")  # in the last stage, one spectrum more than hops
            x = self._fuse(x, spectra, stage, partial(edges.clear, rate=rate, extra=extra))
        return _samples(self.conv_post(F.leaky_relu(x)), edges)

    def _fuse(self, x: Tensor, spectra: Tensor, stage: int, clear: Clear) -> Tensor:
        """Adds the source's spectrum, then averages over kernels of different sizes."""
        x = x + self.source_resblocks[stage](clear(self.source_downs[stage](spectra)), clear)
        kernels = len(self.resblocks) // len(UPSAMPLING)
        blocks = self.resblocks[stage * kernels : (stage + 1) * kernels]
        # The longest kernel first: it is as much work as the two others, which the other team does meanwhile.
        works = [partial(block, x, clear) for block in reversed(blocks)]
        return sum(reversed(teams.together(works, x.device))) / kernels


def _upsampling(inputs: int, outputs: int, kernel: int, factor: int) -> nn.ConvTranspose1d:
    return nn.ConvTranspose1d(inputs, outputs, kernel, factor, padding=(kernel - factor) // 2)


def _downsampling(width: int, factor: int) -> nn.Conv1d:
    kernel = 1 if factor == 1 else 2 * factor
    return nn.Conv1d(2 * BINS, width, kernel, factor, padding=factor // 2)


class ResBlock(nn.Module):
    """Mirrors ``hifigan.ResBlock``."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(_dilated(width, kernel, dilation) for dilation in _DILATIONS)
        self.convs2 = nn.ModuleList(_dilated(width, kernel, 1) for _ in _DILATIONS)
        self.activations1 = nn.ModuleList(Snake(width) for _ in _DILATIONS)
        self.activations2 = nn.ModuleList(Snake(width) for _ in _DILATIONS)

    def forward(self, x: Tensor, clear: Clear) -> Tensor:
        layers = zip(self.activations1, self.convs1, self.activations2, self.convs2, strict=True)
        for first, conv1, second, conv2 in layers:
            x = x + clear(conv2(second(clear(conv1(first(x))))))
        return x


def _dilated(width: int, kernel: int, dilation: int) -> nn.Conv1d:
    return nn.Conv1d(width, width, kernel, dilation=dilation, padding=(kernel - 1) * dilation // 2)


class Snake(nn.Module):
    """Mirrors ``hifigan.Snake``: x + sin(alpha x)^2 / alpha."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        alpha = self.alpha[:, None]
        wave = torch.sin(x * alpha)
        return torch.addcmul(x, wave * (1.0 / (alpha + 1e-9)), wave)


def _spectra(source: Tensor, edges: Edges) -> Tensor:
    """Mirrors ``HiFTGenerator._stft``: (B, 480 F) to (B, 18, 120 F + 1), real parts, then imaginary parts."""
    framed = edges.reflected(source, FRAME_SAMPLES, FFT // 2)[:, None].double()
    return edges.clear(F.conv1d(framed, analysis(source.device), stride=HOP).float(), SPECTRA, 1)


def _samples(x: Tensor, edges: Edges) -> Tensor:
    """Mirrors ``HiFTGenerator._istft``: (B, 18, 120 F + 1) log-magnitudes, then phases, to (B, 480 F)."""
    log_magnitude, phase = x.split(BINS, dim=1)
    magnitude = log_magnitude.exp().clamp(max=1e2)
    angle = torch.sin(phase)
    spectra = torch.cat([magnitude * angle.cos(), magnitude * angle.sin()], dim=1)
    within = edges.mask(x.shape[-1], SPECTRA, 1).double()
    wave = F.conv_transpose1d(spectra * within, synthesis(x.device), stride=HOP)
    # Windows that overlap add up to 1.5, but not at the edges.
    weight = F.conv_transpose1d(within, window(x.device).square()[None, None], stride=HOP)
    wave = (wave / weight.clamp(min=1e-8)).float()
    return wave[:, 0, FFT // 2 : -FFT // 2].clamp(-LOUDEST, LOUDEST)


@cache
def window(device: torch.device) -> Tensor:
    """(16,) float64 of upstream's float32 values."""
    return torch.hann_window(FFT, dtype=torch.float64).float().double().to(device)


@cache
def analysis(device: torch.device) -> Tensor:
    """(18, 1, 16) kernels: a windowed real Fourier transform."""
    angles = _angles()
    return (torch.cat([angles.cos(), -angles.sin()]) * window(torch.device("cpu")))[:, None].to(device)


@cache
def synthesis(device: torch.device) -> Tensor:
    """(18, 1, 16) kernels: its inverse, windowed. The imaginary parts of the first and last bin count for nothing."""
    angles = _angles()
    share = torch.full((BINS, 1), 2.0 / FFT, dtype=torch.float64)
    share[0] = share[-1] = 1.0 / FFT
    waves = torch.cat([share * angles.cos(), -share * angles.sin()])
    return (waves * window(torch.device("cpu")))[:, None].to(device)


def _angles() -> Tensor:
    turns = torch.arange(BINS, dtype=torch.float64)[:, None] * torch.arange(FFT, dtype=torch.float64)
    return turns * (2 * math.pi / FFT)
