"""Who is heard, judged by the checkpoint's VoiceEncoder; and which words, by a speech recogniser if one is given."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import librosa
import numpy as np
import torch
from torch import Tensor

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.types import SAMPLE_RATE
from chatterbox_vllm.voices.enrolment import S3_RATE, load_voice_encoder

SHORTEST: Final = SAMPLE_RATE // 2
"""Samples without which nobody is recognised, as in enrolment."""
_WINDOW_SECONDS: Final = 30
"""What a recogniser hears at once. Whisper cuts longer sounds by itself, where it finds a pause."""


class Speaker:
    """The VoiceEncoder as a judge; it is never quantised here.

    Args:
        file: the checkpoint's.

    Raises:
        CheckpointError: the file does not fit the network.
    """

    def __init__(self, file: Path) -> None:
        self._network: Any = load_voice_encoder(file).float().eval()

    def embedding(self, samples: Tensor) -> Tensor | None:
        """(n,) samples at 24 kHz to (256,) float32 of unit length; None where there is too little of them."""
        if len(samples) < SHORTEST:
            return None
        sound = _resampled(samples)
        return torch.from_numpy(self._network.embeds_from_wavs([sound], sample_rate=S3_RATE)[0])


def similarity(one: Tensor | None, other: Tensor | None) -> float | None:
    """The cosine of two embeddings; None where one is missing."""
    return None if one is None or other is None else float(torch.cosine_similarity(one, other, dim=0))


class Recogniser:
    """A speech recogniser of the hub, or of a folder.

    Args:
        model: its name or folder: Whisper, wav2vec 2.0, or whatever else transformers' pipeline of that task takes.
        device: where it runs.

    Raises:
        ConfigurationError: there is none of that name, or it is no recogniser.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        from transformers import pipeline

        try:
            self._pipeline: Any = pipeline("automatic-speech-recognition", model=model, device=device)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigurationError(
                f"--asr {model}: no speech recogniser could be loaded ({error}); give a folder, or a name such as "
                "openai/whisper-small",
                param="--asr",
            ) from error
        is_whisper = self._pipeline.type == "seq2seq_whisper"
        self._cutting = {"return_timestamps": True} if is_whisper else {"chunk_length_s": _WINDOW_SECONDS}

    def words(self, samples: Tensor) -> str:
        """What is said in (n,) samples at 24 kHz."""
        if len(samples) < SHORTEST:
            return ""
        heard = self._pipeline({"raw": _resampled(samples), "sampling_rate": S3_RATE}, **self._cutting)
        return str(heard["text"]).strip()


def _resampled(samples: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return librosa.resample(samples.numpy(), orig_sr=SAMPLE_RATE, target_sr=S3_RATE)


def words(text: str, language: str | None = None) -> list[str]:
    """What is counted: words without case and punctuation; of languages that are written without spaces, characters."""
    found = re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())
    return list("".join(found)) if language in {"ja", "zh"} else found


def edits(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that make one of the other."""
    row = list(range(len(heard) + 1))
    for count, word in enumerate(wanted, start=1):
        diagonal, row[0] = row[0], count
        for at, other in enumerate(heard, start=1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (word != other))
    return row[-1]
