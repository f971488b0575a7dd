"""Copies between the CPU and the device that do not make the CPU wait for it.

A plain copy to a GPU waits until the GPU has done all that was asked of it before; from pinned memory it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the CPU, as ``device`` can fetch it without anybody waiting."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the CPU, there: in its turn, and without waiting for it."""
    return pinned(tensor, device).to(device, non_blocking=True)


@dataclass(frozen=True)
class Moment:
    """When a device has done all that it was asked for until now; None for one that has done it."""

    event: torch.cuda.Event | None

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        if device.type != "cuda":
            return cls(None)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return cls(event)

    @property
    def is_past(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


@dataclass(frozen=True, eq=False)
class Transfer:
    """A tensor on its way to the CPU; ``host`` holds it when its moment is past."""

    host: Tensor
    moment: Moment

    @classmethod
    def of(cls, tensor: Tensor) -> Transfer:
        """Sends ``tensor`` in its turn, without waiting for it."""
        if not tensor.is_cuda:
            return cls(tensor.cpu(), Moment(None))
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        return cls(host, Moment.now(tensor.device))

    def arrive(self) -> Tensor:
        """Waits for it, and gives it."""
        self.moment.wait()
        return self.host
