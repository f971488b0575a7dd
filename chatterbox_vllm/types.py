"""The values that pass between the stages. Imports nothing of the package but the errors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Final

from chatterbox_vllm.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_RATE: Final = 24_000
"""Samples a second of everything the vocoder produces."""
TOKEN_RATE: Final = 25
"""Speech tokens a second of audio."""
SAMPLES_PER_TOKEN: Final = SAMPLE_RATE // TOKEN_RATE

SPOKEN_TOKENS: Final = 6561
"""Speech ids below this one are sounds; the vocoder's vocabulary."""
START_SPEECH: Final = 6561
STOP_SPEECH: Final = 6562
SPEECH_VOCABULARY: Final = 8194
"""Rows of T3's speech head; ids 6563..8193 can be sampled upstream but mean nothing."""
START_TEXT: Final = 255
STOP_TEXT: Final = 0
MAX_SPEECH_TOKENS: Final = 1000
"""Upstream's limit for one utterance: 40 s."""
MAX_TEXT_TOKENS: Final = 2048
"""Text positions the model has, less start and stop."""
MAX_MODEL_LEN: Final = 38 + MAX_TEXT_TOKENS + MAX_SPEECH_TOKENS
"""Positions of the longest utterance: voice and control tokens, text, speech."""
CHUNK_LENGTHS: Final = (20, 2000)
"""Least and most characters of one utterance that ``max_chunk_length`` may ask for."""

# (low, high), inclusive
OPTION_RANGES: Final[dict[str, tuple[float, float]]] = {
    "exaggeration": (0.0, 2.0),
    "cfg_weight": (0.0, 10.0),
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.1, 10.0),
    "seed": (0, 2**63 - 1),
    "max_tokens": (1, MAX_SPEECH_TOKENS),
    "diffusion_steps": (1, 100),
}
_INTEGERS: Final = frozenset({"seed", "max_tokens", "diffusion_steps"})


@dataclass(frozen=True)
class SpeechOptions:
    """How to speak. The defaults are upstream's ``ChatterboxTTS.generate``.

    Raises:
        InvalidRequest: a value has the wrong type, is not finite or is out of its range
            (``OPTION_RANGES``); ``param`` names it.
    """

    exaggeration: float = 0.5
    cfg_weight: float = 0.5
    temperature: float = 0.8
    top_p: float = 1.0
    min_p: float = 0.05
    repetition_penalty: float = 1.2
    seed: int | None = None
    max_tokens: int = MAX_SPEECH_TOKENS
    diffusion_steps: int = 10

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name == "seed" and value is None:
                continue
            object.__setattr__(self, option.name, _checked(option.name, value))
        if self.top_p == 0.0:
            raise InvalidRequest("top_p must be greater than 0 and at most 1", param="top_p")

    def but(self, **changes: Any) -> SpeechOptions:
        """A copy with ``changes``; the new values are checked."""
        return replace(self, **changes)


def _checked(name: str, value: Any) -> float | int:
    low, high = OPTION_RANGES[name]
    # NumPy's scalars are Integral and Real, too.
    wanted, kind = (Integral, "an integer") if name in _INTEGERS else (Real, "a number")
    is_number = isinstance(value, wanted) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN is not
        raise InvalidRequest(f"{name} must be {kind} from {low} to {high}, not {value!r:.80}", param=name)
    return int(value) if name in _INTEGERS else float(value)


@dataclass(frozen=True, eq=False)
class VoiceFeatures:
    """What the models know of a voice: the result of enrolling one recording.

    All tensors are on the CPU and must not be changed.

    Args:
        speaker_embedding: (256,) float32, unit length. VoiceEncoder's, for T3.
        t3_prompt_tokens: (n <= 150,) int64 speech tokens of the first 6 s, for T3.
        prompt_tokens: (P <= 250,) int64 speech tokens of the first 10 s, for S3Gen.
        prompt_mel: (2P, 80) float32 log-mel of the same seconds, for S3Gen.
        x_vector: (192,) float32 CAMPPlus embedding, for S3Gen.

    Mirrors upstream's ``Conditionals`` without its exaggeration, which belongs to a request.
    """

    speaker_embedding: Tensor
    t3_prompt_tokens: Tensor
    prompt_tokens: Tensor
    prompt_mel: Tensor
    x_vector: Tensor

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the content: the key under which caches know this voice."""
        sha = hashlib.sha256()
        for feature in fields(self):
            tensor = getattr(self, feature.name).contiguous()
            sha.update(f"{feature.name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            sha.update(tensor.numpy().tobytes())
        return sha.hexdigest()


@dataclass(frozen=True)
class Listening:
    """How a stream's sound comes to be heard, by which a stream is timed.

    Args:
        speed: times as fast as it is made; at 2.0 its listener is through with it in half the time.
        behind: seconds of it that are kept back on the way, as encoders do, in the listener's time.
    """

    speed: float = 1.0
    behind: float = 0.0


AT_ONCE: Final = Listening()
"""Sound is heard as it is, and all of it."""


@dataclass(frozen=True)
class SpeechRequest:
    """What to say, as whom, and how.

    Args:
        text: any length; a long one is spoken as several utterances and joined.
        voice: from the engine's ``voices``.
        language: a code such as "fr"; the English checkpoint speaks English only, and for the multilingual one None
            leaves the language to the model.
    """

    text: str
    voice: VoiceFeatures
    language: str | None = None
    options: SpeechOptions = field(default_factory=SpeechOptions)
