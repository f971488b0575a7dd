"""A request as vLLM sees it: ``[34 voice][start, text, stop][BOS][BOS]`` and its sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.sampling_params import RequestOutputKind, SamplingParams

from chatterbox_vllm.t3.positions import OVERHEAD, VOICE_LENGTH
from chatterbox_vllm.types import (
    SPEECH_VOCABULARY,
    START_SPEECH,
    START_TEXT,
    STOP_SPEECH,
    STOP_TEXT,
    SpeechOptions,
)

STREAM_INTERVAL = 5
"""Tokens between deliveries of a stream: a fifth of a second of sound, a fifth of the messages."""
LONE_INTERVAL = 1
"""The same for a stream that is alone: a chunk never waits for tokens it does not need, and messages are few anyway."""
LEAST_MODEL_LEN = OVERHEAD + 16
"""Positions that the shortest utterance is to have room for."""


def prompt_tokens(text: Sequence[int], placeholder_id: int) -> list[int]:
    """The prompt of ``len(text) + OVERHEAD`` ids; ``text`` is without start and stop."""
    shifted = (SPEECH_VOCABULARY + i for i in (START_TEXT, *text, STOP_TEXT))
    return [placeholder_id] * VOICE_LENGTH + [*shifted, START_SPEECH, START_SPEECH]


def sampling_params(options: SpeechOptions, *, max_tokens: int, interval: int | None) -> SamplingParams:
    """vLLM's parameters for upstream's sampler: penalty, temperature, min_p, top_p, in that order.

    Args:
        options: the request's.
        max_tokens: the most tokens to sample, the stop token included.
        interval: tokens between deliveries; None: all at the end.
    """
    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        min_p=options.min_p,
        repetition_penalty=options.repetition_penalty,
        seed=options.seed,
        max_tokens=max_tokens,
        stop_token_ids=[STOP_SPEECH],
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY if interval is None else RequestOutputKind.DELTA,
        stream_interval=interval,
    )
