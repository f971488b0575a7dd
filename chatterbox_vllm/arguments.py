"""The arguments of ``AsyncChatterbox.start``: what is wrong with them is said before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.policy import NONE, Policy
from chatterbox_vllm.quantization.spellings import FIELDS, SPELLINGS, SWITCHES, Given, resolve
from chatterbox_vllm.vocoder.blueprint import best_dtype

DTYPES: Final[Mapping[str, torch.dtype | None]] = MappingProxyType(
    {"auto": None, **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}}
)


def get_optimal_dtype(device: str | torch.device | None = None) -> torch.dtype:
    """What T3 runs in, if nobody chooses: float32 on a CPU, bfloat16 where the card has it, float16 on older ones.

    Args:
        device: default: the GPU, if there is one.

    Raises:
        ConfigurationError: there is no such device.
    """
    wanted = device_of("device", str(device)) if device else ("cuda" if torch.cuda.is_available() else "cpu")
    return best_dtype(torch.device(wanted))


def policy_of(quantization: Policy | str | None, engine_args: dict[str, Any]) -> Policy:
    """The policy that ``quantization`` and other spellings name; the latter are taken out of ``engine_args``.

    Raises:
        ConfigurationError: one is unknown, a switch is neither True nor False, or two disagree.
    """
    given: dict[str, Given] = {name: Given(engine_args.pop(name), name) for name in SPELLINGS if name in engine_args}
    given = {name: each for name, each in given.items() if each.value is not None}
    for name, each in given.items():
        if name in SWITCHES:
            check_switch(name, each.value, "True, False or None")
    if isinstance(quantization, Policy):
        if given:
            both = f"quantization is a whole policy, and {next(iter(given))} is given, too"
            raise ConfigurationError(f"{both}; keep one", param="quantization")
        return quantization
    if quantization is not None:
        given["quantization"] = Given(quantization, "quantization")
    try:
        return resolve(given) if given else NONE
    except ConfigurationError as error:
        if (field := FIELDS.get(error.param or "")) in given:  # the policy knows the component, and not how it was told
            raise ConfigurationError(f"{field}: {error}", param=field) from None
        raise


def device_of(name: str, wanted: str | None) -> str | None:
    """``wanted``, if this machine has it.

    Raises:
        ConfigurationError: it has not.
    """
    if wanted is None:
        return None
    named = str(wanted)  # a torch.device is as good as its name
    if named == "cpu":
        return named
    index, count = re.fullmatch(r"cuda(?::(0|[1-9][0-9]*))?", named), torch.cuda.device_count()
    if index is None or int(index[1] or 0) >= count:
        cards = f", cuda:0 to cuda:{count - 1}" if count else "; this machine has no CUDA device"
        raise ConfigurationError(f"{name} must be cpu{cards}, not {wanted!r}", param=name)
    return named


def vocoder_devices(wanted: str, own_process: bool | None) -> list[str]:
    """A device for each worker.

    Raises:
        ConfigurationError: there is no such device, or several cannot share one process.
    """
    devices = [str(device_of("vocoder_device", each.strip())) for each in str(wanted).split(",")]
    if own_process is False and len(devices) > 1:
        raise ConfigurationError(
            f"vocoder_process=False runs one worker, and vocoder_device={wanted!r} names {len(devices)} devices; "
            "name one device, or leave vocoder_process out",
            param="vocoder_process",
        )
    cards = ["cuda:0" if each == "cuda" else each for each in devices if each != "cpu"]
    if twice := next((card for card in cards if cards.count(card) > 1), None):
        raise ConfigurationError(
            f"vocoder_device={wanted!r} names {twice} twice; a card has one worker", param="vocoder_device"
        )
    return devices


def vocoder_dtype_of(wanted: str) -> torch.dtype | None:
    """None for the device's best."""
    if wanted not in DTYPES:
        raise ConfigurationError(
            f"vocoder_dtype must be one of {', '.join(DTYPES)}, not {wanted!r}", param="vocoder_dtype"
        )
    return DTYPES[wanted]


def check_switch(name: str, value: Any, allowed: str = "True or False") -> None:
    """Refuses what is neither True nor False: "false" is true to Python."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be {allowed}, not {value!r}", param=name)


def check(name: str, value: Any, low: float, high: float, kind: type) -> None:
    """Refuses what is no number of that kind, or out of range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (whole or (kind is float and isinstance(value, float))) or not low <= float(value) <= high:
        noun = "a number" if kind is float else "an integer"
        raise ConfigurationError(f"{name} must be {noun} from {low} to {high}, not {value!r}", param=name)
