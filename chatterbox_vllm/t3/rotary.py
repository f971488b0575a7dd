"""Rotary position embedding around the second BOS, in float32."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.positions import ORIGIN, POSITIONS


class CenteredRotary(nn.Module):
    """Mirrors ``transformers``' ``LlamaRotaryEmbedding``, at positions that may be negative.

    RoPE is relative, but its angles are rounded: at a position of 4,000 a float32 angle is off by 1e-4. Hence the
    positions of a request are counted from its second BOS: the table's row ``ORIGIN`` is angle 0.
    """

    def __init__(self, config: T3Config) -> None:
        super().__init__()
        with torch.device("cpu"):
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            angles = (torch.arange(POSITIONS) - ORIGIN).float()[:, None] * frequencies.float()
            cos, sin = angles.cos(), angles.sin()
            table = torch.stack([torch.stack([cos, cos], 1), torch.stack([-sin, sin], 1)], 1)
        self.register_buffer("table", table.to(torch.get_default_device()), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (N,) int64 -> cosine and signed sine, (N, 1, 1, 2, head_dim / 2) float32, for ``rotate``."""
        cos, sin = self.table[positions].unbind(1)
        return cos[:, None, None], sin[:, None, None]


def rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates queries or keys (N, ..., 2, head_dim / 2), the head's halves apart. One kernel, when compiled."""
    wide = rows.float()
    return (wide * cos + wide.flip(-2) * sin).to(rows.dtype)
