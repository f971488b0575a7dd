"""What the benchmarks speak: seeded text, speech tokens and voices, the same for every engine that is compared."""

from __future__ import annotations

import random

import torch
from torch.nn import functional as F

from chatterbox_vllm.types import SPOKEN_TOKENS, START_TEXT, STOP_TEXT, VoiceFeatures

TEXT_TOKENS = 60
"""Text ids of a request: with T3's prefix, a prompt of 98 positions."""


def random_text(seed: int, vocabulary: int, length: int = TEXT_TOKENS) -> list[int]:
    """``length`` text ids, start and stop not among them."""
    ordinary = [i for i in range(vocabulary) if i not in (START_TEXT, STOP_TEXT)]
    return random.Random(seed).choices(ordinary, k=length)


def random_speech(seed: int, length: int) -> torch.Tensor:
    """(length,) int64 speech tokens."""
    return torch.randint(0, SPOKEN_TOKENS, (length,), generator=torch.Generator().manual_seed(seed))


def random_voice(seed: int, *, prompt_tokens: int = 250) -> VoiceFeatures:
    """A voice that nobody has, with a reference of ``prompt_tokens`` / 25 seconds."""
    draw = torch.Generator().manual_seed(seed)
    return VoiceFeatures(
        speaker_embedding=F.normalize(torch.randn(256, generator=draw), dim=0),
        t3_prompt_tokens=torch.randint(0, SPOKEN_TOKENS, (150,), generator=draw),
        prompt_tokens=torch.randint(0, SPOKEN_TOKENS, (prompt_tokens,), generator=draw),
        prompt_mel=torch.randn(2 * prompt_tokens, 80, generator=draw) - 5.0,
        x_vector=torch.randn(192, generator=draw),
    )
