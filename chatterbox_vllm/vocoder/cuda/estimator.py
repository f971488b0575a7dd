"""The estimator on a CUDA card: ``estimator``'s weights, packed rows, ``kernels``.

Computes what ``Estimator`` computes, with products in half precision and sums, norms and the residual stream in
float32. What depends on the time of the diffusion alone is computed once, and the two halves of the guidance are two
sequences like any other two, which meet in ``kernels.euler``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor, nn

from chatterbox_vllm.vocoder.cuda import kernels
from chatterbox_vllm.vocoder.cuda.dequantize import Group, Scratch
from chatterbox_vllm.vocoder.cuda.tiling import Tile, Tiling
from chatterbox_vllm.vocoder.estimator import HEAD_DIM, CausalBlock, Estimator, TransformerBlock

_SCORE_SCALE: Final = math.log2(math.e) / math.sqrt(HEAD_DIM)
_OVERLAPPING: Final = (9, 0)
"""Compute capability from which on a kernel can be launched before the one it waits for has ended."""
_FRAMES: Final = 32
"""Frames of one program of ``kernels.euler``."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows are in use, and what they hold. Everything is on the device.

    Args:
        place: (M,) int32, a row's distance from its sequence's start.
        used: (1,) int32, rows in use; they come first.
        tiles: (T, 3) int32: an attention tile's first row, its sequence's first row and end; 0, 0, 0 for none. Those
            for none come last.
        pairs: (M / 2, 2) int32, where a frame's guided and its unguided row are.
        frames: (1,) int32, frames in use.
        inputs: (M, 320) half precision: noisy mel, mu, speaker and condition side by side; all but the first is zero in
            unguided rows.
        mel: (M / 2, 80) float32, the same noisy mel, frame by frame.
    """

    place: Tensor
    used: Tensor
    tiles: Tensor
    pairs: Tensor
    frames: Tensor
    inputs: Tensor
    mel: Tensor


@dataclass(frozen=True, eq=False)
class Room:
    """Activations of M rows; batches use the same room, one after the other.

    Args:
        stream: (M, width) float32, the residual stream.
        half, first, skipped: (M, width) half precision.
        wide: (M * 3 inner,) half precision, for queries, keys and values, and later for the feed-forward's units.
        heard: (M, inner) half precision, what attention gives.
    """

    stream: Tensor
    half: Tensor
    first: Tensor
    skipped: Tensor
    wide: Tensor
    heard: Tensor


@dataclass(frozen=True, eq=False)
class _Norm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class _Product:
    """``matrix`` (inputs, outputs) in half precision, ``bias`` (outputs,) float32."""

    matrix: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class _Causal:
    """A ``CausalBlock``: convolution, norm, mish."""

    conv: _Product
    norm: _Norm


@dataclass(frozen=True, eq=False)
class _Block:
    norm1: _Norm
    qkv: Tensor
    out: _Product
    norm3: _Norm
    up: _Product
    down: _Product


@dataclass(frozen=True, eq=False)
class _Stage:
    """``quantized`` are the blocks' matrices, if they have to be decoded before the blocks are computed."""

    first: _Causal
    second: _Causal
    skip: _Product
    blocks: list[_Block]
    quantized: Group | None
    last: _Product | None


