"""Activation-aware weight quantisation (AWQ) of a Llama's layers: the scaling that goes before rounding to 4 bits.

A few input channels of a linear layer carry large activations, so an error in their weights is heard most. AWQ
multiplies those columns by a factor before rounding and divides whatever feeds them by the same: the network computes
the same, but after rounding the error of those columns is smaller. The factor is *magnitude ** ratio* a channel, and
the ratio in [0, 1) is searched: the one with the smallest error of the layer's outputs on recorded activations. Ratio
0 is plain rounding, so on those activations the result is never worse.

Mirrors ``AWQ: Activation-aware Weight Quantization`` (Lin et al., 2023) and its code ``llm-awq``
(``auto_scale_block``), without its search for clipped ranges. It is our own because llm-compressor and AutoAWQ trace
whole models of ``transformers``: they know neither T3's two kinds of embedding nor its two rows of guidance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from chatterbox_vllm.quantization.packing import round_groups

STEPS: Final = 20
"""Ratios that are tried."""


class Fold(NamedTuple):
    """Layers that read the same input, and the one before, which can take their factor's inverse."""

    before: str
    after: tuple[str, ...]


FOLDS: Final = (
    Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fold("self_attn.v_proj", ("self_attn.o_proj",)),  # attention mixes positions, channel by channel
    Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Fold("mlp.up_proj", ("mlp.down_proj",)),  # its input is silu(gate) * up
)
READERS: Final = tuple(fold.after[0] for fold in FOLDS)
"""The modules whose inputs ``scale_layer`` wants."""


class Scaled(NamedTuple):
    """A layer ready to be rounded.

    Args:
        weights: as given to ``scale_layer``, float32; they compute the same.
        error: squared error of the linear layers' outputs after rounding, on the recorded activations.
        plain_error: the same without scaling.
    """

    weights: dict[str, Tensor]
    error: float
    plain_error: float


@torch.inference_mode()
def scale_layer(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], group_size: int) -> Scaled:
    """Scales one decoder layer.

    Args:
        weights: ``NAME.weight`` of the two norms (H,) and the seven linear layers (outputs, inputs), on one device.
        inputs: for each of ``READERS``, the activations (rows, inputs) that it reads.
        group_size: inputs that will share a 4-bit scale.
    """
    scaled = {name: weight.float() for name, weight in weights.items()}
    error = plain_error = 0.0
    for fold in FOLDS:
        rows = inputs[fold.after[0]].float()
        matrices = [scaled[f"{name}.weight"] for name in fold.after]
        factor, best, plain = best_factor(matrices, rows, group_size)
        error, plain_error = error + best, plain_error + plain
        for name in fold.after:
            scaled[f"{name}.weight"] = scaled[f"{name}.weight"] * factor
        before = scaled[f"{fold.before}.weight"]
        scaled[f"{fold.before}.weight"] = before / (factor if before.dim() == 1 else factor.unsqueeze(1))
    return Scaled(scaled, error, plain_error)


def best_factor(matrices: list[Tensor], rows: Tensor, group_size: int) -> tuple[Tensor, float, float]:
    """The columns' factor (inputs,) for matrices (outputs, inputs) that read the same ``rows`` (n, inputs), float32.

    Returns:
        the factor, the squared error of the outputs with it, and the one without.
    """
    magnitude = rows.abs().mean(0)
    errors: list[float] = []
    factors = [_factor(magnitude, step / STEPS) for step in range(STEPS)]
    for factor in factors:
        lost = torch.zeros((), device=rows.device)
        for matrix in matrices:
            rounded = round_groups(matrix * factor, group_size).decoded() / factor
            lost += (rows @ (rounded - matrix).T).square().sum()
        errors.append(float(lost))
    best = min(range(STEPS), key=errors.__getitem__)
    return factors[best], errors[best], errors[0]


def _factor(magnitude: Tensor, ratio: float) -> Tensor:
    """``magnitude ** ratio`` about 1: a group's scale must not drift away with it."""
    factor = magnitude.clamp(min=1e-6).pow(ratio).clamp(min=1e-4)
    return factor / (factor.max() * factor.min()).sqrt()
