"""HiFT's excitation: pitch from the mel, nine sine waves from the pitch, and noise.

Mirrors ``f0_predictor.ConvRNNF0Predictor`` and ``hifigan.SineGen`` / ``SourceModuleHnNSF``.

A phase is a sum over everything spoken so far, so it forgets no error: a pitch wrong by 1e-7 has moved the ninth
harmonic by a hundredth of a radian after 10 s at 200 Hz. Two sounds whose mels differ in their last bits drift apart by
that much, which no ear can tell but a test can. Phases are summed in float64, from frame to frame, so that a sum can be
carried from one chunk to the next; before it wraps, the sum is rounded to float32, as upstream's is.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.types import SAMPLE_RATE
from chatterbox_vllm.vocoder.edges import Edges

FRAME_SAMPLES: Final = 480
PITCH_REACH: Final = 5
"""The pitch of a frame depends on this many frames on either side."""
_SINE_AMPLITUDE: Final = 0.1
_VOICED_NOISE: Final = 0.003
_VOICED_ABOVE: Final = 10.0
"""Hertz."""


class PitchPredictor(nn.Module):
    """Mirrors ``ConvRNNF0Predictor``."""

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        convs = (nn.Conv1d(mels if place == 0 else width, width, 3, padding=1) for place in range(PITCH_REACH))
        self.condnet = nn.ModuleDict({str(2 * place): conv for place, conv in enumerate(convs)})
        self.classifier = nn.Linear(width, 1)

    def forward(self, mel: Tensor, edges: Edges) -> Tensor:
        """(B, 80, F) log-mel to (B, F) float32 hertz."""
        x = mel.to(self.classifier.weight.dtype)
        for conv in self.condnet.values():
            x = edges.clear(F.elu(conv(x)))
        return self.classifier(x.transpose(1, 2)).squeeze(-1).abs().float()


class Source(nn.Module):
    """Mirrors ``SourceModuleHnNSF``."""

    def __init__(self, harmonics: int) -> None:
        super().__init__()
        self.l_linear = nn.Linear(harmonics + 1, 1)

    @property
    def waves(self) -> int:
        """Sine waves: the fundamental and its overtones."""
        return self.l_linear.in_features

    def forward(self, pitch: Tensor, cycles: Tensor, offsets: Tensor, noise: Tensor) -> Tensor:
        """The excitation.

        Args:
            pitch: (B, F) float32 hertz.
            cycles: (B, waves, F) float64, see ``cycles_at_frames``.
            offsets: (B, waves) float32 radians.
            noise: (B, waves, 480 F) float32, standard normal.

        Returns:
            (B, 480 F) float32.
        """
        step = cycles_per_sample(pitch, self.waves).double()
        within = torch.arange(1, FRAME_SAMPLES + 1, dtype=torch.float64, device=pitch.device)
        turns = torch.addcmul(cycles[..., None], step[..., None], within).float().flatten(2)
        waves = torch.sin(2 * math.pi * (turns % 1) + offsets[..., None]) * _SINE_AMPLITUDE
        voiced = (pitch > _VOICED_ABOVE).float().repeat_interleave(FRAME_SAMPLES, dim=1)[:, None]
        loudness = voiced * _VOICED_NOISE + (1 - voiced) * (_SINE_AMPLITUDE / 3)
        merged = self.l_linear((waves * voiced + loudness * noise).transpose(1, 2))
        return merged.squeeze(-1).tanh()


def cycles_per_sample(pitch: Tensor, waves: int) -> Tensor:
    """(B, F) hertz to (B, waves, F) float32, rounded as upstream rounds."""
    multiples = torch.arange(1, waves + 1, device=pitch.device)
    return pitch[:, None] * multiples[:, None] / SAMPLE_RATE


def cycles_at_frames(pitch: Tensor, waves: int, known: Tensor, anchor: Tensor) -> Tensor:
    """How many cycles each wave has gone through before each frame's first sample.

    Args:
        pitch: (B, F) float32 hertz.
        waves: sine waves.
        known: (B, waves) float64, the cycles before each row's frame ``anchor``.
        anchor: (B,) int64.

    Returns:
        (B, waves, F + 1) float64; the last one is what the next frame starts from.
    """
    frames = cycles_per_sample(pitch, waves).double() * FRAME_SAMPLES
    gone = F.pad(frames.cumsum(-1), (1, 0))
    return gone - gone.gather(-1, anchor[:, None, None].expand(-1, waves, 1)) + known[..., None]
