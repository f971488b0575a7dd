"""Every setting of the server: type, range, default, help text and variable name, in one place.

``sources.load`` fills them from flags, variables and files; ``Settings(...)`` alone reads nothing. The variable of a
setting is ``CHATTERBOX_`` and its name in capitals; ``OTHER_NAMES`` has the spellings that other Chatterbox servers
made familiar.

``python -m chatterbox_vllm.settings`` writes ``.env.example``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final, Literal, Self, get_args, get_origin

import annotated_types
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    model_validator,
)
from pydantic.fields import FieldInfo

from chatterbox_vllm.memory import parse_bytes
from chatterbox_vllm.quantization.policy import STRATEGIES, Policy
from chatterbox_vllm.quantization.spellings import FIELDS, SPELLINGS, Given, resolve
from chatterbox_vllm.types import CHUNK_LENGTHS, MAX_MODEL_LEN, MAX_SPEECH_TOKENS, OPTION_RANGES, SpeechOptions

PREFIX: Final = "CHATTERBOX_"
OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "cfg_weight": ("CHATTERBOX_CFG_SCALE",),
        "dtype": ("MODEL_DTYPE",),
        "max_chunk_length": ("MAX_CHUNK_LENGTH",),
        "port": ("PORT",),
        "use_int8_quantization": ("USE_INT8_QUANTIZATION",),
    }
)
"""Further variables that mean the same setting. One without our prefix counts only where the same source, the
environment or a file, has none with it."""
FOREIGN: Final = frozenset({"CHATTERBOX_CACHE_DIR", "CHATTERBOX_VENV"})
"""Variables with our prefix that are read elsewhere: by ``checkpoint.cache_dir`` and by the start script. They count
in the environment only."""

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "ultra-low-vram": {
            "max_batch_size": 1,
            "max_model_len": 640,
            "max_chunk_length": 140,
            "quantization_strategy": "aggressive",
            "vram_budget": "2GiB",
        },
        "low-vram": {
            "max_batch_size": 2,
            "max_model_len": 800,
            "max_chunk_length": 240,
            "quantization_strategy": "mixed",
            "vram_budget": "4GiB",
        },
        "medium-vram": {"max_batch_size": 8, "max_model_len": 1000, "vram_budget": "8GiB"},
        "high-vram": {"max_batch_size": 32, "max_model_len": 1200, "vram_budget": "16GiB"},
    }
)
"""Defaults for so much of a GPU's memory. A shorter ``max_model_len`` holds less speech, so the small presets also
split text sooner. Budget and quantisation apply where there is an NVIDIA GPU."""


CHUNK_SIZES: Final = ("first_chunk_tokens", "largest_chunk_tokens")
"""The two settings that are checked against each other."""


def _json_object(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _bytes_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _amount(value: str) -> str:
    parse_bytes(value)
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _option(name: str, help_text: str) -> Any:
    """A sampling default: type, range and default are ``SpeechOptions``'."""
    low, high = OPTION_RANGES[name]
    return Field(getattr(SpeechOptions, name), ge=low, le=high, description=help_text)


JsonObject = Annotated[dict[str, Any], BeforeValidator(_json_object)]
VariantName = Literal["english", "multilingual", "multilingual-v3"]
PresetName = Literal["ultra-low-vram", "low-vram", "medium-vram", "high-vram"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
LogLevel = Literal["debug", "info", "warning", "error"]
Text = Annotated[str, Field(min_length=1), annotated_types.doc("text, not empty")]
Amount = Annotated[
    str,
    BeforeValidator(_bytes_as_text),
    AfterValidator(_amount),
    annotated_types.doc("an amount of memory: 2GiB, 2048MiB or bytes"),
]
LanguageCode = Annotated[str, Field(pattern="^[a-z]{2}$"), annotated_types.doc("two small letters, as en")]
MethodName = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9_\-]+$"), annotated_types.doc("a name of letters, digits, _ and -")
]
StrategyName = Annotated[Literal["none", "conservative", "mixed", "aggressive", "auto"], BeforeValidator(_lower)]


