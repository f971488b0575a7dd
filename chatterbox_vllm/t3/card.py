"""The memory of the card that T3 runs on."""

from __future__ import annotations

import torch
from vllm.platforms import current_platform
from vllm.third_party import pynvml

from chatterbox_vllm.memory import Memory


def card_memory() -> Memory:
    """The first card's, whoever uses it.

    NVML is asked where it answers: CUDA would first make this process a context, of some hundreds of MiB of it.
    """
    try:
        pynvml.nvmlInit()
        number = current_platform.visible_device_id_to_physical_device_id(0)
        known = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(number))
    except pynvml.NVMLError:  # such as on boards without it, and for a share of a card
        free, total = torch.cuda.mem_get_info()
        return Memory(total, free)
    return Memory(int(known.total), int(known.free))
