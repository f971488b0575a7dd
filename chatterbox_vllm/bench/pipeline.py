"""The engine offline, for the scripts in ``benchmarks/``: many texts at once, as tokens or as sound."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chatterbox_vllm.bench import sentences
from chatterbox_vllm.types import SAMPLE_RATE, TOKEN_RATE, SpeechOptions, SpeechRequest, VoiceFeatures

if TYPE_CHECKING:
    from chatterbox_vllm.engine import AsyncChatterbox

Speak = Callable[[SpeechRequest], Coroutine[Any, Any, float]]
"""Gives seconds of sound."""


@dataclass(frozen=True)
class Pipeline:
    """An engine that speaks as many tokens as it may.

    Args:
        engine: its T3 and its vocoder.
        options: of every request; ``max_tokens`` are always spoken.
    """

    engine: AsyncChatterbox
    options: SpeechOptions

    def requests(self, count: int, voice: VoiceFeatures) -> list[SpeechRequest]:
        """Of ``spoken_texts``, each with a seed of its own."""
        language = "en" if self.engine.checkpoint.variant.is_multilingual else None
        texts = spoken_texts(count, self.options.max_tokens)
        return [SpeechRequest(text, voice, language, self.options.but(seed=i)) for i, text in enumerate(texts)]

    async def tokens(self, request: SpeechRequest) -> float:
        """T3 alone; seconds that its tokens would sound."""
        return len(await self._spoken(request)) / TOKEN_RATE

    async def sound(self, request: SpeechRequest) -> float:
        """T3, then the vocoder; seconds of sound."""
        spoken = torch.tensor(await self._spoken(request))
        seed, steps = request.options.seed or 0, request.options.diffusion_steps
        samples = await self.engine.synthesize(spoken, request.voice, seed=seed, diffusion_steps=steps)
        return len(samples) / SAMPLE_RATE

    async def _spoken(self, request: SpeechRequest) -> list[int]:
        return await self.engine.speech_tokens(request, min_tokens=self.options.max_tokens)


def spoken_texts(count: int, tokens: int) -> list[str]:
    """Texts of about as many seconds as tokens are allowed."""
    return [sentences.text(seed, tokens / TOKEN_RATE) for seed in range(count)]


async def timed_rounds(speak: Speak, requests: Sequence[SpeechRequest], rounds: int) -> tuple[float, list[float]]:
    """All requests at once, ``rounds`` times after once that should not count.

    Returns:
        Seconds of sound that a round gives, and the 1 + ``rounds`` times that they took.
    """
    from chatterbox_vllm.engine import together  # imports vLLM: seconds

    audio, seconds = 0.0, []
    for _ in range(1 + rounds):
        started = time.perf_counter()
        audio = sum(await together([speak(request) for request in requests]))
        seconds.append(time.perf_counter() - started)
    return audio, seconds
