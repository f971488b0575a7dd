"""The vLLM model: ``GuidedLlama``, the head, and the interfaces vLLM asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec

from chatterbox_vllm.t3.backbone import GuidedLlama
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.positions import prompt_positions
from chatterbox_vllm.t3.processor import DummyVoice, VoiceInfo, VoiceProcessor
from chatterbox_vllm.types import SPEECH_VOCABULARY, START_SPEECH, STOP_SPEECH

# computed in front of the engine, or never used in inference
UNUSED_WEIGHTS = ("tfmr.embed_tokens.", "text_head.", "cond_enc.")
RENAMED_WEIGHTS = {
    "text_emb.": "tfmr.text_emb.",
    "speech_emb.": "tfmr.speech_emb.",
    "text_pos_emb.emb.": "tfmr.text_pos_emb.",
    "speech_pos_emb.emb.": "tfmr.speech_pos_emb.",
}


@MULTIMODAL_REGISTRY.register_processor(VoiceProcessor, info=VoiceInfo, dummy_inputs=DummyVoice)
class ChatterboxT3(nn.Module, SupportsMultiModal, SupportsMRoPE, SupportsQuant):
    """T3 for vLLM. Ids: speech 0..8193, text from 8194, then the voice placeholder.

    Args:
        raw_logits: the sampler masks ids itself, so that ``compute_logits`` is the head's product alone; see ``state``.
    """

    requires_raw_input_tokens = True
    raw_logits = False
    hf_to_vllm_mapper = GuidedLlama.hf_to_vllm_mapper
    packed_modules_mapping = {  # noqa: RUF012 (vLLM's interface)
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: T3Config = vllm_config.model_config.hf_config
        self.config = config
        self.tfmr = GuidedLlama(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "tfmr"))
        # never quantised: it is small, and every token goes through it
        self.speech_head = ParallelLMHead(
            SPEECH_VOCABULARY, config.hidden_size, prefix=maybe_prefix(prefix, "speech_head")
        )
        self.logits_processor = LogitsProcessor(SPEECH_VOCABULARY)
        self.register_buffer("unspoken", unspoken_ids(config.mask_invalid_tokens), persistent=False)

    def get_language_model(self) -> nn.Module:
        return self

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """The voice prefixes, (34, H) each, as they were computed in front of the engine."""
        return list(kwargs["voice"])

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """(N,) ids -> (N, H): voice vectors in their places. ``GuidedLlama`` embeds the ids."""
        table = self.tfmr.speech_emb.weight
        embeds = table.new_zeros(len(input_ids), table.shape[1])
        if multimodal_embeddings is not None and len(multimodal_embeddings) > 0:
            assert is_multimodal is not None
            embeds[is_multimodal.to(embeds.device)] = torch.cat(list(multimodal_embeddings)).to(embeds)
        return embeds

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """See ``positions``. A prompt without a voice is vLLM's own warm-up."""
        if START_SPEECH not in input_tokens or not mm_features:
            return torch.arange(len(input_tokens)).expand(3, -1), 0
        (voice,) = mm_features
        assert voice.data is not None, "the multimodal processor cache must be off"
        return prompt_positions(input_tokens, int(voice.data["weight"].data))

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """input_ids (N,), positions (3, N), inputs_embeds (N, H) -> (N, H), guided."""
        assert input_ids is not None
        assert inputs_embeds is not None
        return self.tfmr(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(N, H) -> (N, vocabulary), ``masked``; or with ``raw_logits`` (N, 8194), speech ids' alone."""
        logits = self.logits_processor(self.speech_head, hidden_states)
        if logits is None or self.raw_logits:  # None for a tensor-parallel rank that does not sample
            return logits
        return self.masked(logits)

    def masked(self, logits: Tensor) -> Tensor:
        """(N, 8194) -> (N, vocabulary); text ids and, unless parity is asked for, unspoken ids are -inf."""
        logits.index_fill_(1, self.unspoken, float("-inf"))
        return nn.functional.pad(logits, (0, self.config.vocab_size - SPEECH_VOCABULARY), value=float("-inf"))

    @staticmethod
    def get_model_state_cls() -> type:
        """vLLM's interface; of its V2 model runner, which the CPU build lacks."""
        from chatterbox_vllm.t3.state import GuidedModelState

        return GuidedModelState

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        dtype = self.tfmr.speech_emb.weight.dtype
        return AutoWeightsLoader(self).load_weights(_used(weights, dtype), mapper=self.hf_to_vllm_mapper)


def unspoken_ids(mask: bool) -> Tensor:
    """(k,) int64 ids that upstream can sample though they are no sound: 6561 and 6563..8193."""
    ids = [START_SPEECH, *range(STOP_SPEECH + 1, SPEECH_VOCABULARY)] if mask else []
    return torch.tensor(ids, dtype=torch.int64)


def _used(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in weights:
        if name.startswith(UNUSED_WEIGHTS):
            continue
        for old, new in RENAMED_WEIGHTS.items():
            name = name.replace(old, new) if name.startswith(old) else name
        keeps = name.endswith(("norm.weight", ".weight_scale")) or not tensor.is_floating_point()
        yield name, tensor if keeps else tensor.to(dtype)
