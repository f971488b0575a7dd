"""The 34 vectors by which T3 knows a voice: upstream's ``T3.prepare_conditioning`` and ``T3CondEnc``.

They are computed in front of the engine, in float32 on the CPU: a voice costs a few milliseconds once, an exaggeration
one vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock

import torch
from cachetools import LRUCache
from torch import Tensor, nn
from torch.nn import functional as F

from chatterbox_vllm.types import VoiceFeatures

PERCEIVER_HEADS = 4
PREFIX = "cond_enc."


class SharedAttention(nn.Module):
    """Upstream's ``AttentionBlock2``: one LayerNorm for query and key/value, residual on the query."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.proj_out = nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        """query (q, H), context (k, H) -> (q, H)."""
        q = self._heads(self.to_q(self.norm(query)))
        normed = self.norm(context)
        mixed = F.scaled_dot_product_attention(q, self._heads(self.to_k(normed)), self._heads(self.to_v(normed)))
        return query + self.proj_out(mixed.transpose(0, 1).flatten(1))

    @staticmethod
    def _heads(rows: Tensor) -> Tensor:
        return rows.unflatten(1, (PERCEIVER_HEADS, -1)).transpose(0, 1)


class Perceiver(nn.Module):
    """32 learned queries over the prompt, then over themselves, through the same block."""

    def __init__(self, queries: int, width: int) -> None:
        super().__init__()
        self.pre_attention_query = nn.Parameter(torch.empty(1, queries, width))
        self.attn = SharedAttention(width)

    def forward(self, prompt: Tensor) -> Tensor:
        """prompt (n, H) -> (32, H)."""
        across = self.attn(self.pre_attention_query[0], prompt)
        return self.attn(across, across)


class VoiceConditioner(nn.Module):
    """Voice features and an exaggeration to the prefix of T3's prompt.

    Args:
        tensors: T3's checkpoint, at least the keys of ``wanted``.
        dtype: of the prefixes; they are computed in float32.
        cached: how many voices, and how many prefixes, are kept.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32, cached: int = 256) -> None:
        super().__init__()
        queries, width = tensors[f"{PREFIX}perceiver.pre_attention_query"].shape[1:]
        self.spkr_enc = nn.Linear(tensors[f"{PREFIX}spkr_enc.weight"].shape[1], width)
        self.emotion_adv_fc = nn.Linear(1, width, bias=False)
        self.perceiver = Perceiver(queries, width)
        self.load_state_dict({k.removeprefix(PREFIX): v.float() for k, v in tensors.items() if k.startswith(PREFIX)})
        self.speech_emb = tensors["speech_emb.weight"]
        self.speech_pos_emb = tensors["speech_pos_emb.emb.weight"]
        self.requires_grad_(False)
        self._dtype = dtype
        self._voices: LRUCache[str, Tensor] = LRUCache(cached)
        self._prefixes: LRUCache[tuple[str, float], Tensor] = LRUCache(cached)
        self._lock = Lock()

    @staticmethod
    def wanted(key: str) -> bool:
        """Whether the conditioner needs this tensor of T3's checkpoint."""
        return key.startswith(PREFIX) or key in ("speech_emb.weight", "speech_pos_emb.emb.weight")

    @torch.inference_mode()
    def prefix(self, voice: VoiceFeatures, exaggeration: float) -> Tensor:
        """The prefix of a prompt: speaker, perceiver, exaggeration. It is shared: not to be changed.

        Returns:
            (34, H) of ``dtype``.
        """
        key = (voice.digest, exaggeration)
        with self._lock:
            if key not in self._prefixes:
                emotion = self.emotion_adv_fc.weight[:, 0] * exaggeration
                self._prefixes[key] = torch.cat([self._voice(voice), emotion.unsqueeze(0)]).to(self._dtype)
            return self._prefixes[key]

    def _voice(self, voice: VoiceFeatures) -> Tensor:
        """(33, H): what does not depend on the exaggeration."""
        if voice.digest not in self._voices:
            prompt = self.speech_emb[voice.t3_prompt_tokens].float()
            prompt = prompt + self.speech_pos_emb[: len(prompt)].float()
            speaker = self.spkr_enc(voice.speaker_embedding.unsqueeze(0))
            self._voices[voice.digest] = torch.cat([speaker, self.perceiver(prompt)])
        return self._voices[voice.digest]
