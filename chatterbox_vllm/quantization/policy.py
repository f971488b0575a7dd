"""Which method for which network, and why; ``spellings`` has the ways to ask for it.

    component      what is quantised                                        methods
    t3             linear layers of the Llama                               bnb-4bit, bnb-8bit, awq, int8, fp8, vLLM's
    flow_encoder   linear layers of the conformer blocks                    bnb-4bit, bnb-8bit, int8
    estimator      linear layers of the transformer blocks                  bnb-4bit, bnb-8bit, int8
    voice_encoder  the projection after the LSTM                            bnb-4bit, bnb-8bit, int8

Never quantised (``KEPT``): embeddings and heads, norms, HiFT and its pitch predictor, T3's conditioning.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Self

from chatterbox_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    from chatterbox_vllm.quantization.packing import Stored

logger: Final = logging.getLogger(__name__)


class Method(StrEnum):
    """Our names of the methods."""

    NONE = "none"
    BNB_4BIT = "bnb-4bit"
    """bitsandbytes' NF4 in blocks of 64, with 16-bit activations. NVIDIA GPUs."""
    BNB_8BIT = "bnb-8bit"
    """bitsandbytes' 8-bit weights, a scale a row, with 16-bit activations. NVIDIA GPUs."""
    AWQ = "awq"
    """4-bit T3 that ``chatterbox-vllm quantize`` wrote, on vLLM's kernels for that; on a CPU, too."""
    INT8 = "int8"
    """8-bit weights and activations, a scale a row; on a CPU, too."""
    FP8 = "fp8"
    """vLLM's online float8 of T3. NVIDIA GPUs."""


class QuantizationStrategy(StrEnum):
    """Policies by name."""

    NONE = "none"
    CONSERVATIVE = "conservative"
    MIXED = "mixed"
    AGGRESSIVE = "aggressive"
    AUTO = "auto"


COMPONENTS: Final = ("t3", "flow_encoder", "estimator", "voice_encoder")
VOCODER: Final = ("flow_encoder", "estimator")
KEPT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "embeddings": "they are looked up, not multiplied, and every token begins with one",
        "speech head": "every sampled token goes through it, and it is 2% of T3",
        "norms and biases": "a thousandth of the weights",
        "t3 conditioning": "it runs once a voice, in float32 on the CPU, and takes no memory of the card",
        "time embedding of the estimator": "it is computed once and kept as numbers, not as weights",
        "hift": "convolutions that make the waveform: what is wrong in them is heard, no network mends it",
        "f0 predictor": "an error in pitch adds up to a phase over the whole utterance",
    }
)
LINEAR: Final = frozenset({Method.NONE, Method.BNB_4BIT, Method.BNB_8BIT, Method.INT8})
GPU_ONLY: Final = frozenset({Method.BNB_4BIT, Method.BNB_8BIT, Method.FP8})
_VLLM_NAMES: Final[Mapping[str, str]] = MappingProxyType({"bitsandbytes": Method.BNB_4BIT, "": Method.NONE})
"""What vLLM, and our users of it, call what has another name here."""


def canonical(value: Any, origin: str = "quantization") -> str:
    """Our name of a method, in whichever case: ``bitsandbytes`` is bnb-4bit, None is none.

    What vLLM alone knows stays as it is.

    Raises:
        ConfigurationError: the value is no text.
    """
    if value is None:
        return str(Method.NONE)
    if not isinstance(value, str):
        raise ConfigurationError(
            f"{origin} must be one of {', '.join(Method)}, or another method of vLLM's, not {value!r}", param=origin
        )
    lower = value.lower()
    return str(_VLLM_NAMES.get(lower, lower if lower in frozenset(Method) else value))


