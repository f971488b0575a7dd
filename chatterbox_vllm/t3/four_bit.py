"""Linear layers in 4 bits on Hopper cards, as vLLM's kernel for them: T3's matrices are small, and so is a step.

There vLLM takes Machete, which is made for matrices that fill the card: with those of a T3 layer and a step of 64
requests (128 rows) it takes twice as long as cuBLAS in 16 bits. Ours cuts them into as many programs as the card runs
at once, and reads a quarter of the bytes. For many rows, a prompt's, the matrix is widened to 16 bits in memory before
cuBLAS multiplies, which costs those little. docs/benchmarks.md has the figures.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.model_executor.parameter import permute_param_layout_
from vllm.platforms import PlatformEnum, current_platform
from vllm.scalar_type import scalar_types
from vllm.utils.math_utils import cdiv
from vllm.utils.platform_utils import num_compute_units
from vllm.utils.torch_utils import direct_register_custom_op

from chatterbox_vllm.quantization.packing import GROUP_SIZES, unpack

HOPPER: Final = 90
"""The compute capability on which it was measured; others have tensor cores of another kind."""
FEW: Final = 256
"""Rows up to which the matrix is multiplied as it is."""
TILES: Final = ((128, 64), (64, 64), (64, 32), (64, 16))
"""Outputs and rows of a program, the largest first."""
BUSY: Final = 2 / 3
"""Of the multiprocessors should have a program: the largest tile that leaves no more of them idle was the fastest of an
H200, or close to it."""
LEAST_INPUTS: Final = 1024
"""Of a sum's share; a share is a multiple of it."""
MAGIC: Final = {torch.bfloat16: (0x4300, 128), torch.float16: (0x6400, 1024)}
"""Bits that make a number of the lowest bits of a mantissa, and its value without them."""
_PLANE: Final = 64
_ADDED: Final = 1024
"""Sums of a program of ``add``."""
_WIDENED: Final = 64
"""Outputs of a program of ``widen``."""


