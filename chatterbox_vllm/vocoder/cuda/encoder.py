"""The flow's encoder on a CUDA card: the blocks' products in half precision, the rest in float32.

Computes what ``encoder.Encoder`` computes. Its attention scores depend on distances, too. A product with a table of all
distances gives, in each row, the scores of all of them; row *i* wants its own window of that, one place further left
than row *i - 1* wants it. So the windows are a view with a shorter stride, and torch adds that view to the scores. The
table's width is chosen so that the view is aligned as torch's kernel wants it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from chatterbox_vllm.vocoder.encoder import (
    FRAMES_PER_TOKEN,
    LOOKAHEAD_TOKENS,
    ConformerBlock,
    Encoder,
    relative_positions,
)

_ATTENTION: Final = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which compiles for each new shape."""
ALIGNMENT: Final = 16
"""Tokens are padded to multiples of this."""


@dataclass(frozen=True, eq=False)
class _Block:
    """Matrices in half precision, norms as they are."""

    qkv: Tensor
    qkv_bias: Tensor
    content_bias: Tensor
    place_bias: Tensor
    place: Tensor
    out: Tensor
    out_bias: Tensor
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    attention_norm: nn.LayerNorm
    feed_forward_norm: nn.LayerNorm


class HalfEncoder:
    """``Encoder`` for CUDA cards.

    Args:
        encoder: on the card; the weights of its blocks are copied in ``dtype``, the rest of it is used.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        self._encoder = encoder
        self._dtype = dtype
        self._blocks = [_block(block, dtype) for block in encoder.encoders]
        self._up_blocks = [_block(block, dtype) for block in encoder.up_encoders]
        self._distances: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """As ``Encoder.forward``, for a number of tokens that is a multiple of ``ALIGNMENT``."""
        encoder = self._encoder
        x = encoder.embed(x) * mask[..., None]
        ahead = encoder.pre_lookahead_layer
        y = F.leaky_relu(_convolved(ahead.conv1, F.pad(x, (0, 0, 0, LOOKAHEAD_TOKENS))))
        x = x + _convolved(ahead.conv2, F.pad(y, (0, 0, 2, 0)))
        x = self._run(self._blocks, x, mask)
        frames = x.repeat_interleave(FRAMES_PER_TOKEN, dim=1)
        x = encoder.up_embed(_convolved(encoder.up_layer.conv, F.pad(frames, (0, 0, 2 * FRAMES_PER_TOKEN, 0))))
        x = self._run(self._up_blocks, x, mask.repeat_interleave(FRAMES_PER_TOKEN, dim=1))
        return encoder.after_norm(x)

    def _run(self, blocks: list[_Block], x: Tensor, mask: Tensor) -> Tensor:
        length = x.shape[1]
        if length not in self._distances:
            self._distances[length] = _distances(length, x.shape[2], x.device).to(self._dtype)
        hidden = ~mask[:, None, None, :]
        for block in blocks:
            x = self._attended(block, x, self._distances[length], hidden)
            h = block.feed_forward_norm(x).to(self._dtype)
            h = F.silu(F.linear(h, block.up, block.up_bias))
            x = x + F.linear(h, block.down, block.down_bias)
        return x

    def _attended(self, block: _Block, x: Tensor, distances: Tensor, hidden: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = len(block.content_bias)
        projected = F.linear(block.attention_norm(x).to(self._dtype), block.qkv, block.qkv_bias)
        query, key, value = projected.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        # (heads, batch * length, columns): every query against every distance.
        place = F.linear(distances, block.place).view(len(distances), heads, -1).permute(1, 2, 0)
        asking = (query + block.place_bias[:, None]).transpose(0, 1).flatten(1, 2)
        scores = torch.bmm(asking, place)
        columns = scores.shape[2]
        strides = (length * columns, batch * length * columns, columns - 1, 1)
        windows = scores.as_strided((batch, heads, length, length), strides, _zero_column(length))
        windows.masked_fill_(hidden, -math.inf)
        with sdpa_kernel(_ATTENTION):
            heard = F.scaled_dot_product_attention(query + block.content_bias[:, None], key, value, attn_mask=windows)
        return x + F.linear(heard.transpose(1, 2).flatten(2), block.out, block.out_bias)


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """(B, N + taps - 1, inputs) to (B, N, outputs), as a product: cuDNN plans anew for each new shape."""
    taps = x.unfold(1, conv.kernel_size[0], 1)
    return F.linear(taps.flatten(2), conv.weight.flatten(1), conv.bias)


def _zero_column(length: int) -> int:
    """Where the distance 0 is in the table: behind all keys to the left, aligned."""
    return -(-(length - 1) // ALIGNMENT) * ALIGNMENT


def _distances(length: int, width: int, device: torch.device) -> Tensor:
    """(columns, width) float32: ``relative_positions`` for keys from the left end to the right, zeros around them."""
    zero = _zero_column(length)
    columns = -(-(zero + length) // ALIGNMENT) * ALIGNMENT + 1
    table = torch.zeros(columns, width, device=device)
    table[zero - length + 1 : zero + length] = relative_positions(length, width, device)
    return table


def _block(block: ConformerBlock, dtype: torch.dtype) -> _Block:
    attention, feed_forward = block.self_attn, block.feed_forward
    parts = (attention.linear_q, attention.linear_k, attention.linear_v)
    scale = 1 / math.sqrt(attention.pos_bias_u.shape[1])
    return _Block(
        qkv=torch.cat([part.weight for part in parts]).to(dtype),
        qkv_bias=torch.cat([part.bias for part in parts]).to(dtype),
        content_bias=attention.pos_bias_u.to(dtype),
        place_bias=attention.pos_bias_v.to(dtype),
        place=(attention.linear_pos.weight * scale).to(dtype),
        out=attention.linear_out.weight.to(dtype),
        out_bias=attention.linear_out.bias.to(dtype),
        up=feed_forward.w_1.weight.to(dtype),
        up_bias=feed_forward.w_1.bias.to(dtype),
        down=feed_forward.w_2.weight.to(dtype),
        down_bias=feed_forward.w_2.bias.to(dtype),
        attention_norm=block.norm_mha,
        feed_forward_norm=block.norm_ff,
    )
