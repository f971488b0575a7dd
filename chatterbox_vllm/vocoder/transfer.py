"""Copies between the CPU and the device that do not make the CPU wait for it.

A plain copy to a GPU waits until the GPU has done all that was asked of it before; from pinned memory it does not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, which is on the CPU, there: in its turn, and without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Callable[[], Tensor]:
    """Sends ``tensor`` to the CPU in its turn. The result waits for that, and gives it."""
    if not tensor.is_cuda:
        return tensor.cpu
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record(torch.cuda.current_stream(tensor.device))

    def arrived() -> Tensor:
        sent.synchronize()
        return host

    return arrived
