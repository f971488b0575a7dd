"""What T3 takes in its engine's process: measured there, through vLLM's call of its workers (``worker``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase

EMBEDDINGS = ("tfmr.text_", "tfmr.speech_", "speech_head")


@dataclass(frozen=True)
class T3Footprint:
    """Bytes of T3, of all tensor-parallel ranks together.

    Args:
        linear: the weights of the linear layers, which a method quantises, with their scales.
        linear_before: the same unquantised, in the dtype of the activations.
        layers: how many linear layers there are: four a Llama layer, as vLLM merges some.
        embeddings: embeddings, learned positions and the speech head.
        rest: norms and the rotary table.
        allocated: torch's on the GPU at this moment, KV cache and graphs included; 0 on a CPU.
        peak: the most of that since the start.
        reserved: what torch holds of the GPU, free blocks included.
    """

    linear: int
    linear_before: int
    layers: int
    embeddings: int
    rest: int
    allocated: int
    peak: int
    reserved: int

    @property
    def weights(self) -> int:
        """All parameters and tables."""
        return self.linear + self.embeddings + self.rest

    def __add__(self, other: T3Footprint) -> T3Footprint:
        return T3Footprint(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})


def weigh(model: nn.Module) -> dict[str, int]:
    """The weights' part of ``T3Footprint``."""
    dtype = model.tfmr.speech_emb.weight.element_size()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, LinearBase)}
    in_linear = tuple(f"{name}." for name in linear)
    others = {name: tensor for name, tensor in _tensors(model) if not name.startswith(in_linear)}
    embeddings = sum(_bytes(tensor) for name, tensor in others.items() if name.startswith(EMBEDDINGS))
    return {
        "linear": sum(map(_linear_bytes, linear.values())),
        "linear_before": sum(_elements(module) * dtype for module in linear.values()),
        "layers": len(linear),
        "embeddings": embeddings,
        "rest": sum(map(_bytes, others.values())) - embeddings,
    }


def _linear_bytes(module: Any) -> int:
    held = sum(_bytes(tensor) for _, tensor in _tensors(module))
    held += sum(_bytes(tensor) for parameter in module.parameters() for tensor in _beside(parameter))
    if "weight" not in module._parameters:
        return held
    # On a CPU, oneDNN has packed the weights and keeps them for itself: of int8 nothing is left, else an empty tensor.
    weight = module.weight
    if weight is None:
        return held + _elements(module)
    return held if weight.numel() else held + _elements(module) * int(weight.element_size())


def _beside(parameter: Any) -> Iterator[Tensor]:
    """Scales that bitsandbytes' plugin hangs on a parameter instead of registering them."""
    states = getattr(parameter, "bnb_quant_state", {})
    for state in states.values():
        yield from (state.absmax, state.code)


def _elements(module: Any) -> int:
    return int(module.input_size_per_partition * module.output_size_per_partition)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
