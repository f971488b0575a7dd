"""How to get a vocoder, as something that can be sent to where it shall be."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.matrices import QuantizedLinear
from chatterbox_vllm.quantization.policy import VOCODER, Method
from chatterbox_vllm.vocoder.int8 import Int8Linear
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.weights import Networks, load, quantize

_ON_CPU: Final = (Method.NONE, Method.INT8)
_ON_GPU: Final = (Method.NONE, Method.BNB_4BIT, Method.BNB_8BIT, Method.INT8)


@dataclass(frozen=True)
class Blueprint:
    """How to get a vocoder: in two parts, because the first one needs none of the device's memory. It can be pickled.

    Args:
        path: s3gen.safetensors or s3gen.pt.
        device: see ``Vocoder``.
        dtype: see ``Vocoder``; None is the device's best (``best_dtype``), and on a CPU not ``exact``.
        flow_encoder, estimator: how linear layers of their blocks are quantised, ``none``, ``bnb-4bit``, ``bnb-8bit``
            or ``int8``. On a GPU the last two are the same; on a CPU only ``int8`` is possible, and computes with 8-bit
            activations, too.
        max_frames: see ``Vocoder``.

    Raises:
        ConfigurationError: the device cannot have the method.
    """

    path: Path
    device: str = "cpu"
    dtype: torch.dtype | None = None
    flow_encoder: str = Method.NONE
    estimator: str = Method.NONE
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for name in VOCODER:
            method, is_cpu = getattr(self, name), torch.device(self.device).type == "cpu"
            if method not in (_ON_CPU if is_cpu else _ON_GPU):
                raise ConfigurationError(
                    f"{name} cannot be {method} on {self.device}; use one of "
                    f"{', '.join(_ON_CPU if is_cpu else _ON_GPU)}",
                    param=name,
                )

    def read(self) -> Networks:
        """The networks, quantised, in this process's memory.

        Raises:
            CheckpointError: a key is missing, unknown or misshapen.
            MissingDependency: ``bnb-4bit`` without bitsandbytes.
        """
        networks = load(self.path)
        layer = Int8Linear if torch.device(self.device).type == "cpu" else QuantizedLinear
        quantize(networks, {name: getattr(self, name) for name in VOCODER}, layer)
        return networks

    def build(self, networks: Networks) -> Vocoder:
        """The vocoder on its device, which becomes this thread's; ready to speak at full speed."""
        device = torch.device(self.device)
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)
        dtype, exact = self.dtype or best_dtype(device), self.dtype is not None
        vocoder = Vocoder(networks, device=device, dtype=dtype, max_frames=self.max_frames, exact=exact)
        if device.type == "cuda":
            vocoder.warm_up()
            torch.cuda.empty_cache()  # what only loading and warming up needed is left to others
        return vocoder


def best_dtype(device: torch.device) -> torch.dtype:
    """What the estimator runs in, if nobody chooses: float32 on a CPU, on a GPU the half precision that it has."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
