"""The flow's encoder on a CUDA card: the blocks' products in half precision, the rest in float32.

Computes what ``encoder.Encoder`` computes. Its attention scores depend on distances, too. A product with a table of all
distances gives, in each row, the scores of all of them; row *i* wants its own window of that, one place further left
than row *i - 1* wants it. So the windows are a view with a shorter stride, and torch adds that view to the scores. The
table's width is chosen so that the view is aligned as torch's kernel wants it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

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
from chatterbox_vllm.vocoder.flow import LONGEST

if TYPE_CHECKING:
    from chatterbox_vllm.vocoder.cuda.dequantize import Group, Scratch  # Triton's; the rest of this needs none

_ATTENTION: Final = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Not cuDNN's, which compiles for each new shape."""
ALIGNMENT: Final = 16
"""Tokens are padded to multiples of this."""


@dataclass(frozen=True, eq=False)
class _Block:
    """Matrices in half precision, norms as they are; ``quantized`` are its matrices if they have to be decoded."""

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
    quantized: Group | None


class HalfEncoder:
    """``Encoder`` for CUDA cards.

    Args:
        encoder: the weights of its blocks are copied, in ``dtype`` or as they are quantised, and their norms move to
            the card; the rest of it is used, and has to be there.
        dtype: bfloat16 or float16.
        device: the card.
        scratch: for the matrices of a block, if they are quantised.
    """

    def __init__(
        self, encoder: Encoder, dtype: torch.dtype, device: torch.device, scratch: Scratch | None = None
    ) -> None:
        self._encoder = encoder
        self._dtype = dtype
        self._blocks = [_block(block, dtype, device, scratch) for block in encoder.encoders]
        self._up_blocks = [_block(block, dtype, device, scratch) for block in encoder.up_encoders]
        self._heads = encoder.encoders[0].self_attn.heads
        self._distances = self._table(LONGEST, len(encoder.after_norm.weight), device)

    @property
    def weights(self) -> list[Any]:
        """Where its weights on the card are."""
        return [self._encoder, self._blocks, self._up_blocks]

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
        table = self._distances if length <= LONGEST else self._table(length, x.shape[2], x.device)
        beyond = (len(table) - 1) // 2 - length
        distances = table[beyond : len(table) - beyond]
        hidden = ~mask[:, None, None, :]
        for block in blocks:
            if block.quantized is not None:
                block.quantized.decode(overlap=False)
            x = self._attended(block, x, distances, hidden)
            h = block.feed_forward_norm(x).to(self._dtype)
            h = F.silu(F.linear(h, block.up, block.up_bias))
            x = x + F.linear(h, block.down, block.down_bias)
        return x

    def _table(self, length: int, width: int, device: torch.device) -> Tensor:
        """(2 length + 1, width): ``relative_positions`` for queries scaled as scores are, with a row more at each end.

        So the distance 0 is in a row, and the table's width in a number of columns, that torch's kernel takes.
        """
        table = F.pad(relative_positions(length, width, device), (0, 0, 1, 1))
        return (table / math.sqrt(width // self._heads)).to(self._dtype)

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
        windows = scores.as_strided((batch, heads, length, length), strides, length)
        windows.masked_fill_(hidden, -math.inf)
        with sdpa_kernel(_ATTENTION):
            heard = F.scaled_dot_product_attention(query + block.content_bias[:, None], key, value, attn_mask=windows)
        return x + F.linear(heard.transpose(1, 2).flatten(2), block.out, block.out_bias)


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """(B, N + taps - 1, inputs) to (B, N, outputs), as a product: cuDNN plans anew for each new shape."""
    taps = x.unfold(1, conv.kernel_size[0], 1)
    return F.linear(taps.flatten(2), conv.weight.flatten(1), conv.bias)


def _block(block: ConformerBlock, dtype: torch.dtype, device: torch.device, scratch: Scratch | None) -> _Block:
    attention, feed_forward = block.self_attn, block.feed_forward
    joined = [attention.linear_q, attention.linear_k, attention.linear_v]
    places = [joined, [attention.linear_pos], [attention.linear_out], [feed_forward.w_1], [feed_forward.w_2]]
    group = None if scratch is None else scratch.group([[layer.matrix for layer in place] for place in places])

    def half(*parts: Tensor) -> Tensor:
        return torch.cat(parts).to(device, dtype)

    def plain() -> list[Tensor]:
        return [half(*(layer.weight for layer in place)) for place in places]

    qkv, place, out, up, down = plain() if group is None else group.matrices
    return _Block(
        qkv=qkv,
        qkv_bias=half(*(layer.bias for layer in joined)),
        content_bias=half(attention.pos_bias_u),
        place_bias=half(attention.pos_bias_v),
        place=place,
        out=out,
        out_bias=half(attention.linear_out.bias),
        up=up,
        up_bias=half(feed_forward.w_1.bias),
        down=down,
        down_bias=half(feed_forward.w_2.bias),
        attention_norm=block.norm_mha.to(device),
        feed_forward_norm=block.norm_ff.to(device),
        quantized=group,
    )
