"""From speech tokens to a mel spectrogram: the encoder, then Euler steps along the estimator's field.

Mirrors ``chatterbox.models.s3gen.flow.CausalMaskedDiffWithXvec`` and ``flow_matching.CausalConditionalCFM``. The noise
is an argument here, and the loop reads nothing back from the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.vocoder import teams
from chatterbox_vllm.vocoder.encoder import Encoder, EncoderSizes
from chatterbox_vllm.vocoder.estimator import Estimator, EstimatorSizes

GUIDANCE: Final = 0.7
"""Upstream's ``inference_cfg_rate``."""
LONGEST: Final = 2560
"""Frames of the longest utterance: 10 s of recording and 40 s of speech, rounded up."""


@dataclass(frozen=True)
class FlowSizes:
    vocabulary: int
    x_vector: int
    mels: int
    encoder: EncoderSizes
    estimator: EstimatorSizes


class Flow(nn.Module):
    """Mirrors ``CausalMaskedDiffWithXvec``."""

    def __init__(self, sizes: FlowSizes) -> None:
        super().__init__()
        self.input_embedding = nn.Embedding(sizes.vocabulary, sizes.encoder.inputs)
        self.spk_embed_affine_layer = nn.Linear(sizes.x_vector, sizes.mels)
        self.encoder = Encoder(sizes.encoder)
        self.encoder_proj = nn.Linear(sizes.encoder.width, sizes.mels)
        self.decoder = nn.ModuleDict({"estimator": Estimator(sizes.estimator)})
        self._shifts: dict[int, Tensor] = {}

    @property
    def estimator(self) -> Estimator:
        return self.decoder["estimator"]

    def speaker(self, x_vector: Tensor) -> Tensor:
        """The speaker's share of the condition: (B, 192) to (B, 80)."""
        return self.spk_embed_affine_layer(F.normalize(x_vector, dim=1))

    def mu(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """What the tokens ask for.

        Args:
            tokens: (B, N) int64, prompt then speech, any valid id where a row has ended.
            mask: (B, N) bool, true where a row has a token; None when all rows are full.

        Returns:
            (B, 2N, 80) float32.
        """
        return self.encoder_proj(self.encoder(self.input_embedding(tokens), mask))

    def solve(
        self, noise: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, mask: Tensor | None, steps: int
    ) -> Tensor:
        """Mirrors ``CausalConditionalCFM.forward``: guided Euler steps from noise to mel.

        Args:
            noise, mu, cond: (B, T, 80) float32; cond is the prompt's mel, then zeros.
            speaker: (B, 80) float32.
            mask: (B, T) bool, true where a row has a frame; None when all rows are full.
            steps: Euler steps.

        Returns:
            (B, T, 80) float32; what stands past a row's end is meaningless.
        """
        given = torch.cat([mu, speaker[:, None].expand_as(mu), cond], dim=-1).to(self.estimator.dtype)
        # The second half of the batch is the unconditional one: everything but the mel is zero.
        given = torch.cat([given, torch.zeros_like(given)])
        attended = None if mask is None else mask.repeat(2, 1)[:, None, None, :]
        lengths = schedule(steps).diff().tolist()
        x = noise
        for shifts, length in zip(self._shifts_of(steps, noise.device), lengths, strict=True):
            doubled = torch.cat([x, x]).to(given.dtype)
            guided, free = self._velocities(torch.cat([doubled, given], dim=-1), shifts, attended).float().chunk(2)
            x = x + length * ((1.0 + GUIDANCE) * guided - GUIDANCE * free)
        return x

    def _velocities(self, x: Tensor, shifts: Tensor, mask: Tensor | None) -> Tensor:
        """The estimator's; on a CPU, the two halves of the batch at the same time."""
        estimator = self.estimator
        if not teams.can_share(x.device):
            velocities: Tensor = estimator(x, shifts, mask)
            return velocities
        masks = (None, None) if mask is None else mask.chunk(2)
        halves = [partial(estimator.forward, rows, shifts, own) for rows, own in zip(x.chunk(2), masks, strict=True)]
        return torch.cat(teams.together(halves, x.device))

    def _shifts_of(self, steps: int, device: torch.device) -> Tensor:
        """(steps, resnets, width), kept: requests take few different numbers of steps, mostly 10."""
        if steps not in self._shifts:
            self._shifts[steps] = self.estimator.shifts(schedule(steps)[:-1].to(device))
        return self._shifts[steps]


def schedule(steps: int) -> Tensor:
    """Moments of the diffusion on the CPU: (steps + 1,) float32 from 0 to 1, closer together at first."""
    return 1 - torch.cos(torch.linspace(0, 1, steps + 1) * 0.5 * math.pi)
