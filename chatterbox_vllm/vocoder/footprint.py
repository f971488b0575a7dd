"""What a vocoder takes of its device's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from chatterbox_vllm.memory import torch_memory
from chatterbox_vllm.quantization.matrices import QuantizedLinear, matrices_of
from chatterbox_vllm.vocoder.weights import Networks, quantizable


@dataclass(frozen=True)
class VocoderFootprint:
    """Bytes.

    Args:
        weights: component to what its weights take on the device: ``flow_encoder``, ``estimator``, ``hift``, ``other``
            (embedding and projections) and, where matrices are decoded before they are used, ``scratch``.
        before: the same without quantisation.
        allocated: by torch on the device now; 0 on a CPU, where torch does not count.
        peak: the most that was allocated at once since the process began.
        reserved: what torch holds of the device, free pieces included.
    """

    weights: Mapping[str, int]
    before: Mapping[str, int]
    allocated: int = 0
    peak: int = 0
    reserved: int = 0


def footprint(parts: Mapping[str, Any], saved: Mapping[str, int]) -> VocoderFootprint:
    """Of weights in ``parts`` (see ``bytes_of``), quantisation of which has saved so much."""
    weights = bytes_of(parts)
    before = {name: size + saved.get(name, 0) for name, size in weights.items()}
    return VocoderFootprint(weights, before | ({"scratch": 0} if "scratch" in before else {}))


def measured(footprint: VocoderFootprint, device: torch.device) -> VocoderFootprint:
    """With what torch counts now."""
    return replace(footprint, **torch_memory(device)._asdict())


def savings(networks: Networks, dtypes: Mapping[str, torch.dtype]) -> dict[str, int]:
    """Component to the bytes by which quantised matrices are smaller than matrices of the given dtypes."""
    return {
        name: sum(
            math.prod(matrix.shape) * dtypes[name].itemsize - matrix.nbytes
            for part in parts
            for matrix in matrices_of(part)
        )
        for name, parts in quantizable(networks).items()
    }


def bytes_of(parts: Mapping[str, Any]) -> dict[str, int]:
    """Name to the memory of the tensors in a part: a tensor, a module, or dataclasses and lists of these.

    Memory that two parts share is the first one's.
    """
    seen: set[int] = set()
    sizes = dict.fromkeys(parts, 0)
    for name, part in parts.items():
        for tensor in _tensors(part):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                sizes[name] += storage.nbytes()
    return sizes


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()
        for layer in part.modules():
            if isinstance(layer, QuantizedLinear):
                yield from _tensors(layer.matrix)
    elif is_dataclass(part):
        yield from _tensors([getattr(part, field.name) for field in fields(part)])
    elif isinstance(part, list | tuple):
        for each in part:
            yield from _tensors(each)
