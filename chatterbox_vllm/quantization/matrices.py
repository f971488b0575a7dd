"""Matrices in few bits, and linear layers that hold them.

Both kinds are bitsandbytes' own: what it stores, and to the bit what it decodes. Four bits are NF4: one of sixteen
values a weight, scaled in blocks of 64, the scales in eight bits (double quantisation). Eight bits are LLM.int8's: a
scale a row. Matrices are quantised on the CPU, where the result is the same whatever card they go to, and outside of
CUDA graphs and streams, of which bitsandbytes' own quantisation on a card knows nothing.

Only NF4 needs bitsandbytes to be installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, ClassVar, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.errors import ConfigurationError, MissingDependency
from chatterbox_vllm.quantization.packing import row_codes
from chatterbox_vllm.quantization.policy import Method

BLOCK: Final = 64
"""Weights of NF4 that share a scale; they lie side by side in a row."""
OUTER_BLOCK: Final = 256
"""Scales of NF4 that share a scale of their own."""
INT8_SHARE: Final = 0.007874015718698502
"""1 / 127, as bitsandbytes writes it: a code of int8 as a share of its row's largest value."""
_COMMAND: Final = "pip install 'bitsandbytes>=0.50.2,<0.51'"


@dataclass(frozen=True, eq=False)
class FourBit:
    """(outputs, inputs) in NF4 with double quantisation. A weight is ``values[code] * scale`` of its block.

    Args:
        codes: (weights / 2,) uint8, row by row; the first of two weights is in the high bits.
        scales: (weights / 64,) uint8; a scale is ``scale_values[code] * outer + offset``.
        outer: (weights / 64 / 256, rounded up) float32.
        offset: () float32.
        shape: of the matrix.
    """

    codes: Tensor
    scales: Tensor
    outer: Tensor
    offset: Tensor
    shape: tuple[int, int]
    bits: ClassVar[int] = 4

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.outer, self.offset))

    def to(self, device: torch.device) -> FourBit:
        codes, scales = self.codes.to(device), self.scales.to(device)
        return FourBit(codes, scales, self.outer.to(device), self.offset.to(device), self.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(outputs, inputs) on the device where the codes are."""
        functional, (values, scale_values) = _functional(), tables(self.codes.device)
        state = functional.QuantState(
            absmax=self.scales,
            shape=(1, math.prod(self.shape)),  # with the matrix's own, a CPU can take the wrong scales
            code=values,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset,
            state2=functional.QuantState(
                absmax=self.outer, code=scale_values, blocksize=OUTER_BLOCK, dtype=torch.float32
            ),
        )
        decoded: Tensor = functional.dequantize_4bit(self.codes[:, None], state)
        return decoded.view(self.shape)


@dataclass(frozen=True, eq=False)
class EightBit:
    """(outputs, inputs) in int8. A weight is ``code * scale / 127``.

    Args:
        codes: (outputs, inputs) int8, from -127 to 127.
        scales: (outputs,) float32, the largest absolute value of each row.
    """

    codes: Tensor
    scales: Tensor
    bits: ClassVar[int] = 8

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.codes.shape
        return outputs, inputs

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> EightBit:
        return EightBit(self.codes.to(device), self.scales.to(device))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """(outputs, inputs) on the device where the codes are."""
        return (self.codes * self.scales[:, None] * INT8_SHARE).to(dtype)


Matrix = FourBit | EightBit


def quantized(weight: Tensor, method: str) -> Matrix:
    """A matrix in few bits.

    Args:
        weight: (outputs, inputs) float32 on the CPU.
        method: ``bnb-4bit``, ``bnb-8bit`` or ``int8``; the last two are stored alike.

    Raises:
        ConfigurationError: the method is none of these.
        MissingDependency: NF4 without bitsandbytes.
    """
    if method == Method.BNB_4BIT:
        return _four_bit(weight)
    if method in {Method.BNB_8BIT, Method.INT8}:
        return EightBit(*row_codes(weight))
    raise ConfigurationError(f"{method!r} is no method for matrices; use bnb-4bit, bnb-8bit or int8", param="method")


def _four_bit(weight: Tensor) -> FourBit:
    codes, state = _functional().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    outputs, inputs = weight.shape
    return FourBit(codes.flatten(), state.absmax, state.state2.absmax, state.offset, (outputs, inputs))


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """NF4's (16,) values and the (256,) of its scales, float32 on ``device``."""
    functional = _functional()
    return functional.get_4bit_type("nf4", device=device), functional.create_dynamic_map().to(device)


def _functional() -> ModuleType:
    try:
        from bitsandbytes import functional  # an extra of CUDA installations; importing it takes a second
    except ImportError as error:
        raise MissingDependency("bitsandbytes", purpose="for bnb-4bit", command=_COMMAND) from error
    module: ModuleType = functional
    return module


class QuantizedLinear(nn.Module):
    """``nn.Linear`` whose matrix is decoded when it is used.

    Args:
        matrix: of the layer.
        bias: (outputs,), or None.
    """

    def __init__(self, matrix: Matrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs), in the dtype of ``x``."""
        return F.linear(x, self.matrix.dequantize(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves with its module. The matrix keeps its dtypes when the module's change."""
        self.matrix = self.matrix.to(fn(torch.empty(0)).device)
        return super()._apply(fn, recurse)


def quantize_linears(
    module: nn.Module, method: str, layer: Callable[[Matrix, nn.Parameter | None], nn.Module] = QuantizedLinear
) -> None:
    """Puts a quantised layer in the place of every ``nn.Linear`` below ``module``. Nothing changes if one fails.

    Args:
        module: float32 on the CPU.
        method: see ``quantized``; ``none`` does nothing.
        layer: what holds a matrix and a bias.

    Raises:
        ConfigurationError, MissingDependency: see ``quantized``.
    """
    if method == Method.NONE:
        return
    linears = {name: linear for name, linear in module.named_modules() if isinstance(linear, nn.Linear)}
    layers = {name: layer(quantized(linear.weight, method), linear.bias) for name, linear in linears.items()}
    for name, made in layers.items():
        module.set_submodule(name, made)


def matrices_of(module: nn.Module) -> Iterator[Matrix]:
    """Those of the quantised layers below ``module``, itself included."""
    return (layer.matrix for layer in module.modules() if isinstance(layer, QuantizedLinear))