@dataclass(frozen=True)
class Policy:
    """A method for each component.

    Args:
        t3: a ``Method``, or the name of any other method of vLLM's, which is passed on; as ``canonical`` knows them.
        flow_encoder, estimator, voice_encoder: a ``Method`` that suits linear layers.
        strategy: the name it came by, if it did.

    Raises:
        ConfigurationError: a component cannot have its method, or ``auto`` has methods.
    """

    t3: str = Method.NONE
    flow_encoder: str = Method.NONE
    estimator: str = Method.NONE
    voice_encoder: str = Method.NONE
    strategy: str | None = None

    def __post_init__(self) -> None:
        for name in COMPONENTS:
            object.__setattr__(self, name, canonical(getattr(self, name), name))
        for name in COMPONENTS[1:]:
            if getattr(self, name) not in LINEAR:
                allowed = ", ".join(sorted(LINEAR))
                raise ConfigurationError(f"{name} cannot be {getattr(self, name)}; it can be {allowed}", param=name)
        if self.strategy == QuantizationStrategy.AUTO and self.is_quantized:
            raise ConfigurationError(
                "the strategy auto decides about every component; give no methods", param="strategy"
            )

    @property
    def methods(self) -> dict[str, str]:
        """Component to method."""
        return {name: str(getattr(self, name)) for name in COMPONENTS}

    @property
    def is_quantized(self) -> bool:
        return any(method != Method.NONE for method in self.methods.values())

    @property
    def method(self) -> str:
        """One word for it: the method that all quantised components share, else ``mixed``."""
        used = {method for method in self.methods.values() if method != Method.NONE}
        return used.pop() if len(used) == 1 else "mixed" if used else str(Method.NONE)

    def of_file(self, stored: Stored) -> Policy:
        """For a checkpoint whose T3 may be quantised: a strategy leaves that as it is, and has the other parts."""
        if stored.method == Method.NONE or self.strategy in (None, QuantizationStrategy.AUTO):
            return self
        return self.but(t3=stored.method)

    def but(self, **methods: str) -> Policy:
        """With other methods for some components, by the same name."""
        return Policy(**self.methods | methods, strategy=self.strategy)

    def on_cpu(self, components: Container[str] = COMPONENTS, *, strict: bool = False) -> Policy:
        """What of it a CPU can do: a strategy's 8-bit parts become int8, its 4-bit parts, too.

        Args:
            components: those that a CPU has; the others stay as they are.
            strict: raise for a strategy's, too.

        Raises:
            ConfigurationError: a method that needs an NVIDIA GPU was named or, if ``strict``, is a strategy's.
        """
        gpu_only = {name: method for name, method in self.methods.items() if method in GPU_ONLY and name in components}
        if not gpu_only:
            return self
        if self.strategy is None or strict:
            name, method = next(iter(gpu_only.items()))
            remedy = "leave it out, or use int8"
            if self.strategy is not None:
                remedy = f"the strategy {self.strategy} has int8 in its place, unless strict_quantization is set"
            raise ConfigurationError(f"{method} ({name}) needs an NVIDIA GPU; on a CPU {remedy}", param="quantization")
        parts = ", ".join(gpu_only)
        logger.warning("the strategy %s needs an NVIDIA GPU; on a CPU %s will be int8", self.strategy, parts)
        return self.but(**dict.fromkeys(gpu_only, str(Method.INT8)))

    def weaker(self) -> Policy | None:
        """The strategy to try when this one failed: the next that quantises less; None after the last."""
        order = [*_LADDER, str(QuantizationStrategy.NONE)]
        if self.strategy not in _LADDER:
            return None
        return STRATEGIES[order[order.index(self.strategy) + 1]]

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """A user's profile: TOML or JSON, a method for each component that is to have one.

        Raises:
            ConfigurationError: the file cannot be read, or names no component or method.
        """
        file = Path(path).expanduser()
        try:
            text = file.read_text(encoding="utf-8-sig")
            is_json = file.suffix.lower() == ".json"
            content = json.loads(text, object_pairs_hook=_once) if is_json else tomllib.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f'{file} is no quantisation profile ({error}); write TOML such as: t3 = "bnb-4bit"',
                param="quantization_profile",
            ) from error
        if not content:
            raise ConfigurationError(f'{file} names no component; write: t3 = "bnb-4bit"', param="quantization_profile")
        if not isinstance(content, dict) or content.keys() - set(COMPONENTS):
            unknown = sorted(content.keys() - set(COMPONENTS)) if isinstance(content, dict) else [text[:40]]
            raise ConfigurationError(
                f"{file}: {', '.join(unknown)} is no component; there are {', '.join(COMPONENTS)}",
                param="quantization_profile",
            )
        try:
            return cls(**content)
        except ConfigurationError as error:
            raise ConfigurationError(f"{file}: {error}", param="quantization_profile") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which lets a later value of a key silently take the place of an earlier one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a component is there twice")
    return found


NONE: Final = Policy()
STRATEGIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {
        str(name): Policy(t3, vocoder, vocoder, voice_encoder, strategy=str(name))
        for name, t3, vocoder, voice_encoder in (
            (QuantizationStrategy.NONE, Method.NONE, Method.NONE, Method.NONE),
            (QuantizationStrategy.CONSERVATIVE, Method.INT8, Method.INT8, Method.NONE),
            (QuantizationStrategy.MIXED, Method.BNB_4BIT, Method.BNB_8BIT, Method.NONE),
            (QuantizationStrategy.AGGRESSIVE, Method.BNB_4BIT, Method.BNB_4BIT, Method.BNB_4BIT),
        )
    }
)
"""``auto`` is one of these, chosen by free memory (``chatterbox_vllm.budget``)."""
_LADDER: Final = ("aggressive", "mixed", "conservative")


def effective_method(stored: Stored, asked: str) -> str:
    """The method by which a checkpoint is served: its own if it is quantised, else the one asked for.

    Raises:
        ConfigurationError: both are given and differ, or awq is asked of a checkpoint that is not quantised.
    """
    if stored.method != Method.NONE:
        if asked not in (Method.NONE, stored.method):
            raise ConfigurationError(
                f"quantization={asked}, but this checkpoint's T3 is {stored.method} already; leave quantization out, "
                "or give the checkpoint it was made from",
                param="quantization",
            )
        return stored.method
    if asked == Method.AWQ:
        raise ConfigurationError(
            "quantization=awq needs a checkpoint made for it: chatterbox-vllm quantize MODEL OUT --method awq, "
            "then give OUT as the model",
            param="quantization",
        )
    return asked


def without_gpu(method: str, *, stored: bool) -> ConfigurationError:
    """What to raise on a CPU for T3's method that needs a GPU.

    Args:
        stored: the checkpoint is quantised so, and nobody asked for it.
    """
    if stored:
        return ConfigurationError(
            f"this checkpoint's T3 is {method}, which needs an NVIDIA GPU; on a CPU give the checkpoint it was made "
            "from, as it is or with quantization=int8",
            param="model",
        )
    return ConfigurationError(
        f"quantization={method} needs an NVIDIA GPU; on a CPU leave it out, or use int8", param="quantization"
    )
