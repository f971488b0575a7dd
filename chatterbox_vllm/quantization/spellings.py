"""The ways in which people ask for a policy: five spellings that other projects made familiar, and ours.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.policy import (
    COMPONENTS,
    LINEAR,
    STRATEGIES,
    VOCODER,
    Method,
    Policy,
    QuantizationStrategy,
    canonical,
)


class Given(NamedTuple):
    """A spelling's value and where it came from, for messages: ``--quantization``, ``CHATTERBOX_QUANTIZATION``."""

    value: Any
    origin: str


SPELLINGS: Final = (
    "quantization",
    "use_quantization",
    "quantization_method",
    "quantize_s3gen",
    "quantize_voice_encoder",
    "use_bnb_quantization",
    "quantization_strategy",
    "quantization_profile",
    "use_int8_quantization",
    "flow_encoder_quantization",
    "estimator_quantization",
    "voice_encoder_quantization",
)
"""Names of settings and of keyword arguments."""
SWITCHES: Final = frozenset(
    {"use_quantization", "quantize_s3gen", "quantize_voice_encoder", "use_bnb_quantization", "use_int8_quantization"}
)
"""Those that are true or false."""
FIELDS: Final[Mapping[str, str]] = MappingProxyType(
    {"t3": "quantization", **{name: f"{name}_quantization" for name in COMPONENTS[1:]}}
)
"""The spelling that means one component and nothing else."""
_LINEAR_ONES: Final = LINEAR - {Method.NONE}
_Claim = tuple[Given, Mapping[str, str], str | None]


def resolve(given: Mapping[str, Given]) -> Policy:
    """The policy that all spellings together ask for: ``claims``, and ``none`` for what nobody speaks of."""
    components, strategy = claims(given)
    return Policy(**components, strategy=strategy)


def claims(
    given: Mapping[str, Given], elsewhere: Mapping[str, str] = MappingProxyType({})
) -> tuple[dict[str, str], str | None]:
    """What all spellings together say: component to method, and the strategy's name.

        quantization                              T3: a method, "bitsandbytes" (bnb-4bit), "none" or None
        use_quantization, quantization_method     T3: the method, bnb-4bit unless it is named; false: nothing at all
        quantize_s3gen, quantize_voice_encoder    the other parts that a strategy or int8 leaves, by T3's method;
                                                  false: not those parts
        use_bnb_quantization                      T3: bnb-8bit
        quantization_strategy                     everything: conservative, mixed, aggressive, auto, none
        quantization_profile                      everything: a file
        use_int8_quantization                     everything: int8
        ..._quantization                          that component

    ``auto`` decides about all of them later, so that nobody else may say anything.

    Args:
        given: spelling to value; those that were left open are absent.
        elsewhere: component to method, as other places have it: a switch for a part goes by T3's method there, and
            leaves what is quantised there, unless T3's method is given beside it.

    Raises:
        ConfigurationError: a value is unknown, or two spellings disagree; names both.
    """
    said: dict[str, tuple[str, Given]] = {}
    strategy: str | None = None
    for origin, methods, name in _claims(given, elsewhere):
        strategy = name or strategy
        for component, method in methods.items():
            before, first = said.setdefault(component, (method, origin))
            if before != method:
                both = " and ".join(f"{each.origin}={_shown(each.value)}" for each in (first, origin))
                raise ConfigurationError(f"{both} disagree about {component}; keep one", param=origin.origin)
    if strategy == QuantizationStrategy.AUTO and said:
        auto, (_, first) = given["quantization_strategy"], next(iter(said.values()))
        both = f"{first.origin}={_shown(first.value)} and {auto.origin}={auto.value}"
        raise ConfigurationError(f"{both} disagree: auto decides about everything; keep one", param=auto.origin)
    return {component: method for component, (method, _) in said.items()}, strategy


def method_of_t3(given: Mapping[str, Given]) -> str | None:
    """T3's method, by whichever spelling; None if none speaks of T3."""
    return next(_methods_of_t3(given), None)


def _claims(given: Mapping[str, Given], elsewhere: Mapping[str, str]) -> Iterator[_Claim]:
    """Each spelling that says something, and what it says."""
    yield from _of_one(given)
    yield from _of_t3(given)
    yield from _of_parts(given, elsewhere)
    yield from _of_everything(given)


