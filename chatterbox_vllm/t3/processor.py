"""The voice prefix as vLLM's multimodal item.

Requests arrive fully processed (``generator``): the processor only serves vLLM's profiling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from chatterbox_vllm.t3.positions import VOICE_LENGTH

VOICE = "voice"
"""The modality's name."""


def voice_item(prefix: Tensor, steps: int) -> MultiModalKwargsItem:
    """One request's voice: ``prefix`` (34, H) of the model's dtype, and its guidance weight in ``weight_steps``."""
    return MultiModalKwargsItem(
        {
            "voice": MultiModalFieldElem(prefix, MultiModalBatchedField()),
            "weight": MultiModalFieldElem(torch.tensor(steps), MultiModalBatchedField(keep_on_cpu=True)),
        }
    )


def engine_input(tokens: list[int], prefix: Tensor, steps: int, key: str) -> MultiModalInput:
    """A rendered prompt. ``key`` names the prefix's content: equal keys share vLLM's encoder cache."""
    return mm_input(
        prompt_token_ids=tokens,
        mm_kwargs=MultiModalKwargsItems({VOICE: [voice_item(prefix, steps)]}),
        mm_hashes={VOICE: [key]},
        mm_placeholders={VOICE: [PlaceholderRange(offset=0, length=VOICE_LENGTH)]},
    )


class VoiceInfo(BaseProcessingInfo):
    """Each prompt has exactly one voice."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {VOICE: 1}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {VOICE: VOICE_LENGTH}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}


class DummyVoice(BaseDummyInputsBuilder[VoiceInfo]):
    """What vLLM profiles with: no data, the processor makes zeros."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        return {}


class VoiceProcessor(BaseMultiModalProcessor[VoiceInfo]):
    """Answers vLLM's profiling with a voice of zeros; there is no Hugging Face processor to call."""

    requires_tokenizer = False

    def apply(self, inputs: Any, timing_ctx: Any) -> MultiModalInput:
        config = self.info.get_hf_config()
        prefix = torch.zeros(VOICE_LENGTH, config.hidden_size, dtype=self.info.ctx.model_config.dtype)
        return engine_input([config.placeholder_id] * VOICE_LENGTH, prefix, 0, "profile")

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        raise TypeError("T3's prompts are built by chatterbox_vllm.t3.prompt, not by a Hugging Face processor")

    def _get_prompt_updates(self, *args: Any, **kwargs: Any) -> Sequence[Any]:
        raise TypeError("T3's prompts are built by chatterbox_vllm.t3.prompt, not by a Hugging Face processor")
