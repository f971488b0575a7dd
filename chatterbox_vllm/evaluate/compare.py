"""Two contenders speak the same texts; what differs, text by text and altogether."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.evaluate.methods import Contender
from chatterbox_vllm.evaluate.sound import Recogniser, Speaker, edits, similarity, words
from chatterbox_vllm.evaluate.t3 import PlainT3, read_t3
from chatterbox_vllm.evaluate.vocoder import quantized_vocoder, vocode
from chatterbox_vllm.text.frontend import TextFrontend
from chatterbox_vllm.text.tokenise import load_tokenizer
from chatterbox_vllm.types import SPOKEN_TOKENS, SpeechOptions, VoiceFeatures
from chatterbox_vllm.vocoder.distance import mel_distance
from chatterbox_vllm.vocoder.stage import Vocoder

P95: Final = 0.95


@dataclass(frozen=True)
class Heard:
    """What a recogniser understood; ``wrong`` of ``count`` words."""

    text: str
    wrong: int
    count: int


@dataclass(frozen=True)
class OfText:
    """One text's figures.

    Args:
        text: what was to be said.
        tokens: that B said.
        divergence: Kullback-Leibler's of A from B, in nats, at each token and the end.
        agreement: share of these at which both would most likely say the same.
        mel_db: between the two vocoders' mels of B's tokens.
        a_to_b, a_to_voice, b_to_voice: cosines between the speakers of A's sound, B's sound and the voice; None where
            there is too little sound.
        heard_a, heard_b: None without a recogniser.
    """

    text: str
    tokens: int
    divergence: list[float]
    agreement: float
    mel_db: float
    a_to_b: float | None
    a_to_voice: float | None
    b_to_voice: float | None
    heard_a: Heard | None
    heard_b: Heard | None


class Prepared(NamedTuple):
    """A text, and its token ids without start and stop."""

    text: str
    ids: list[int]


def prepare(
    texts: Sequence[str], places: Sequence[str], checkpoint: Checkpoint, language: str | None = None
) -> list[Prepared]:
    """All texts as ``checkpoint`` reads them, before any is spoken.

    Args:
        places: where each of them is, for errors.
        checkpoint: B's.

    Raises:
        CheckpointError: its tokenizer is none.
        InvalidRequest: a text cannot be spoken; names its place.
    """
    frontend = TextFrontend(load_tokenizer(checkpoint), multilingual=checkpoint.variant.is_multilingual)
    pairs = zip(texts, places, strict=True)
    return [Prepared(text, frontend.one(text, language, param=place)) for text, place in pairs]


@dataclass(frozen=True)
class Side:
    """One contender's networks."""

    t3: PlainT3
    vocoder: Vocoder