class Settings(BaseModel):
    """The checked values. Immutable; ``sources.load`` fills it from outside, the constructor from its arguments."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    model: Text = Field(
        "english",
        description="english, multilingual, multilingual-v3, demo, demo-multilingual, a folder, or org/repo on the hub",
    )
    variant: VariantName | None = Field(None, description="what a folder or repository holds; found out if unset")
    preset: PresetName | None = Field(None, description="a set of defaults for a size of GPU memory")

    host: Text = Field("127.0.0.1", description="address to listen on; 0.0.0.0 serves the whole network")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    api_key: SecretStr | None = Field(None, description="if set, all routes but the probes need it as a bearer token")
    log_level: LogLevel = Field("info", description="least severe messages to log")
    debug: bool = Field(False, description="log at debug level; as a flag, show tracebacks too")

    max_batch_size: int | None = Field(
        None, ge=1, le=4096, description="utterances that T3 speaks at once; 256 on a GPU and 32 on a CPU if unset"
    )
    max_model_len: int = Field(
        2048,
        ge=128,
        le=MAX_MODEL_LEN,
        description="positions of one utterance: 38, its text tokens, 25 a second of speech",
    )
    gpu_memory_utilization: float = Field(0.5, ge=0.01, le=1, description="share of the GPU's memory that T3 may take")
    dtype: Dtype = Field("auto", description="T3's number format; auto is the engine's choice for the device")
    device: Text = Field("auto", description="auto, cuda or cpu; the start script installs vLLM's build for it")
    vocoder_device: Text | None = Field(
        None, description="another device for the vocoder; several, as cuda:0,cuda:1, are a worker each"
    )
    vocoder_process: bool | None = Field(
        None,
        description="vocoder in a process of its own; on a GPU if unset; false, there, in T3's, without a CUDA context "
        "of its own",
    )
    vocoder_dtype: Dtype = Field(
        "auto",
        description="the vocoder's number format; auto is half precision on a GPU, and on a CPU float32 with faster "
        "products than upstream's; float32 has upstream's very bits there, and bfloat16 is a quarter faster where the "
        "CPU has instructions for it",
    )
    mps: bool = Field(
        False, description="run NVIDIA's MPS, under which T3 and the vocoder use one GPU at the same time, not by turns"
    )
    engine_args: JsonObject = Field({}, description="further vLLM engine arguments, as a JSON object")

    quantization: MethodName | None = Field(
        None, description="of T3: none, bnb-4bit, bnb-8bit, awq, int8, fp8, or another method of vLLM's"
    )
    quantization_strategy: StrategyName | None = Field(None, description="of everything; auto goes by free memory")
    quantization_profile: Path | None = Field(None, description='of everything: a TOML file, as t3 = "bnb-4bit"')
    flow_encoder_quantization: MethodName | None = Field(None, description="of the flow's encoder: none, bnb-4bit, ...")
    estimator_quantization: MethodName | None = Field(None, description="of the flow's estimator: none, bnb-4bit, ...")
    voice_encoder_quantization: MethodName | None = Field(None, description="of the voice encoder; worth 0.2 MB")
    use_quantization: bool | None = Field(None, description="quantise T3 by quantization_method")
    quantization_method: MethodName | None = Field(None, description="of use_quantization; bnb-4bit if unset")
    quantize_s3gen: bool | None = Field(None, description="quantise the vocoder, too")
    quantize_voice_encoder: bool | None = Field(None, description="quantise the voice encoder, too")
    use_bnb_quantization: bool | None = Field(None, description="the same as quantization=bnb-8bit")
    use_int8_quantization: bool | None = Field(None, description="T3 and vocoder in int8, on a CPU, too")
    strict_quantization: bool = Field(False, description="an error, not a weaker strategy, where one does not work")
    vram_budget: Amount | None = Field(
        None, description="all of the GPU's memory that may be used, as 2GiB; checked first"
    )

    exaggeration: float = _option("exaggeration", "default expressiveness; 0.5 is neutral")
    cfg_weight: float = _option("cfg_weight", "default guidance by the text; 0 switches it off")
    temperature: float = _option("temperature", "default sampling temperature; 0 always takes the likeliest token")
    top_p: float = Field(SpeechOptions.top_p, gt=0, le=1, description="default nucleus sampling; 1 switches it off")
    min_p: float = _option("min_p", "default least probability beside the likeliest token's; 0 switches it off")
    repetition_penalty: float = _option("repetition_penalty", "default penalty for tokens already spoken; 1 is none")
    max_tokens: int = _option("max_tokens", "default limit of an utterance, in speech tokens")
    diffusion_steps: int = _option("diffusion_steps", "default steps of the vocoder's flow")
    language: LanguageCode = Field("en", description="language of multilingual requests that name none")

    max_chunk_length: int = Field(
        300, ge=CHUNK_LENGTHS[0], le=CHUNK_LENGTHS[1], description="longer text is split at sentence ends (characters)"
    )
    first_chunk_tokens: int = Field(
        26, ge=1, le=MAX_SPEECH_TOKENS, description="speech tokens in a stream's first piece"
    )
    lone_chunk_tokens: int = Field(
        15,
        ge=1,
        le=MAX_SPEECH_TOKENS,
        description="the same for its first two pieces each, if it is the only stream and has no seed",
    )
    chunk_growth: float = Field(2.0, ge=1, le=16, description="how much longer each further piece is")
    largest_chunk_tokens: int = Field(240, ge=1, le=MAX_SPEECH_TOKENS, description="speech tokens in its longest piece")
    watermark: bool = Field(True, description="mark the speech as synthetic, inaudibly (Perth)")
    mask_invalid_tokens: bool = Field(True, description="never sample ids without a sound; false is as upstream")
    voices_dir: Path | None = Field(None, description="folder of voices: name.safetensors or name.wav, .mp3, ...")

    max_input_characters: int = Field(4096, ge=1, le=1_000_000, description="longest text of one request")
    max_upload_bytes: int = Field(10 * 2**20, ge=1024, le=2**30, description="largest reference recording of a request")
    max_concurrent_requests: int = Field(
        256, ge=1, le=100_000, description="requests in hand, spoken or waiting, before further ones get 429"
    )
    stalled_reader_timeout: float = Field(
        60.0, gt=0, le=3600, description="seconds a client may take no more of its audio"
    )
    drain_timeout: float = Field(30.0, ge=0, le=3600, description="seconds for requests in hand after SIGTERM")

    @model_validator(mode="after")
    def _first_chunk_fits(self) -> Self:
        if self.first_chunk_tokens > self.largest_chunk_tokens:
            both = " is more than ".join(f"{name}={getattr(self, name)}" for name in CHUNK_SIZES)
            raise ValueError(f"{both}; lower the one or raise the other")
        return self

    @property
    def options(self) -> SpeechOptions:
        """The deployment's sampling defaults."""
        names = OPTION_RANGES.keys() & type(self).model_fields.keys()
        return SpeechOptions(**{name: getattr(self, name) for name in names})

    @property
    def policy(self) -> Policy:
        """Which network is quantised how; of the strategy ``auto``, nothing is settled yet."""
        name = self.quantization_strategy
        said = {component: getattr(self, field) for component, field in FIELDS.items()}
        if not any(said.values()) and name != "auto":
            # ``sources.load`` spells out what other spellings mean, the constructor does not.
            given = {each: Given(value, each) for each in SPELLINGS if (value := getattr(self, each)) is not None}
            return resolve(given)
        methods = {component: method or "none" for component, method in said.items()}
        # Something else may have been said of a component, in a place that counts more.
        if name == "auto":
            overruled = any(said.values())
        else:
            overruled = name is not None and STRATEGIES[name].methods != methods
        return Policy(**methods, strategy=None if overruled else name)

    @property
    def effective_log_level(self) -> str:
        return "debug" if self.debug else self.log_level

    @property
    def checkpoint(self) -> tuple[str, VariantName | None]:
        """``(model, variant)`` for ``checkpoint.resolve``.

        A variant decides between the models that are known by name, so that ``--multilingual`` works beside
        ``CHATTERBOX_MODEL=english`` and ``=demo``; of a folder or repository it says what is inside.
        """
        if self.variant is None:
            return self.model, None
        if self.model in get_args(VariantName):
            return self.variant, None
        return ("demo" if self.model.startswith("demo-") else self.model), self.variant


