"""The built-in voice of a demo checkpoint: ``conds.pt``, whose recording nobody ever spoke."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from chatterbox_vllm.types import SPOKEN_TOKENS

_T3_PROMPT_TOKENS: Final = 150
_MELS: Final = 80
_FRAMES_PER_TOKEN: Final = 2
_EXAGGERATION: Final = 0.5


def save_voice(path: Path, *, prompt_tokens: int, seed: int) -> None:
    """Writes upstream's ``Conditionals.save`` layout: tensors and None only."""
    torch.save(voice(prompt_tokens, seed), path)


def voice(prompt_tokens: int, seed: int) -> dict[str, dict[str, Any]]:
    """Upstream's conditionals for a recording of ``prompt_tokens`` speech tokens (25 a second)."""
    generator = torch.Generator().manual_seed(seed)
    speaker = torch.randn(1, 256, generator=generator).relu()  # VoiceEncoder ends in a ReLU
    return {
        "t3": {
            "speaker_emb": speaker / speaker.norm(),
            "clap_emb": None,
            "cond_prompt_speech_tokens": _tokens(_T3_PROMPT_TOKENS, generator),
            "cond_prompt_speech_emb": None,
            "emotion_adv": _EXAGGERATION * torch.ones(1, 1, 1),
        },
        "gen": {
            "prompt_token": _tokens(prompt_tokens, generator),
            "prompt_token_len": torch.tensor([prompt_tokens]),
            "prompt_feat": _log_mel(_FRAMES_PER_TOKEN * prompt_tokens, generator)[None],
            "prompt_feat_len": None,
            "embedding": torch.randn(1, 192, generator=generator),
        },
    }


def _tokens(count: int, generator: Generator) -> Tensor:
    return torch.randint(SPOKEN_TOKENS, (1, count), generator=generator)


def _log_mel(frames: int, generator: Generator) -> Tensor:
    """(frames, 80) that rises and falls like speech: a syllable takes about ten frames, high bands are weaker."""
    coarse = torch.randn(1, 1, frames // 10 + 2, _MELS // 8, generator=generator)
    shape = F.interpolate(coarse, size=(frames, _MELS), mode="bicubic")[0, 0]
    tilt = torch.linspace(-2.5, -6.0, _MELS)
    return (tilt + 1.5 * shape).clamp(-11.5, 1.0)