class Tile(NamedTuple):
    """How a product is cut into programs.

    Args:
        outputs, rows: of a program.
        splits: programs among which a sum is shared out.
        stages: blocks of inputs that are in flight.
    """

    outputs: int
    rows: int
    splits: int
    stages: int

    @classmethod
    def of(cls, rows: int, outputs: int, inputs: int, multiprocessors: int) -> Tile:
        """For x (rows, inputs), ``rows`` at most ``FEW``, by a matrix (outputs, inputs)."""
        wanted = BUSY * multiprocessors
        for wide, high in TILES:
            if outputs % wide or (rows <= high // 2 and (wide, high) != TILES[-1]):
                continue
            programs, splits = outputs // wide * cdiv(rows, high), 1
            while programs * splits < wanted and inputs % (2 * splits * LEAST_INPUTS) == 0:
                splits *= 2
            chosen = cls(wide, high, splits, stages=3 if programs * splits <= multiprocessors else 2)
            if programs * splits >= wanted:
                break
        return chosen


def plane(group_size: int) -> int:
    """Inputs whose codes lie in the same four bits of words side by side."""
    return min(_PLANE, group_size)


def arranged(codes: Tensor, group_size: int) -> Tensor:
    """(outputs, inputs) uint8 codes -> (outputs, inputs / 4) int16, as ``four_bit_kernels`` reads them."""
    planes = codes.to(torch.int32).unflatten(1, (-1, 4, plane(group_size))).unbind(2)
    return sum(each << 4 * place for place, each in enumerate(planes)).to(torch.int16).flatten(1)


def joined(scale: Tensor, zero: Tensor) -> Tensor:
    """Scales (outputs, groups) in half precision, and codes that mean 0 -> (groups, outputs) int32, likewise."""
    codes = (zero.to(torch.int32) + MAGIC[scale.dtype][1]).to(scale.dtype)
    lower, upper = (each.view(torch.int16).to(torch.int32) for each in (scale.contiguous(), codes.contiguous()))
    return (upper << 16 | lower & 0xFFFF).T.contiguous()


def multiplied(x: Tensor, codes: Tensor, groups: Tensor, group_size: int) -> Tensor:
    """x (rows, inputs) in half precision, ``arranged`` codes and ``joined`` groups -> (rows, outputs)."""
    from chatterbox_vllm.t3 import four_bit_kernels as kernels  # Triton is where a GPU is

    (rows, inputs), outputs = x.shape, codes.shape[0]
    layout = {"INPUTS": inputs, "GROUP": group_size, "PLANE": plane(group_size), "MAGIC": MAGIC[x.dtype][0]}
    if rows > FEW:
        weight = x.new_empty(outputs, inputs)
        grid = (outputs // _WIDENED, inputs // (4 * plane(group_size)))
        kernels.widen[grid](codes, groups, weight, outputs, **layout, OUTPUTS=_WIDENED, ON_CARD=x.is_cuda)
        return nn.functional.linear(x, weight)
    tile = Tile.of(rows, outputs, inputs, num_compute_units())
    out = x.new_empty(rows, outputs)
    parts = out if tile.splits == 1 else x.new_empty(tile.splits, rows, outputs, dtype=torch.float32)
    kernels.multiply[(outputs // tile.outputs, cdiv(rows, tile.rows), tile.splits)](
        *(x.contiguous(), codes, groups, parts, rows, outputs),
        **layout,
        OUTPUTS=tile.outputs,
        ROWS=tile.rows,
        SPLITS=tile.splits,
        STAGES=tile.stages,
        ON_CARD=x.is_cuda,
    )
    if tile.splits > 1:
        size = out.numel()
        kernels.add[(cdiv(size, _ADDED),)](parts, out, size, SPLITS=tile.splits, BLOCK=_ADDED)
    return out


def _shaped(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


direct_register_custom_op("chatterbox_four_bit", multiplied, fake_impl=_shaped)


class FourBitLinear(MPLinearKernel):
    """vLLM's kernel of a layer that ``chatterbox-vllm quantize`` made."""

    @classmethod
    def get_min_capability(cls) -> int:
        """As vLLM asks for it; ``offer`` knows it exactly."""
        return HOPPER

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        """Whether ``multiplied`` knows such a layer, and else why not."""
        inputs, outputs = c.partition_weight_shape
        if c.weight_type != scalar_types.uint4 or not c.zero_points or c.group_size not in GROUP_SIZES:
            return False, "it knows 4 bits with zero points, in groups of 32, 64 or 128"
        if c.act_type not in MAGIC:
            return False, "it knows activations in bfloat16 and float16"
        if inputs % max(4 * plane(c.group_size), c.group_size) or outputs % TILES[-1][0]:
            return False, f"it cannot cut a matrix of {outputs} x {inputs}"
        return True, None

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Arranges the checkpoint's tensors (``packing``) anew."""
        codes, scale, zero = self._get_weight_params(layer)
        assert zero is not None
        assert self.w_zp_name is not None
        permute_param_layout_(codes, input_dim=1, output_dim=0, packed_dim=1)
        permute_param_layout_(scale, input_dim=1, output_dim=0)
        permute_param_layout_(zero, input_dim=1, output_dim=0, packed_dim=0)
        groups = joined(scale.data, unpack(zero.data.T, 4).T)
        replace_parameter(layer, self.w_q_name, arranged(unpack(codes.data, 4), self.config.group_size))
        replace_parameter(layer, self.w_s_name, groups)
        delattr(layer, self.w_zp_name)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        codes, groups, _ = self._get_weight_params(layer)
        flat = x.reshape(-1, x.shape[-1])
        product = torch.ops.vllm.chatterbox_four_bit(flat, codes, groups, self.config.group_size)
        product = product.reshape(*x.shape[:-1], codes.shape[0])
        return product if bias is None else product + bias


def offer() -> None:
    """Has vLLM, in this process, try ``FourBitLinear`` before its own kernels, on the cards that it is for."""
    kernels = linear._POSSIBLE_KERNELS.get(PlatformEnum.CUDA, [])
    if current_platform.is_cuda() and current_platform.is_device_capability(HOPPER) and FourBitLinear not in kernels:
        kernels.insert(0, FourBitLinear)
