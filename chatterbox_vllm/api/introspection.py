"""``GET /config`` and ``GET /memory``: how this server was set up, and what it takes.

The paths and the fields ``quantization`` and ``memory_info`` are those of travisvn/chatterbox-tts-api. Nothing here
tells of keys, nor of the machine's files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any, Final

import psutil
from fastapi import APIRouter

from chatterbox_vllm import __version__
from chatterbox_vllm.api.services import ServicesOf
from chatterbox_vllm.settings import Settings
from chatterbox_vllm.types import OPTION_RANGES

router = APIRouter(tags=["introspection"])

SHOWN: Final = (
    "preset",
    "device",
    "dtype",
    "max_batch_size",
    "max_model_len",
    "gpu_memory_utilization",
    "vram_budget",
    "vocoder_device",
    "vocoder_process",
    "vocoder_dtype",
    "max_chunk_length",
    "watermark",
)
"""Settings that say nothing about the machine and keep no secret."""
_MB: Final = 2**20


@router.get("/config")
async def config(services: ServicesOf) -> dict[str, Any]:
    """What is loaded, and the settings that shaped it.

    ``quantization`` is one word: none, a method, or mixed; ``components`` has the bytes of each before and after.
    """
    engine = services.running_engine()
    info = engine.quantization_info()
    return {
        "api_info": {"name": "chatterbox-vllm", "version": __version__},
        "model": "chatterbox-multilingual" if engine.checkpoint.variant.is_multilingual else "chatterbox",
        "quantization": info["method"],
        "quantization_strategy": info["strategy"],
        "components": info["components"],
        "settings": {name: getattr(services.settings, name) for name in SHOWN},
        "defaults": _defaults(services.settings),
    }


@router.get("/memory")
async def memory(services: ServicesOf) -> dict[str, Any]:
    """What is in use. ``memory_info`` is in MiB; everything else in bytes: of each component, each process on the GPU,
    and, where there is one, the budget and what it was planned for."""
    known = await services.running_engine().memory()
    processes: list[dict[str, Any]] = known["processes"]
    gpu = {
        "gpu_memory_allocated_mb": _sum(processes, "allocated"),
        "gpu_memory_reserved_mb": _sum(processes, "reserved"),
        "gpu_memory_max_allocated_mb": _sum(processes, "peak"),
    }
    return {
        "memory_info": {**await asyncio.to_thread(_host), **gpu},
        "components": known["components"],
        "processes": processes,
        "budget": None if known["budget"] is None else {"bytes": known["budget"], "items": known["items"]},
    }


def _defaults(settings: Settings) -> dict[str, Any]:
    return {name: getattr(settings.options, name) for name in OPTION_RANGES}


def _sum(processes: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(each[name] for each in processes) / _MB


def _host() -> dict[str, float]:
    """The machine's memory that this process and those that it started hold; what they share counts for each."""
    server = psutil.Process()
    held = 0
    for process in (server, *server.children(recursive=True)):
        try:
            held += process.memory_info().rss
        except psutil.NoSuchProcess:  # it has just ended
            continue
    return {"cpu_memory_mb": held / _MB, "cpu_memory_percent": 100 * held / psutil.virtual_memory().total}
