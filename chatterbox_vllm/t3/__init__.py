"""T3, the text-to-speech-token Llama, as a vLLM model.

One vLLM request is one utterance. What a forward pass must know of a request (its guidance weight and learned
positions) travels in the M-RoPE positions (``positions``); its voice travels as one multimodal item (``processor``);
guidance runs as doubled attention heads (``backbone``). Importing this package imports none of it.
"""

from __future__ import annotations

ARCHITECTURE = "ChatterboxT3"


def register() -> None:
    """Makes vLLM know the model; the ``vllm.general_plugins`` entry point, run in every process of an engine."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from chatterbox_vllm.t3.config import T3Config
    from chatterbox_vllm.t3.orphans import end_with_parent

    AutoConfig.register(T3Config.model_type, T3Config, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "chatterbox_vllm.t3.model:ChatterboxT3")
    end_with_parent()
