"""The flow's encoder: speech tokens at 25 a second become mel-rate features at 50 a second.

Mirrors ``chatterbox.models.s3gen.transformer.upsample_encoder.UpsampleConformerEncoder`` with the parts upstream uses.
Differs in one way: rows of a batch may be shorter than the longest. Padding is cleared before the look-ahead
convolution, the one place where it would leak to the left, and hidden from attention; the remaining convolutions look
to the left only. So each row gets what it would get alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOOKAHEAD_TOKENS: Final = 3
"""How many tokens to the right the first convolution sees."""
FRAMES_PER_TOKEN: Final = 2


@dataclass(frozen=True)
class EncoderSizes:
    inputs: int
    width: int
    heads: int
    feed_forward: int
    blocks: int
    up_blocks: int


class Encoder(nn.Module):
    """Mirrors ``UpsampleConformerEncoder``."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.embed = InputProjection(sizes.inputs, sizes.width)
        self.pre_lookahead_layer = Lookahead(sizes.width)
        self.encoders = nn.ModuleList(ConformerBlock(sizes) for _ in range(sizes.blocks))
        self.up_layer = Upsampling(sizes.width)
        self.up_embed = InputProjection(sizes.width, sizes.width)
        self.up_encoders = nn.ModuleList(ConformerBlock(sizes) for _ in range(sizes.up_blocks))
        self.after_norm = nn.LayerNorm(sizes.width, eps=1e-5)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Encodes embedded tokens.

        Args:
            x: (B, N, inputs).
            mask: (B, N) bool, true where a row has a token; None when all rows are full.

        Returns:
            (B, 2N, width); what stands past a row's end is meaningless.
        """
        x = self.embed(x)
        if mask is not None:
            x = x * mask[..., None]
        x = self.pre_lookahead_layer(x)
        x = _run(self.encoders, x, mask)
        x = self.up_embed(self.up_layer(x))
        x = _run(self.up_encoders, x, None if mask is None else mask.repeat_interleave(FRAMES_PER_TOKEN, dim=1))
        return self.after_norm(x)


def _run(blocks: nn.ModuleList, x: Tensor, mask: Tensor | None) -> Tensor:
    positions = relative_positions(x.shape[1], x.shape[2], x.device)
    hidden = None if mask is None else ~mask[:, None, None, :]
    for block in blocks:
        x = block(x, positions, hidden)
    return x


class InputProjection(nn.Module):
    """Mirrors ``LinearNoSubsampling``; the positions it also makes upstream are ``relative_positions``."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.out = nn.Sequential(nn.Linear(inputs, width), nn.LayerNorm(width, eps=1e-5))
        self.scale = math.sqrt(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x) * self.scale


class Lookahead(nn.Module):
    """Mirrors ``PreLookaheadLayer``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(width, width, LOOKAHEAD_TOKENS + 1)
        self.conv2 = nn.Conv1d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        ahead = F.leaky_relu(self.conv1(F.pad(x.transpose(1, 2), (0, LOOKAHEAD_TOKENS))))
        return self.conv2(F.pad(ahead, (2, 0))).transpose(1, 2) + x


class Upsampling(nn.Module):
    """Mirrors ``Upsample1D``: every token twice, then a convolution that looks back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 2 * FRAMES_PER_TOKEN + 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.repeat_interleave(FRAMES_PER_TOKEN, dim=1).transpose(1, 2)
        # Contiguous, as upstream makes it: a matrix product of a transposed input rounds differently.
        return self.conv(F.pad(frames, (2 * FRAMES_PER_TOKEN, 0))).transpose(1, 2).contiguous()


class ConformerBlock(nn.Module):
    """Mirrors ``ConformerEncoderLayer`` without macaron and convolution modules, norms first."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.self_attn = RelativeAttention(sizes.width, sizes.heads)
        self.feed_forward = FeedForward(sizes.width, sizes.feed_forward)
        self.norm_mha = nn.LayerNorm(sizes.width, eps=1e-12)
        self.norm_ff = nn.LayerNorm(sizes.width, eps=1e-12)

    def forward(self, x: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.norm_mha(x), positions, hidden)
        return x + self.feed_forward(self.norm_ff(x))


class FeedForward(nn.Module):
    """Mirrors ``PositionwiseFeedForward``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(width, inner)
        self.w_2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.silu(self.w_1(x)))


class RelativeAttention(nn.Module):
    """Mirrors ``RelPositionMultiHeadedAttention``.

    Written out as upstream writes it: torch's fused attention takes the positions' scores as a bias and rounds
    differently. The encoder is a fiftieth of the flow's work; equal bits are worth more here (see ``source``).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.linear_q = nn.Linear(width, width)
        self.linear_k = nn.Linear(width, width)
        self.linear_v = nn.Linear(width, width)
        self.linear_out = nn.Linear(width, width)
        self.linear_pos = nn.Linear(width, width, bias=False)
        self.pos_bias_u = nn.Parameter(torch.empty(heads, width // heads))
        self.pos_bias_v = nn.Parameter(torch.empty(heads, width // heads))

    def forward(self, x: Tensor, positions: Tensor, hidden: Tensor | None) -> Tensor:
        """Attends within each row.

        Args:
            x: (B, T, width).
            positions: (2T - 1, width), see ``relative_positions``.
            hidden: (B, 1, 1, T) bool, true for keys that do not exist, or None.

        Returns:
            (B, T, width).
        """
        query = self.linear_q(x).unflatten(-1, (self.heads, -1))
        key = self.linear_k(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = self.linear_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        place = self.linear_pos(positions).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        scores = (query + self.pos_bias_u).transpose(1, 2) @ key.transpose(-2, -1)
        scores += shift((query + self.pos_bias_v).transpose(1, 2) @ place)
        scores /= math.sqrt(key.shape[-1])
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        heard = scores.softmax(-1) @ value
        return self.linear_out(heard.transpose(1, 2).flatten(2))


def shift(scores: Tensor) -> Tensor:
    """Mirrors ``rel_shift``: (B, H, T, 2T - 1) scores by distance, furthest left first, to (B, H, T, T) by key.

    Row i, key j is at distance i - j, the column T - 1 - i + j: each row starts one column before the last one.
    """
    batch, heads, length, columns = scores.shape
    strides = (heads * length * columns, length * columns, columns - 1, 1)
    return scores.contiguous().as_strided((batch, heads, length, length), strides, length - 1)


def relative_positions(length: int, width: int, device: torch.device) -> Tensor:
    """Mirrors ``EspnetRelPositionalEncoding``: (2 * length - 1, width) for distances length - 1 down to 1 - length."""
    distance = torch.arange(length - 1, -length, -1, dtype=torch.float32, device=device)
    rates = torch.exp(torch.arange(0, width, 2, dtype=torch.float32, device=device) * -(math.log(10000.0) / width))
    angles = distance[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