def _methods_of_t3(given: Mapping[str, Given]) -> Iterator[str]:
    for of in (_of_one, _of_t3, _of_everything):
        yield from (methods["t3"] for _, methods, _ in of(given) if "t3" in methods)


def _of_one(given: Mapping[str, Given]) -> Iterator[_Claim]:
    for component, name in FIELDS.items():
        if (one := given.get(name)) is not None:
            yield one, {component: canonical(one.value, one.origin)}, None


def _of_t3(given: Mapping[str, Given]) -> Iterator[_Claim]:
    use, method = given.get("use_quantization"), given.get("quantization_method")
    if use is not None and not use.value:
        yield use, dict.fromkeys(COMPONENTS, str(Method.NONE)), None
    elif use is not None or (method is not None and _parts(given)):
        said = method or use
        assert said is not None
        yield said, {"t3": canonical(method.value, method.origin) if method else str(Method.BNB_4BIT)}, None
    elif method is not None:
        raise ConfigurationError(
            f"{method.origin}={method.value} has no effect without use_quantization; set both or none",
            param=method.origin,
        )
    if (bnb := given.get("use_bnb_quantization")) is not None:
        yield bnb, {"t3": str(Method.BNB_8BIT if bnb.value else Method.NONE)}, None


def _of_parts(given: Mapping[str, Given], elsewhere: Mapping[str, str]) -> Iterator[_Claim]:
    done = {
        component
        for _, methods, _ in _of_everything(given)
        for component, method in methods.items()
        if method != Method.NONE
    }
    for name, components in _parts(given).items():
        left = [component for component in components if component not in done]
        yield given[name], {component: _beside_t3(component, given, elsewhere) for component in left}, None
    for name, components in _parts(given, on=False).items():
        yield given[name], dict.fromkeys(components, str(Method.NONE)), None


def _parts(given: Mapping[str, Given], *, on: bool = True) -> dict[str, tuple[str, ...]]:
    """The switches for single parts that are on, or off, and their components."""
    known = {"quantize_s3gen": VOCODER, "quantize_voice_encoder": ("voice_encoder",)}
    return {name: components for name, components in known.items() if name in given and bool(given[name].value) is on}


def _beside_t3(component: str, given: Mapping[str, Given], elsewhere: Mapping[str, str]) -> str:
    """A part's method, if linear layers can have it: T3's, or what the part has by another place; else bnb-4bit."""
    said, of_all = [method for method in _methods_of_t3(given) if method in _LINEAR_ONES], elsewhere.get("t3")
    known = [of_all, *said] if said else [elsewhere.get(component), of_all]
    return next((method for method in known if method in _LINEAR_ONES), str(Method.BNB_4BIT))


def _of_everything(given: Mapping[str, Given]) -> Iterator[_Claim]:
    if (int8 := given.get("use_int8_quantization")) is not None and int8.value:
        yield int8, dict.fromkeys(("t3", *VOCODER), str(Method.INT8)), None
    if (strategy := given.get("quantization_strategy")) is not None and strategy.value is not None:
        methods, name = _of_strategy(strategy)
        yield strategy, _but_switched_on(methods, given), name
    if (profile := given.get("quantization_profile")) is not None and profile.value is not None:
        if not isinstance(profile.value, str | PathLike):
            raise ConfigurationError(
                f"{profile.origin} must be the path of a TOML or JSON file, not {profile.value!r}", param=profile.origin
            )
        policy = Policy.from_file(Path(profile.value))
        yield profile, _but_switched_on(policy.methods, given), policy.strategy


def _but_switched_on(methods: Mapping[str, str], given: Mapping[str, Given]) -> Mapping[str, str]:
    """Without what is left unquantised and a switch quantises; a policy that quantises nothing means it."""
    if all(method == Method.NONE for method in methods.values()):
        return methods
    switched = {component for components in _parts(given).values() for component in components}
    return {name: method for name, method in methods.items() if method != Method.NONE or name not in switched}


def _of_strategy(given: Given) -> tuple[Mapping[str, str], str]:
    name = str(given.value).lower()
    if name == QuantizationStrategy.AUTO:
        return {}, name
    if name not in STRATEGIES:
        known = ", ".join(QuantizationStrategy)
        raise ConfigurationError(f"{given.origin}={given.value} is no strategy; there are {known}", param=given.origin)
    return STRATEGIES[name].methods, name


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value)
