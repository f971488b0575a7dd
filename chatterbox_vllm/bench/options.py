"""What an option of a command line may be (``type=`` of argparse), and what a report tells of them."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, Final

_UNTOLD: Final = frozenset({"json", "api_key"})


def positive(text: str) -> float:
    """More than 0, and finite."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError("must be more than 0")
    return value


def count(text: str) -> int:
    """1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


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
