"""The estimator's products on a CPU in float32, faster, but for the last bits.

Nearly all that the vocoder does there is products with the same matrices, again and again. Here a matrix is laid out
once as oneDNN's kernel reads it, which applies the activation, too, while the numbers are in its registers. A
convolution is one such product: side by side, a frame and those before it. The sums are upstream's in another order,
so a mel differs by a hundred-thousandth or so, as upstream's own does with another number of threads; and the pitch,
summed up in a phase, makes that some ten-thousandths of a sample (see ``source``).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.vocoder.estimator import CausalConv, Estimator, GeluProjection, Pointwise, TimeEmbedding

_CAPABILITIES: Final = ("AVX2", "AVX512")
"""Instruction sets for which oneDNN has kernels; for others it would be slow."""


class PackedLinear(nn.Module):
    """``nn.Linear``, and what follows it.

    Args:
        weight: (outputs, inputs) float32.
        bias: (outputs,), or None.
        activation: ``none``, or ``gelu``, the exact one.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str = "none") -> None:
        super().__init__()
        # Neither parameter nor buffer: it can be moved and read by nobody else.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self._bias = bias
        self._activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        # Contiguous: for anything else oneDNN has no fast kernel.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.contiguous(), self._weight, self._bias, self._activation, [], "none"
        )
        return product


class PackedConv(nn.Module):
    """``CausalConv``."""

    def __init__(self, conv: CausalConv) -> None:
        super().__init__()
        (self._taps,) = conv.kernel_size
        self._linear = PackedLinear(conv.weight.transpose(1, 2).flatten(1), conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, inputs) to (B, T, outputs)."""
        length = x.shape[1]
        x = F.pad(x, (0, 0, self._taps - 1, 0))
        return self._linear(torch.cat([x[:, tap : tap + length] for tap in range(self._taps)], dim=-1))


def pack(estimator: Estimator) -> None:
    """Packs the layers of a float32 estimator on a CPU, in place, where oneDNN is; what is quantised stays."""
    has_kernels = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in _CAPABILITIES
    # They are torch's own, for its compiler, and another version may name them otherwise.
    if has_kernels and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise")):
        _pack_below(estimator)


def _pack_below(module: nn.Module) -> None:
    for name, layer in list(module.named_children()):
        made = _packed(layer)
        if made is not None:
            module.set_submodule(name, made)
        elif not isinstance(layer, TimeEmbedding):  # is computed once
            _pack_below(layer)


def _packed(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, GeluProjection) and isinstance(layer["proj"], nn.Linear):
        return PackedLinear(layer["proj"].weight, layer["proj"].bias, "gelu")
    if isinstance(layer, CausalConv):
        return PackedConv(layer)
    if isinstance(layer, Pointwise):
        return PackedLinear(layer.weight.squeeze(-1), layer.bias)
    if isinstance(layer, nn.Linear):
        return PackedLinear(layer.weight, layer.bias)
    return None
