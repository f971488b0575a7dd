"""The flow's estimator: which way the mel should move at one moment of the diffusion.

Mirrors ``chatterbox.models.s3gen.decoder.ConditionalDecoder`` (causal, one down stage, one up stage). What differs is
how, not what: features stay (batch, frames, channels) from end to end; what depends on the time alone is computed
before the loop; and there are no masks on the convolutions, which look to the left only, so that padding on the right
cannot reach a row's own frames. Attention alone needs to be told.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.vocoder import teams

HEAD_DIM: Final = 64


@dataclass(frozen=True)
class EstimatorSizes:
    inputs: int
    outputs: int
    width: int
    heads: int
    feed_forward: int
    blocks: int
    mid_stages: int


class Estimator(nn.Module):
    """Mirrors ``ConditionalDecoder``."""

    def __init__(self, sizes: EstimatorSizes) -> None:
        super().__init__()
        width = sizes.width
        self.time_mlp = TimeEmbedding(sizes.inputs, 4 * width)
        self.down_blocks = nn.ModuleList([_stage(sizes, sizes.inputs, CausalConv(width, width))])
        self.mid_blocks = nn.ModuleList(_stage(sizes, width) for _ in range(sizes.mid_stages))
        self.up_blocks = nn.ModuleList([_stage(sizes, 2 * width, CausalConv(width, width))])
        self.final_block = CausalBlock(width, width)
        self.final_proj = Pointwise(width, sizes.outputs)

    @property
    def dtype(self) -> torch.dtype:
        return self.time_mlp.linear_1.weight.dtype

    @property
    def stages(self) -> list[nn.ModuleList]:
        """Each a resnet, its transformer blocks and, at the two ends, a convolution; in the order of computing."""
        return [*self.down_blocks, *self.mid_blocks, *self.up_blocks]

    def shifts(self, moments: Tensor) -> Tensor:
        """What the time of the diffusion adds in every resnet: moments (S,) in [0, 1] to (S, resnets, width).

        Depends on nothing else, so it is the same for every batch.
        """
        resnets = [stage[0] for stage in self.stages]
        rows = []
        for moment in moments:
            # Two rows, like upstream's smallest batch: a single one's product may round differently.
            time = self.time_mlp(moment.expand(2))
            rows.append(torch.stack([resnet.mlp(time)[0] for resnet in resnets]))
        return torch.stack(rows)

    def forward(self, x: Tensor, shifts: Tensor, mask: Tensor | None) -> Tensor:
        """One evaluation.

        Args:
            x: (B, T, inputs), that is noisy mel, mu, speaker and condition side by side.
            shifts: (resnets, width), one row of what ``shifts`` gives.
            mask: (B, 1, 1, T) bool, true where a row has a frame; None when all rows are full.

        Returns:
            (B, T, outputs); what stands past a row's end is meaningless.
        """
        first, *middle, last = shifts
        resnet, blocks, down = self.down_blocks[0]
        skip = x = _run(resnet, blocks, x, first, mask)
        x = down(x)
        for (resnet, blocks), shift in zip(self.mid_blocks, middle, strict=True):
            x = _run(resnet, blocks, x, shift, mask)
        resnet, blocks, up = self.up_blocks[0]
        x = up(_run(resnet, blocks, torch.cat([x, skip], dim=-1), last, mask))
        return self.final_proj(self.final_block(x))


def _stage(sizes: EstimatorSizes, inputs: int, *last: nn.Module) -> nn.ModuleList:
    blocks = nn.ModuleList(TransformerBlock(sizes) for _ in range(sizes.blocks))
    return nn.ModuleList([CausalResnet(inputs, sizes.width, 4 * sizes.width), blocks, *last])


def _run(resnet: nn.Module, blocks: nn.ModuleList, x: Tensor, shift: Tensor, mask: Tensor | None) -> Tensor:
    x = resnet(x, shift)
    for block in blocks:
        x = block(x, mask)
    return x


def _convolved(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """``conv(x)``, with the kernel that torch would choose if both halves of the guidance and all threads were here.

    On a CPU it looks at the batch and at its threads, of which a team has half, and the kernels round differently.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return F.conv1d(x, conv.weight, conv.bias)
    if conv.kernel_size == (1,) and teams.threads() == 1:
        return F.conv1d(x, conv.weight, conv.bias)
    result: Tensor = torch.ops.aten.mkldnn_convolution(x.contiguous(), conv.weight, conv.bias, [0], [1], [1], 1)
    return result


class TimeEmbedding(nn.Module):
    """Mirrors ``SinusoidalPosEmb`` and ``TimestepEmbedding``."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, moments: Tensor) -> Tensor:
        half = self.linear_1.in_features // 2
        rates = torch.exp(torch.arange(half, device=moments.device).float() * -(math.log(10000) / (half - 1)))
        angles = 1000 * moments[:, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class CausalConv(nn.Conv1d):
    """Mirrors ``CausalConv1d`` over (B, T, channels): a kernel of 3 that ends at the frame itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return _convolved(self, F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2).contiguous()


class Pointwise(nn.Conv1d):
    """A convolution of kernel 1 over (B, T, channels); not as a matrix product, which rounds differently."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return _convolved(self, x.transpose(1, 2)).transpose(1, 2)


class CausalBlock(nn.Module):
    """Mirrors ``CausalBlock1D``; the list's places are upstream's, with its two transpositions left empty."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"0": CausalConv(inputs, outputs), "2": nn.LayerNorm(outputs)})

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.block["2"](self.block["0"](x)))


class CausalResnet(nn.Module):
    """Mirrors ``CausalResnetBlock1D``."""

    def __init__(self, inputs: int, outputs: int, time_width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Mish(), nn.Linear(time_width, outputs))
        self.block1 = CausalBlock(inputs, outputs)
        self.block2 = CausalBlock(outputs, outputs)
        self.res_conv = Pointwise(inputs, outputs)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        """``shift`` (width,) is what ``mlp`` makes of the time."""
        return self.block2(self.block1(x) + shift) + self.res_conv(x)


class TransformerBlock(nn.Module):
    """Mirrors ``matcha.transformer.BasicTransformerBlock`` with diffusers' ``Attention`` and exact GELU."""

    def __init__(self, sizes: EstimatorSizes) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(sizes.width)
        self.attn1 = Attention(sizes.width, sizes.heads)
        self.norm3 = nn.LayerNorm(sizes.width)
        self.ff = FeedForward(sizes.width, sizes.feed_forward)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask)
        return x + self.ff(self.norm3(x))


class Attention(nn.Module):
    """Mirrors ``diffusers.models.attention_processor.Attention`` as upstream sets it up."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        inner = heads * HEAD_DIM
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        heard = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out[0](heard.transpose(1, 2).flatten(2))


def _heads(x: Tensor) -> Tensor:
    """(B, T, heads * 64) to (B, heads, T, 64)."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


class GeluProjection(nn.ModuleDict):
    """Mirrors ``diffusers.models.activations.GELU``: a linear layer ``proj`` and the exact GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__({"proj": nn.Linear(width, inner)})

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self["proj"](x))


class FeedForward(nn.Module):
    """Mirrors ``matcha.transformer.FeedForward``; its dropout's place is left empty."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"0": GeluProjection(width, inner), "2": nn.Linear(inner, width)})

    def forward(self, x: Tensor) -> Tensor:
        return self.net["2"](self.net["0"](x))
