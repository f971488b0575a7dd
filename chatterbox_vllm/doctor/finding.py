"""What one check found."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    WARN = "warn"
    ERROR = "error"
    """The server cannot serve."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Args:
        name: what was looked at.
        detail: what it is, or what is wrong with it.
        remedy: the command or step that mends it; every finding that is not ``OK`` has one.
    """

    level: Level
    name: str
    detail: str
    remedy: str | None = None


def ok(name: str, detail: str) -> Finding:
    return Finding(Level.OK, name, detail)


def warn(name: str, detail: str, remedy: str) -> Finding:
    return Finding(Level.WARN, name, detail, remedy)


def error(name: str, detail: str, remedy: str) -> Finding:
    return Finding(Level.ERROR, name, detail, remedy)
