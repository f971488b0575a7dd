"""What computes the networks: ``TorchBackend`` on any device, ``cuda.backend.CudaBackend`` faster on a CUDA card."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from chatterbox_vllm.vocoder import noise
from chatterbox_vllm.vocoder.batching import padded, row_mask
from chatterbox_vllm.vocoder.footprint import VocoderFootprint, footprint, savings
from chatterbox_vllm.vocoder.hift import Stretch
from chatterbox_vllm.vocoder.packed import pack
from chatterbox_vllm.vocoder.transfer import to_device
from chatterbox_vllm.vocoder.weights import Networks


class Backend(Protocol):
    """The networks, for batches of rows of different lengths. Results lie on the device."""

    @property
    def footprint(self) -> VocoderFootprint:
        """What the weights take."""
        ...

    def mu(self, tokens: Sequence[Tensor]) -> Tensor:
        """The flow's encoder: B times (n,) int64 on the CPU to (B, at least 2 n, 80) float32, padded."""
        ...

    def normals(self, keys: Tensor, first: Tensor, count: int, channels: int) -> Tensor:
        """``noise.normals`` as (B, count, channels)."""
        ...

    def solve(
        self, noise: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, lengths: Sequence[int], steps: int
    ) -> list[Tensor]:
        """``Flow.solve``: (B, T, 80) each, and (B, 80) for the speaker, to B times (length, 80)."""
        ...

    def hift(self, stretch: Stretch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """``Hift.forward``, a row at a time, which may be longer than it has frames; until the next call."""
        ...

    def warm_up(self, frames: int, hift_frames: int) -> None:
        """Has done beforehand what the first requests would wait for, for batches of up to so many frames."""
        ...


class TorchBackend:
    """The networks as they are.

    Args:
        networks: on their device. The estimator may be of any dtype; the rest is float32, computed as such: a CUDA
            device's TF32 stays off.
        exact: see ``stage.Vocoder``.
    """

    def __init__(self, networks: Networks, *, exact: bool = False) -> None:
        self._flow, self._hift = networks.flow, networks.mel2wav
        flow = networks.flow
        parts = {"flow_encoder": flow.encoder, "estimator": flow.estimator, "hift": self._hift, "other": flow}
        dtypes = {"flow_encoder": torch.float32, "estimator": flow.estimator.dtype}
        self.footprint = footprint(parts, savings(networks, dtypes))
        self._device = networks.flow.encoder_proj.weight.device
        if not exact and self._device.type == "cpu" and flow.estimator.dtype == torch.float32:
            pack(flow.estimator)

    def mu(self, tokens: Sequence[Tensor]) -> Tensor:
        with self._exactly():
            return self._flow.mu(to_device(padded(tokens), self._device), self._mask([len(row) for row in tokens]))

    def normals(self, keys: Tensor, first: Tensor, count: int, channels: int) -> Tensor:
        return noise.normals(keys, first, count, channels).transpose(1, 2)

    def solve(
        self, noise: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, lengths: Sequence[int], steps: int
    ) -> list[Tensor]:
        with self._exactly():
            mel = self._flow.solve(noise, mu, speaker, cond, self._mask(lengths), steps)
        return [row[:length] for row, length in zip(mel, lengths, strict=True)]

    def hift(self, stretch: Stretch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with self._exactly():
            return self._hift(stretch)

    def warm_up(self, frames: int, hift_frames: int) -> None:
        """Nothing is compiled here."""

    def _mask(self, lengths: Sequence[int]) -> Tensor | None:
        mask = row_mask(lengths, torch.device("cpu"))
        return None if mask is None else to_device(mask, self._device)

    def _exactly(self) -> AbstractContextManager[None]:
        if self._device.type != "cuda":
            return nullcontext()
        return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
