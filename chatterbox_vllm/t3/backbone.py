"""T3's Llama under classifier-free guidance: upstream's ``T3.inference`` loop body, for many requests at once.

Each of N scheduled tokens becomes two rows, conditional and unconditional, interleaved. The linear layers see 2N rows;
for attention the pair becomes one token with twice the heads, so both halves share their cache blocks and cannot drift
apart. The guided logits are linear in the hidden state: guidance happens after the final norm, and the head runs once.

``GuidedLlama`` is the unit of compilation and of CUDA graphs: its inputs are vLLM's own persistent buffers. With a
smaller unit (vLLM's ``LlamaModel``) the doubled rows would be temporaries made outside the graph, which would replay
with stale addresses.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.llama import LlamaMLP
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from chatterbox_vllm.t3 import four_bit
from chatterbox_vllm.t3.attention import attention_backend
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.positions import ORIGIN, unpack
from chatterbox_vllm.t3.rotary import CenteredRotary, rotate
from chatterbox_vllm.types import SPEECH_VOCABULARY

Angles = tuple[Tensor, Tensor]


class GuidedAttention(nn.Module):
    """Llama's attention, blind between the two rows of a pair: 2 x heads instead of 2 x tokens."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: T3Config = vllm_config.model_config.hf_config
        quant_config = vllm_config.quant_config
        self.heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.width = self.heads * config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = Attention(
            2 * self.heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=2 * self.heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=attention_backend(vllm_config, config.head_dim),
        )

    def forward(self, angles: Angles, hidden: Tensor) -> Tensor:
        """hidden (2N, H) -> (2N, H); ``angles`` are the N pairs' (``CenteredRotary``)."""
        qkv, _ = self.qkv_proj(hidden)
        pairs = qkv.unflatten(1, (3, self.heads, 2, -1)).unflatten(0, (-1, 2)).movedim(2, 0)  # (3, N, 2, heads, 2, d/2)
        q, k = rotate(pairs[:2], *angles).flatten(2)
        mixed = self.attn(q, k, pairs[2].flatten(1)).reshape(-1, self.width)
        output, _ = self.o_proj(mixed)
        return output


class FullPrecisionNorm(nn.Module):
    """RMSNorm that adds to a float32 residual stream.

    Thirty layers of additions are where half precision loses most. Compiled, this is one kernel, as vLLM's own is.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=torch.float32))
        self.eps = eps

    def forward(self, update: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """update (rows, H) of any dtype, residual (rows, H) float32 -> normed (float32), new residual (float32)."""
        residual = residual + update.float()
        scale = torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + self.eps)
        return residual * scale * self.weight, residual


class GuidedLayer(nn.Module):
    """A Llama decoder layer with ``GuidedAttention`` and a float32 residual stream."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.self_attn = GuidedAttention(vllm_config, f"{prefix}.self_attn")
        self.mlp = LlamaMLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            vllm_config.quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = FullPrecisionNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = FullPrecisionNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, angles: Angles, update: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As vLLM's ``LlamaDecoderLayer``: a layer's output is added to the residual by the next norm.

        Args:
            angles: ``CenteredRotary``'s.
            update: (2N, H), the previous layer's output, in the model's dtype.
            residual: (2N, H) float32.
        """
        normed, residual = self.input_layernorm(update, residual)
        update = self.self_attn(angles, normed.to(update.dtype))
        normed, residual = self.post_attention_layernorm(update, residual)
        return self.mlp(normed.to(update.dtype)), residual


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": -1, "inputs_embeds": 0})
class GuidedLlama(nn.Module):
    """From token ids to the guided hidden state.

    Ids are embedded here and not, as vLLM has it for multimodal models, in front of the graph, where each of seven
    kernels is launched by itself, at every step.
    """

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        four_bit.offer()
        config = vllm_config.model_config.hf_config
        self.text_emb = nn.Embedding(config.text_vocabulary, config.hidden_size)
        self.speech_emb = nn.Embedding(SPEECH_VOCABULARY, config.hidden_size)
        self.text_pos_emb = nn.Embedding(config.text_positions, config.hidden_size)
        self.speech_pos_emb = nn.Embedding(config.speech_positions, config.hidden_size)
        self.rotary = CenteredRotary(config)
        self.layers = nn.ModuleList(
            GuidedLayer(vllm_config, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)
        )
        self.norm = FullPrecisionNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, kind: Tensor, input_ids: Tensor, inputs_embeds: Tensor) -> Tensor:
        """Upstream's ``prepare_input_embeds``: tokens, learned positions, and the row whose text tokens are zeroed.

        Args:
            kind: (N,) int64, ``positions.unpack``'s.
            input_ids: (N,), vLLM's ids: speech as it is, then text.
            inputs_embeds: (N, H), of which vectors of a voice are read, without positions.

        Returns:
            (2N, H) float32: conditional and unconditional rows, interleaved.
        """
        is_text = ((kind > 0) & (kind < ORIGIN)).unsqueeze(-1)
        is_speech = (kind >= ORIGIN).unsqueeze(-1)
        # Out-of-range rows belong to padding, whose ids and positions mean nothing.
        text = _looked_up(self.text_emb, input_ids - SPEECH_VOCABULARY)
        speech = _looked_up(self.speech_emb, input_ids)
        tokens = torch.where(is_speech, speech, torch.where(is_text, text, inputs_embeds.float()))
        text_position = _looked_up(self.text_pos_emb, kind - 1)
        speech_position = _looked_up(self.speech_pos_emb, kind - ORIGIN)
        nothing = torch.zeros_like(tokens)
        learned = torch.where(is_speech, speech_position, torch.where(is_text, text_position, nothing))
        unconditional = torch.where(is_text, nothing, tokens)
        return torch.stack([tokens + learned, unconditional + learned], dim=1).flatten(0, 1)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor) -> Tensor:
        """input_ids (N,), positions (3, N) int64, inputs_embeds (N, H) -> guided hidden state, like inputs_embeds."""
        rope, kind, weight = unpack(positions)
        residual = self.embed(kind, input_ids, inputs_embeds)
        update = torch.zeros_like(residual, dtype=inputs_embeds.dtype)
        angles = self.rotary(rope)
        for layer in self.layers:
            update, residual = layer(angles, update, residual)
        hidden, _ = self.norm(update, residual)
        conditional, unconditional = hidden.unflatten(0, (-1, 2)).unbind(1)
        return (conditional + weight.unsqueeze(-1) * (conditional - unconditional)).to(inputs_embeds.dtype)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


def _looked_up(table: nn.Embedding, rows: Tensor) -> Tensor:
    """(N,) rows, brought into range, to (N, H) float32."""
    embedded: Tensor = table(rows.clamp(0, table.num_embeddings - 1))
    return embedded.float()
