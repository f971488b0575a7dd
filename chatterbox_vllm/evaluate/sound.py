"""Who is heard, judged by the checkpoint's VoiceEncoder; and which words, by a speech recogniser if one is given."""

from __future__ import annotations

import re
import unicodedata
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
_WORD: Final = re.compile(r"[^\s']+(?:'[^\s']+)*")
_UNSEEN: Final = re.compile("[\u00ad\u200c-\u200f\u2060\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Soft hyphens, joiners, marks of direction and variation selectors: they are in words, and nobody hears them."""


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
    """What is counted: words without case and punctuation; of languages that are written without spaces, characters.

    However a letter, a mark or an apostrophe is encoded, it counts as the same.
    """
    plain = _UNSEEN.sub("", unicodedata.normalize("NFKC", text).lower().replace("’", "'"))
    spaced = "".join(character if character == "'" or _in_word(character) else " " for character in plain)
    # a mark without a letter, such as what was left of an emoji, is no word
    found = [word for word in _WORD.findall(spaced) if any(character.isalnum() for character in word)]
    return list("".join(found)) if language is not None and language.lower() in {"ja", "zh"} else found


def _in_word(character: str) -> bool:
    """Letters, digits, and the marks on them: the vowels of Hindi are such, and ``re`` has them in no word."""
    return character.isalnum() or unicodedata.category(character).startswith("M")


def edits(wanted: Sequence[str], heard: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that make one of the other."""
    row = list(range(len(heard) + 1))
    for count, word in enumerate(wanted, start=1):
        diagonal, row[0] = row[0], count
        for at, other in enumerate(heard, start=1):
            diagonal, row[at] = row[at], min(row[at] + 1, row[at - 1] + 1, diagonal + (word != other))
    return row[-1]
