"""The Hugging Face configuration under which vLLM sees T3."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from chatterbox_vllm.t3.positions import POSITIONS
from chatterbox_vllm.types import SPEECH_VOCABULARY

HEAD_DIM = 64


class T3Config(PretrainedConfig):
    """Sizes of one T3 checkpoint, with upstream's ``LLAMA_520M_CONFIG_DICT`` for what does not vary.

    Args:
        text_vocabulary: rows of ``text_emb`` (704 English, 2454 multilingual).
        text_positions, speech_positions: rows of the learned position tables.
        mask_invalid_tokens: never sample ids that are no sound (6561, 6563..8193).
    """

    model_type = "chatterbox_t3"

    def __init__(
        self,
        *,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 30,
        text_vocabulary: int = 704,
        text_positions: int = 2050,
        speech_positions: int = 4100,
        mask_invalid_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = self.num_key_value_heads = hidden_size // HEAD_DIM
        self.head_dim = HEAD_DIM
        self.hidden_act = "silu"
        self.rms_norm_eps = 1e-5
        self.attention_bias = self.mlp_bias = False
        self.max_position_embeddings = POSITIONS
        self.rope_parameters = {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        # Outside rope_parameters on purpose: vLLM then feeds three rows of positions, and the rotary layer stays plain.
        self.mrope_section = [HEAD_DIM // 2, 0, 0]
        self.text_vocabulary = text_vocabulary
        self.text_positions = text_positions
        self.speech_positions = speech_positions
        self.mask_invalid_tokens = mask_invalid_tokens
        # speech ids, then text ids, then the placeholder of the voice prefix
        self.vocab_size = SPEECH_VOCABULARY + text_vocabulary + 1
        super().__init__(**kwargs)

    @property
    def placeholder_id(self) -> int:
        """The id that stands in a prompt where the voice prefix goes."""
        return self.vocab_size - 1
