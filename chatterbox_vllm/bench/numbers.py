"""Numbers of a command line: ``type=`` of argparse."""

from __future__ import annotations

import argparse
import math


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