class PackedEstimator:
    """``Estimator`` for packed rows.

    Args:
        estimator: on the CPU. Its weights are copied, in ``dtype`` or as they are quantised; it is not needed
            afterwards.
        dtype: bfloat16 or float16.
        device: a CUDA device.
        scratch: for the matrices of a stage, if they are quantised.
    """

    def __init__(
        self, estimator: Estimator, *, dtype: torch.dtype, device: torch.device, scratch: Scratch | None = None
    ) -> None:
        self.dtype, self.device, self._scratch = dtype, device, scratch
        overlaps = torch.cuda.get_device_capability(device) >= _OVERLAPPING
        self._overlap: dict[str, bool] = {"OVERLAP": overlaps, **({"launch_pdl": True} if overlaps else {})}
        # On the CPU: 20 MB that are used once for each number of steps.
        self._time = nn.ModuleList([estimator.time_mlp, *(stage[0].mlp for stage in estimator.stages)])
        self._stages = [self._stage(stage) for stage in estimator.stages]
        self._final = self._causal(estimator.final_block)
        self._project = self._conv(estimator.final_proj)
        self.inputs, self.width = self._stages[0].skip.matrix.shape
        self.inner = len(self._stages[0].blocks[0].out.matrix)
        self.hidden = len(self._stages[0].blocks[0].down.matrix)
        self.resnets = len(self._stages)
        self.mels = len(self._project.bias)

    @staticmethod
    def fits(estimator: Estimator) -> bool:
        """Whether the kernels can compute networks of this size: a row must be a tile."""
        resnet, blocks, _ = estimator.down_blocks[0]
        width, inputs = resnet.res_conv.out_channels, resnet.res_conv.in_channels
        hidden = len(blocks[0].ff.net["0"]["proj"].bias)
        return width >= 16 and width & (width - 1) == 0 and inputs % 16 == 0 and hidden % 16 == 0

    @property
    def weights(self) -> list[Any]:
        """Where its weights on the card are."""
        return [self._stages, self._final, self._project]

    @torch.inference_mode()
    def shifts(self, moments: Tensor) -> Tensor:
        """``Estimator.shifts``: (S,) moments on the CPU to (S, resnets, width) float32."""
        embed, *mlps = self._time
        time = embed(moments)
        return torch.stack([mlp(time) for mlp in mlps], dim=1).to(self.device)

    def room(self, rows: int) -> Room:
        """Room for so many rows. All are zero, lest those that are never in use become infinite."""

        def half(columns: int) -> Tensor:
            return torch.zeros(rows, columns, dtype=self.dtype, device=self.device)

        return Room(
            stream=torch.zeros(rows, self.width, dtype=torch.float32, device=self.device),
            half=half(self.width),
            first=half(self.width),
            skipped=half(self.width),
            wide=half(max(3 * self.inner, self.hidden)).flatten(),
            heard=half(self.inner),
        )

    def step(self, rows: Rows, room: Room, tiling: Tiling, shifts: Tensor, length: Tensor, guidance: float) -> None:
        """Moves ``rows.mel`` by one guided Euler step, and what ``rows.inputs`` has of it.

        Args:
            shifts: (resnets, width) float32, a row of what ``shifts`` gives.
            length: (1,) float32, of the step, on the device.
            guidance: the velocity is (1 + guidance) x the guided one - guidance x the unguided one.
        """
        down, *middle, up = zip(self._stages, shifts, strict=True)
        self._run(rows, room, tiling, *down, source=rows.inputs, result=room.skipped)
        self._convolve(rows, tiling, down[0].last, room.skipped, half=room.half)
        for stage, shift in middle:
            self._run(rows, room, tiling, stage, shift, source=room.half, result=room.half)
        self._run(rows, room, tiling, *up, source=room.half, second=room.skipped, result=room.half)
        self._convolve(rows, tiling, up[0].last, room.half, half=room.first)
        self._convolve(rows, tiling, self._final.conv, room.first, norm=self._final.norm, half=room.half)
        kernels.euler[(triton.cdiv(len(rows.mel), _FRAMES),)](
            room.half,
            self._project.matrix,
            self._project.bias,
            rows.mel,
            rows.inputs,
            rows.pairs,
            rows.frames,
            length,
            guidance,
            WIDTH=self.width,
            MELS=self.mels,
            MELS_PADDED=triton.next_power_of_2(self.mels),
            INPUTS=self.inputs,
            ROWS=_FRAMES,
            **self._overlap,
        )

    def _run(
        self,
        rows: Rows,
        room: Room,
        tiling: Tiling,
        stage: _Stage,
        shift: Tensor,
        *,
        source: Tensor,
        result: Tensor,
        second: Tensor | None = None,
    ) -> None:
        """A resnet over ``source`` (and ``second`` beside it), then transformer blocks; ``result`` is in half."""
        if stage.quantized is not None:
            stage.quantized.decode(overlap=self._overlap["OVERLAP"])
        self._convolve(
            rows, tiling, stage.first.conv, source, second, norm=stage.first.norm, shift=shift, half=room.first
        )
        self._convolve(
            rows,
            tiling,
            stage.second.conv,
            room.first,
            norm=stage.second.norm,
            skip=(stage.skip, source, second),
            stream=room.stream,
            half=room.half,
            next_norm=stage.blocks[0].norm1,
        )
        following = [block.norm1 for block in stage.blocks[1:]]
        for block, next_norm in zip(stage.blocks, [*following, None], strict=True):
            self._matmul(rows, tiling.project, room.half, block.qkv, None, room.wide)
            self._attend(rows, room, tiling.attention)
            self._add(rows, room, tiling.out, room.heard, block.out, block.norm3, room.half)
            self._matmul(rows, tiling.up, room.half, block.up.matrix, block.up.bias, room.wide)
            self._add(rows, room, tiling.down, room.wide, block.down, next_norm, room.half if next_norm else result)

    def _matmul(self, rows: Rows, tile: Tile, x: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
        inputs, outputs = matrix.shape
        tile = tile.fitting(columns=outputs, depth=inputs)
        kernels.matmul[(outputs // tile.columns, triton.cdiv(len(rows.place), tile.rows))](
            x,
            matrix,
            matrix if bias is None else bias,
            out,
            rows.used,
            INPUTS=inputs,
            OUTPUTS=outputs,
            GELU=bias is not None,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            **self._launch(tile),
        )

    def _attend(self, rows: Rows, room: Room, tile: Tile) -> None:
        kernels.attention[(self.inner // HEAD_DIM, len(rows.tiles))](
            room.wide,
            room.heard,
            rows.tiles,
            _SCORE_SCALE,
            INNER=self.inner,
            DIM=HEAD_DIM,
            ROWS=tile.rows,
            KEYS=tile.columns,
            **self._launch(tile),
        )

    def _add(
        self, rows: Rows, room: Room, tile: Tile, x: Tensor, product: _Product, norm: _Norm | None, half: Tensor
    ) -> None:
        inputs = len(product.matrix)
        tile = tile.fitting(columns=self.width, depth=inputs)
        unused = product.bias
        kernels.add_linear[(triton.cdiv(len(rows.place), tile.rows),)](
            room.stream,
            x,
            product.matrix,
            product.bias,
            norm.weight if norm else unused,
            norm.bias if norm else unused,
            half,
            rows.used,
            INPUTS=inputs,
            WIDTH=self.width,
            NORM=norm is not None,
            ROWS=tile.rows,
            DEPTH=tile.depth,
            **self._launch(tile),
        )

    def _convolve(
        self,
        rows: Rows,
        tiling: Tiling,
        conv: _Product | None,
        source: Tensor,
        second: Tensor | None = None,
        *,
        half: Tensor,
        norm: _Norm | None = None,
        shift: Tensor | None = None,
        skip: tuple[_Product, Tensor, Tensor | None] | None = None,
        stream: Tensor | None = None,
        next_norm: _Norm | None = None,
    ) -> None:
        assert conv is not None
        skipped, from_first, from_second = skip or (conv, source, None)
        more, more_skipped = (0 if beside is None else beside.shape[1] for beside in (second, from_second))
        inputs = math.gcd(source.shape[1], more, from_first.shape[1], more_skipped)
        tile = tiling.conv.fitting(columns=self.width, depth=inputs)
        unused = conv.bias
        kernels.convolution[(triton.cdiv(len(rows.place), tile.rows),)](
            source,
            source if second is None else second,
            conv.matrix,
            conv.bias,
            norm.weight if norm else unused,
            norm.bias if norm else unused,
            unused if shift is None else shift,
            from_first,
            from_first if from_second is None else from_second,
            skipped.matrix,
            skipped.bias,
            half if stream is None else stream,
            half,
            next_norm.weight if next_norm else unused,
            next_norm.bias if next_norm else unused,
            rows.place,
            rows.used,
            WIDTH=source.shape[1],
            SECOND=more,
            OUTPUTS=self.width,
            ACTIVATE=norm is not None,
            SHIFT=shift is not None,
            SKIP=from_first.shape[1] if skip else 0,
            SKIP_SECOND=more_skipped,
            KEEP=stream is not None,
            NORM=next_norm is not None,
            ROWS=tile.rows,
            DEPTH=tile.depth,
            **self._launch(tile),
        )

    def _launch(self, tile: Tile) -> dict[str, int | bool]:
        return {"num_warps": tile.warps, "num_stages": tile.stages, **self._overlap}

    def _stage(self, stage: nn.ModuleList) -> _Stage:
        resnet, blocks, *last = stage
        places = [place for block in blocks for place in _places(block)]
        quantized = None
        if self._scratch is not None:
            quantized = self._scratch.group([[layer.matrix for layer in place] for place in places], transposed=True)
        matrices = [self._side_by_side(place) for place in places] if quantized is None else quantized.matrices
        return _Stage(
            first=self._causal(resnet.block1),
            second=self._causal(resnet.block2),
            skip=self._conv(resnet.res_conv),
            blocks=[self._block(block, *matrices[4 * own : 4 * own + 4]) for own, block in enumerate(blocks)],
            quantized=quantized,
            last=self._conv(last[0]) if last else None,
        )

    def _side_by_side(self, layers: list[nn.Module]) -> Tensor:
        return self._matrix(torch.cat([layer.weight for layer in layers]))

    def _block(self, block: TransformerBlock, qkv: Tensor, out: Tensor, up: Tensor, down: Tensor) -> _Block:
        net = block.ff.net
        return _Block(
            norm1=self._norm(block.norm1),
            qkv=qkv,
            out=_Product(out, self._float(block.attn1.to_out[0].bias)),
            norm3=self._norm(block.norm3),
            up=_Product(up, self._float(net["0"]["proj"].bias)),
            down=_Product(down, self._float(net["2"].bias)),
        )

    def _causal(self, block: CausalBlock) -> _Causal:
        return _Causal(self._conv(block.block["0"]), self._norm(block.block["2"]))

    def _conv(self, conv: nn.Conv1d) -> _Product:
        """(outputs, inputs, taps) becomes (taps x inputs, outputs)."""
        return _Product(self._matrix(conv.weight.transpose(1, 2).flatten(1)), self._float(conv.bias))

    def _norm(self, norm: nn.LayerNorm) -> _Norm:
        return _Norm(self._float(norm.weight), self._float(norm.bias))

    def _matrix(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) to (inputs, outputs)."""
        return weight.detach().to(self.device, self.dtype).T.contiguous()

    def _float(self, values: Tensor | None) -> Tensor:
        assert values is not None
        return values.detach().to(self.device, torch.float32).contiguous()


def _places(block: TransformerBlock) -> list[list[nn.Module]]:
    """The linear layers of a block; those of a list are one product."""
    attend, net = block.attn1, block.ff.net
    return [[attend.to_q, attend.to_k, attend.to_v], [attend.to_out[0]], [net["0"]["proj"]], [net["2"]]]
