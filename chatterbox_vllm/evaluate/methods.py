"""What a method does to linear layers, in plain torch on any device: its rounding without its speed.

Weights are rounded as the engine rounds them, and kept as float32. ``int8`` and ``fp8`` round what a layer is given,
too, a row at a time, as T3's kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.checkpoint import Checkpoint, locate
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.matrices import Matrix, quantize_linears
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import STRATEGIES, Method, Policy, canonical
from chatterbox_vllm.t3.folder import infer_config

_FP8_LARGEST: Final = torch.finfo(torch.float8_e4m3fn).max
_EVERYWHERE: Final = (Method.NONE, Method.BNB_4BIT, Method.BNB_8BIT, Method.INT8)
"""Methods that both stages have."""


class Contender(NamedTuple):
    """A checkpoint, and how its networks are quantised."""

    checkpoint: Checkpoint
    policy: Policy


def contender(word: str, checkpoint: Checkpoint, origin: str) -> Contender:
    """What the command line calls A or B.

    Args:
        word: a method, for every network that it suits; a strategy; a file, which is a profile; or a folder, which is
            another checkpoint, such as one that ``chatterbox-vllm quantize`` wrote.
        checkpoint: whose weights a method, a strategy or a profile quantises.
        origin: the option's name, for errors.

    Raises:
        CheckpointError: the folder is no checkpoint.
        ConfigurationError: nothing of that name, or no such method for this checkpoint.
    """
    if Path(word).is_dir():
        checkpoint, policy = locate(word), Policy()
    else:
        policy = _policy(word, origin)
    stored = Stored.of(checkpoint.t3)
    policy = policy.of_file(stored)
    if stored.method == Method.NONE:
        return Contender(checkpoint, policy)
    if policy.t3 not in (Method.NONE, stored.method):
        raise ConfigurationError(
            f"{origin} {word}: the T3 of {checkpoint.folder} is {stored.method} already; give the model that it was "
            "made from",
            param=origin,
        )
    return Contender(checkpoint, policy.but(t3=stored.method))


def _policy(word: str, origin: str) -> Policy:
    if Path(word).is_file():
        return Policy.from_file(word)
    method = canonical(word, origin)
    if method in _EVERYWHERE:
        return Policy(method, method, method)
    if word in STRATEGIES:
        return STRATEGIES[word]
    if method == Method.FP8:
        return Policy(method)
    if method == Method.AWQ:
        raise ConfigurationError(
            f"{origin} {word}: give the folder that chatterbox-vllm quantize wrote in its place", param=origin
        )
    known = ", ".join([*_EVERYWHERE, Method.FP8, *(name for name in STRATEGIES if name != Method.NONE)])
    raise ConfigurationError(
        f"{origin} {word}: choose {known}, a profile's file, or the folder of a quantised checkpoint", param=origin
    )


def check_comparable(a: Contender, b: Contender) -> None:
    """Refuses two that do not read the same text: what one's ids mean is another thing, or nothing, to the other.

    Raises:
        CheckpointError: a T3 is none.
        ConfigurationError: names both.
    """
    vocabularies = [infer_config(each.checkpoint.t3).text_vocabulary for each in (a, b)]
    languages = [each.checkpoint.variant.is_multilingual for each in (a, b)]
    if vocabularies[0] == vocabularies[1] and languages[0] == languages[1]:
        return
    told_a, told_b = (
        f"{each.checkpoint.folder} is {each.checkpoint.variant} and reads {count} text tokens"
        for each, count in zip((a, b), vocabularies, strict=True)
    )
    raise ConfigurationError(
        f"--method and --against cannot be compared: A, {told_a}; B, {told_b}; give two of one variant, the --model's "
        "if one of them is no folder",
        param="--method",
    )


def quantize(module: nn.Module, method: str) -> None:
    """Has every ``nn.Linear`` below ``module`` compute as ``method`` has it.

    Args:
        module: float32 on the CPU.
        method: a ``Method``; of ``awq`` the weights are rounded already.

    Raises:
        ConfigurationError, MissingDependency: see ``matrices.quantized``.
    """
    if method == Method.FP8:
        for name, linear in list(module.named_modules()):
            if isinstance(linear, nn.Linear):
                module.set_submodule(name, Rounded(_to_float8(linear.weight), linear.bias, _to_float8))
    elif method != Method.AWQ:
        quantize_linears(module, method, partial(_decoded, _INPUTS.get(method)))


def _decoded(inputs: Rounding | None, matrix: Matrix, bias: nn.Parameter | None) -> Rounded:
    return Rounded(matrix.dequantize(torch.float32), bias, inputs)


class Rounded(nn.Module):
    """A linear layer with rounded weights.

    Args:
        weight: (outputs, inputs) float32.
        bias: (outputs,), or None.
        inputs: rounds what comes in; None leaves it as it is.
    """

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, inputs: Rounding | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self._inputs = inputs

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return F.linear(x if self._inputs is None else self._inputs(x), self.weight, self.bias)


def _to_int8(rows: Tensor) -> Tensor:
    """(..., n) with each row rounded to 255 steps between its largest absolute values."""
    scale = _largest(rows) / 127.0
    return (rows / scale).round() * scale


def _to_float8(rows: Tensor) -> Tensor:
    """(..., n) rounded to float8 (e4m3), scaled so that each row's largest value is float8's."""
    scale = _largest(rows) / _FP8_LARGEST
    return (rows / scale).to(torch.float8_e4m3fn).to(rows.dtype) * scale


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


Rounding = Callable[[Tensor], Tensor]
_INPUTS: Final[Mapping[str, Rounding]] = MappingProxyType({Method.INT8: _to_int8})