def variables(name: str) -> tuple[str, ...]:
    """The environment variables of setting ``name``, ours first."""
    return (PREFIX + name.upper(), *OTHER_NAMES.get(name, ()))


def flag(name: str) -> str:
    """The command-line flag of setting ``name``."""
    return "--" + name.replace("_", "-")


def example() -> str:
    """The text of ``.env.example``: every variable, commented out, with its meaning, range and default."""
    lines = [
        "# Copy to .env and uncomment what you change. The same names work in the environment, which wins over this",
        "# file; a command-line flag wins over both. Written by: python -m chatterbox_vllm.settings > .env.example",
    ]
    for name, field in Settings.model_fields.items():
        other = "".join(f"; also {key}" for key in variables(name)[1:])
        lines += [
            "",
            f"# {field.description} ({allowed(field)}{other})",
            f"#{variables(name)[0]}={default_text(field)}",
        ]
    return "\n".join(lines) + "\n"


def allowed(field: FieldInfo) -> str:
    """What a value may be: ``an integer from 1 to 4096``, ``one of debug, info``."""
    kinds = [kind for kind in _alternatives(field.annotation) if kind is not type(None)]
    if dict in map(get_origin, kinds):
        return "a JSON object"
    if choices := [kind for kind in kinds if isinstance(kind, str)]:
        return f"one of {', '.join(choices)}"
    if bool in kinds:
        return "true or false"
    if int in kinds or float in kinds:
        return ("an integer" if int in kinds else "a number") + _range(field)
    if Path in kinds:
        return "a path"
    told = [rule.documentation for rule in (*field.metadata, *kinds) if isinstance(rule, annotated_types.DocInfo)]
    return told[0] if told else "text"


def default_text(field: FieldInfo) -> str:
    """The default as one would write it in a variable; empty for none."""
    default = field.default
    if isinstance(default, bool | dict):
        return json.dumps(default)
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def _alternatives(annotation: object) -> tuple[object, ...]:
    """The members of a union and of the literals in it."""
    if get_origin(annotation) is dict or not get_args(annotation):
        return (annotation,)
    return tuple(kind for member in get_args(annotation) for kind in _alternatives(member))


def _range(field: FieldInfo) -> str:
    low: object = None
    high: object = None
    above = False
    for rule in field.metadata:
        if isinstance(rule, annotated_types.Ge):
            low = rule.ge
        elif isinstance(rule, annotated_types.Gt):
            low, above = rule.gt, True
        elif isinstance(rule, annotated_types.Le):
            high = rule.le
    return f" above {low:g} and at most {high:g}" if above else f" from {_plain(low)} to {_plain(high)}"


def _plain(bound: object) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


if __name__ == "__main__":
    sys.stdout.write(example())
