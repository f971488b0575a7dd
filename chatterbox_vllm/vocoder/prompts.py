"""Voices on the device: what the flow needs of a recording, prepared once."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.types import SPOKEN_TOKENS, VoiceFeatures
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.flow import Flow

MELS: Final = 80
X_VECTOR: Final = 192
_KNOWN: Final = 64


def check_tokens(tokens: Tensor, *, param: str = "tokens") -> None:
    """Refuses what is no list of sounds.

    Raises:
        InvalidRequest: ``tokens`` is not (n,) int64 on the CPU, or an id is outside 0..6560.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype != torch.int64 or tokens.ndim != 1 or not tokens.is_cpu:
        raise InvalidRequest(f"{param} must be a one-dimensional int64 tensor on the CPU", param=param)
    unspoken = tokens[(tokens < 0) | (tokens >= SPOKEN_TOKENS)]
    if len(unspoken):
        raise InvalidRequest(f"{param} must lie in 0..{SPOKEN_TOKENS - 1}, not {unspoken[0].item()}", param=param)


def check_voice(voice: VoiceFeatures) -> None:
    """Refuses features that the vocoder cannot use.

    Raises:
        InvalidRequest: a tensor of ``voice`` that S3Gen reads has the wrong shape, dtype or device.
    """
    check_tokens(voice.prompt_tokens, param="voice")
    mel, x_vector = voice.prompt_mel, voice.x_vector
    if mel.ndim != 2 or mel.shape[1] != MELS or mel.dtype != torch.float32 or not mel.is_cpu:
        raise InvalidRequest("the voice's prompt_mel must be (frames, 80) float32 on the CPU", param="voice")
    if x_vector.shape != (X_VECTOR,) or x_vector.dtype != torch.float32 or not x_vector.is_cpu:
        raise InvalidRequest("the voice's x_vector must be (192,) float32 on the CPU", param="voice")


def usable_tokens(voice: VoiceFeatures) -> int:
    """How many tokens of the recording are used.

    Upstream's enrolment can leave a mel of 2n + 1 frames to n tokens, and upstream's synthesis then gives the place of
    the first spoken frame, 480 samples, to the odd one. Here the mel is cut to 2n frames; were it too short, the
    tokens would be cut.
    """
    return min(len(voice.prompt_tokens), len(voice.prompt_mel) // FRAMES_PER_TOKEN)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A voice, ready for the flow.

    Args:
        tokens: (P,) int64 on the CPU.
        mel: (2P, 80) float32 on the device.
        speaker: (80,) float32 there, the projected x-vector.
    """

    tokens: Tensor
    mel: Tensor
    speaker: Tensor


class Prompts:
    """Keeps the voices that were used last."""

    def __init__(self, flow: Flow, device: torch.device) -> None:
        self._flow = flow
        self._device = device
        self._known: OrderedDict[str, Prompt] = OrderedDict()

    def __getitem__(self, voice: VoiceFeatures) -> Prompt:
        prompt = self._known.get(voice.digest) or self._prepare(voice)
        self._known[voice.digest] = prompt
        self._known.move_to_end(voice.digest)
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        return prompt

    def _prepare(self, voice: VoiceFeatures) -> Prompt:
        count = usable_tokens(voice)
        mel = voice.prompt_mel[: FRAMES_PER_TOKEN * count].to(self._device)
        speaker = self._flow.speaker(voice.x_vector[None].to(self._device))[0]
        return Prompt(voice.prompt_tokens[:count], mel, speaker)