class Comparison:
    """Both contenders' networks, loaded.

    Args:
        a, b: what is judged, and what it is judged against; speakers are judged with B's files.
        recogniser: None counts no words.

    Raises:
        CheckpointError, MissingDependency: a file, or a method's package, is not there or unusable.
    """

    def __init__(
        self, a: Contender, b: Contender, *, device: str = "cpu", recogniser: Recogniser | None = None
    ) -> None:
        files = {path: read_t3(path) for path in {a.checkpoint.t3, b.checkpoint.t3}}
        self._a, self._b = (
            Side(
                PlainT3(files[checkpoint.t3], checkpoint.t3, policy.t3, device),
                quantized_vocoder(checkpoint.s3gen, policy, device),
            )
            for checkpoint, policy in (a, b)
        )
        self._speaker = Speaker(b.checkpoint.voice_encoder)
        self._recogniser = recogniser

    def texts(
        self, texts: Sequence[Prepared], voice: VoiceFeatures, options: SpeechOptions, language: str | None = None
    ) -> Iterator[OfText]:
        """Each text's figures; text *i* has the seed *seed + i*.

        Raises:
            InvalidRequest: B says nothing to a text.
        """
        for index, prepared in enumerate(texts):
            yield self._text(prepared, voice, options.but(seed=(options.seed or 0) + index), language)

    def _text(self, prepared: Prepared, voice: VoiceFeatures, options: SpeechOptions, language: str | None) -> OfText:
        text, ids = prepared
        said_a, said_b = (side.t3.speak(ids, voice, options) for side in (self._a, self._b))
        tokens = _sounds(said_b)
        if not len(tokens):
            raise InvalidRequest(f"nothing is said to {text!r:.80}; choose another --seed", param="--texts")
        log_a, log_b = (side.t3.log_probabilities(ids, voice, options, said_b) for side in (self._a, self._b))
        sound_b, mel_b = vocode(self._b.vocoder, tokens, voice, options)
        _, mel_a = vocode(self._a.vocoder, tokens, voice, options)
        own = _sounds(said_a)
        sound_a = vocode(self._a.vocoder, own, voice, options)[0] if len(own) else torch.empty(0)
        speakers = [self._speaker.embedding(sound) for sound in (sound_a, sound_b)]
        return OfText(
            text=text,
            tokens=len(tokens),
            divergence=divergence(log_b, log_a).tolist(),
            agreement=float((log_a.argmax(-1) == log_b.argmax(-1)).float().mean()),
            mel_db=mel_distance(mel_b, mel_a),
            a_to_b=similarity(*speakers),
            a_to_voice=similarity(speakers[0], voice.speaker_embedding),
            b_to_voice=similarity(speakers[1], voice.speaker_embedding),
            heard_a=self._heard(sound_a, text, language),
            heard_b=self._heard(sound_b, text, language),
        )

    def _heard(self, sound: Tensor, text: str, language: str | None) -> Heard | None:
        if self._recogniser is None:
            return None
        heard, wanted = self._recogniser.words(sound), words(text, language)
        return Heard(heard, edits(wanted, words(heard, language)), len(wanted))


def divergence(log_b: Tensor, log_a: Tensor) -> Tensor:
    """Kullback-Leibler's, (n,) nats: what it costs to expect A's distributions where B's are true.

    Args:
        log_b, log_a: (n, choices) logarithms of probabilities.
    """
    return (log_b.exp() * (log_b - log_a)).sum(-1)


def _sounds(tokens: Sequence[int]) -> Tensor:
    return torch.tensor([token for token in tokens if token < SPOKEN_TOKENS], dtype=torch.int64)


@dataclass(frozen=True)
class Summary:
    """All texts' figures together. Divergence and agreement are over all positions, words over all words.

    Args:
        divergence, mel_db: mean and 95th percentile.
        agreement, a_to_b, a_to_voice, b_to_voice: means.
        wrong_a, wrong_b: share of words that were not understood; None without a recogniser.
    """

    divergence: tuple[float, float]
    agreement: float
    mel_db: tuple[float, float]
    a_to_b: float | None
    a_to_voice: float | None
    b_to_voice: float | None
    wrong_a: float | None
    wrong_b: float | None


def summary(texts: Sequence[OfText]) -> Summary:
    """The figures of all texts together."""
    positions = [len(each.divergence) for each in texts]
    agreed = sum(each.agreement * count for each, count in zip(texts, positions, strict=True))
    return Summary(
        divergence=_spread([nats for each in texts for nats in each.divergence]),
        agreement=agreed / sum(positions),
        mel_db=_spread([each.mel_db for each in texts]),
        a_to_b=_mean([each.a_to_b for each in texts]),
        a_to_voice=_mean([each.a_to_voice for each in texts]),
        b_to_voice=_mean([each.b_to_voice for each in texts]),
        wrong_a=_share([each.heard_a for each in texts]),
        wrong_b=_share([each.heard_b for each in texts]),
    )


def _spread(values: Sequence[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    return float(numbers.mean()), float(numbers.quantile(P95))


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _share(heard: Sequence[Heard | None]) -> float | None:
    known = [each for each in heard if each is not None]
    return sum(each.wrong for each in known) / max(1, sum(each.count for each in known)) if known else None
