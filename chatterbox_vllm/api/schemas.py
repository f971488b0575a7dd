"""The body of ``POST /v1/audio/speech``: OpenAI's fields and ours.

Types are strict (``"0.5"`` and ``true`` are no numbers, NaN and infinity are refused), ranges are those of
``SpeechOptions``, and null means unset. Unknown fields are ignored, because clients send many: ``instructions``,
``lang_code``, ``volume``.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.types import OPTION_RANGES, SpeechOptions

Format = Literal["mp3", "opus", "aac", "flac", "wav", "pcm"]

_OTHER_SPELLINGS: Final = {"language_id": "language", "max_tokens": "max_new_tokens"}
"""Our name -> the other name of the same field."""


class VoiceId(BaseModel):
    """OpenAI's other way to name a voice."""

    model_config = ConfigDict(strict=True)

    id: str = Field(max_length=256)


_VoiceId = Annotated[
    VoiceId, WithJsonSchema({"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]})
]


def _option(name: str, description: str) -> Any:
    low, high = OPTION_RANGES[name]
    return Field(None, ge=low, le=high, description=description)


class SpeechBody(BaseModel):
    """One request as the client wrote it. Unset options take the deployment's defaults."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    input: str = Field(description="the text to speak")
    model: str | None = Field(None, description="any name; the model that is loaded speaks")
    voice: Annotated[str, Field(max_length=256)] | _VoiceId | None = Field(
        None, description="an id of /v1/audio/voices"
    )
    response_format: Format | None = Field(None, description="mp3 if unset; pcm is raw s16le, 24 kHz, mono")
    speed: float | None = Field(None, ge=0.25, le=4.0, description="tempo; the pitch stays")
    stream: bool | None = Field(None, description="send the sound as it is made; implied by stream_format")
    stream_format: Literal["audio", "sse"] | None = Field(None, description="a streamed file, or server-sent events")

    exaggeration: float | None = _option("exaggeration", "expressiveness; 0.5 is neutral")
    cfg_weight: float | None = _option("cfg_weight", "guidance by the text; 0 switches it off")
    temperature: float | None = _option("temperature", "0 always takes the likeliest token")
    top_p: float | None = Field(None, gt=0, le=1, description="nucleus sampling; 1 switches it off")
    min_p: float | None = _option("min_p", "least probability beside the likeliest token's")
    repetition_penalty: float | None = _option("repetition_penalty", "1 is none")
    seed: int | None = _option("seed", "the same request with the same seed sounds the same")
    max_tokens: int | None = _option("max_tokens", "limit of an utterance in speech tokens, 25 a second")
    max_new_tokens: int | None = _option("max_tokens", "the same as max_tokens")
    diffusion_steps: int | None = _option("diffusion_steps", "steps of the vocoder's flow")
    language: str | None = Field(None, max_length=16, description="the same as language_id")
    language_id: str | None = Field(None, max_length=16, description="two letters; multilingual models")
    ref_audio: str | None = Field(
        None, description="a recording of the voice to speak with, base64 or a data: URL; replaces voice"
    )

    @property
    def voice_id(self) -> str | None:
        return self.voice.id if isinstance(self.voice, VoiceId) else self.voice

    @property
    def format(self) -> Format:
        return self.response_format or "mp3"

    @property
    def tempo(self) -> float:
        return 1.0 if self.speed is None else self.speed

    @property
    def streamed(self) -> bool:
        """Whether the sound is sent as it is made. OpenAI's default is one whole file, and so is ours."""
        return self.stream if self.stream is not None else self.stream_format is not None

    @property
    def events(self) -> bool:
        return self.stream_format == "sse"

    @property
    def spoken_language(self) -> str | None:
        return self.language_id if self.language_id is not None else self.language

    def options(self, defaults: SpeechOptions) -> SpeechOptions:
        """The sampling options, over the deployment's ``defaults``."""
        given = {name: getattr(self, name) for name in OPTION_RANGES}
        given["max_tokens"] = self.max_tokens if self.max_tokens is not None else self.max_new_tokens
        return defaults.but(**{name: value for name, value in given.items() if value is not None})

    def spelt(self, param: str | None) -> str | None:
        """How this request spells what the engine calls ``param``."""
        if param == "text":
            return "input"
        ours = "language_id" if param == "language" else param
        other = _OTHER_SPELLINGS.get(ours or "")
        if other and getattr(self, ours or "") is None and getattr(self, other) is not None:
            return other
        return ours


def parse(raw: bytes) -> SpeechBody:
    """The checked body.

    Raises:
        InvalidRequest: it is not JSON, a field is missing, of the wrong type or out of range, or two fields
            contradict each other; ``param`` names the field.
    """
    try:
        body = SpeechBody.model_validate_json(raw)
    except ValidationError as error:
        raise _first(error) from None
    if not body.input.strip():
        raise InvalidRequest("input has no text to speak", param="input")
    for ours, other in _OTHER_SPELLINGS.items():
        values = {getattr(body, ours), getattr(body, other)} - {None}
        if len(values) > 1:
            raise InvalidRequest(f"{ours} and {other} mean the same and disagree; send one", param=other)
    if body.events and body.stream is False:
        raise InvalidRequest("stream_format 'sse' is a stream: leave stream out or set it to true", param="stream")
    return body


def _first(error: ValidationError) -> InvalidRequest:
    problem = error.errors(include_url=False, include_input=False)[0]
    field = str(problem["loc"][0]) if problem["loc"] else None
    if problem["type"] == "missing":
        return InvalidRequest(f"{field} is required", param=field)
    if field == "voice":
        return InvalidRequest('voice must be a voice\'s id, or {"id": "..."}', param=field)
    if field is None:
        return InvalidRequest(f"the body must be a JSON object ({problem['msg'][:200]})")
    return InvalidRequest(f"{field}: {problem['msg'][:1].lower()}{problem['msg'][1:200]}", param=field)
