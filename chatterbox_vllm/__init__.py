"""Chatterbox text to speech on vLLM. Importing this package imports neither torch nor vLLM."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from chatterbox_vllm.quiet import quieten

if TYPE_CHECKING:
    from chatterbox_vllm.arguments import get_optimal_dtype
    from chatterbox_vllm.engine import AsyncChatterbox
    from chatterbox_vllm.tts import ChatterboxMultilingualTTS, ChatterboxTTS
    from chatterbox_vllm.types import SpeechOptions, SpeechRequest, VoiceFeatures

__version__ = "0.1.0"
_HOMES = {
    "get_optimal_dtype": "arguments",
    "AsyncChatterbox": "engine",
    "ChatterboxTTS": "tts",
    "ChatterboxMultilingualTTS": "tts",
    "SpeechOptions": "types",
    "SpeechRequest": "types",
    "VoiceFeatures": "types",
}
__all__ = [
    "AsyncChatterbox",
    "ChatterboxMultilingualTTS",
    "ChatterboxTTS",
    "SpeechOptions",
    "SpeechRequest",
    "VoiceFeatures",
    "get_optimal_dtype",
]

quieten()  # before vLLM is imported


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
