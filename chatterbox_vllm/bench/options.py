"""What an option of a command line may be (``type=`` of argparse), and what a report tells of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

Number = TypeVar("Number", int, float)
_UNTOLD: Final = frozenset({"json", "api_key"})


def positive(text: str) -> float:
    """More than 0, and finite."""
    value = _number(text, float, "a number")
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def count(text: str) -> int:
    """1 or more."""
    value = whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def whole(text: str) -> int:
    """Any whole number."""
    return _number(text, int, "a whole number")


def _number(text: str, kind: Callable[[str], Number], name: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {name}") from None


def output(text: str) -> Path:
    """A file that can be written when all is measured: its folder is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {path}: no such folder; make {path.parent} first")
    return path


def told(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options, for a report of JSON: without its own name and secrets."""
    given = {name: value for name, value in vars(arguments).items() if name not in _UNTOLD}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
