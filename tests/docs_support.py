"""The tables of docs/ that repeat what the code says. ``python -m tests.docs_support`` writes them anew."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from chatterbox_vllm.api.schemas import SpeechBody
from chatterbox_vllm.settings import PRESETS, Settings, allowed, default_text, variables
from chatterbox_vllm.types import OPTION_RANGES, SpeechOptions

ROOT = Path(__file__).resolve().parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PRESET_COLUMNS = ("vram_budget", "quantization_strategy", "max_batch_size", "max_model_len", "max_chunk_length")


def setting_row(name: str) -> str:
    field = Settings.model_fields[name]
    keys = ", ".join(f"`{key}`" for key in variables(name))
    return _row(f"`{name}`", keys, default_text(field) or "unset", allowed(field), field.description)


def preset_row(name: str) -> str:
    return _row(f"`{name}`", *(PRESETS[name].get(column, "") for column in PRESET_COLUMNS))


def request_row(name: str) -> str:
    field = SpeechBody.model_fields[name]
    values = 'text or `{"id": text}`' if name == "voice" else allowed(field)
    return _row(f"`{name}`", values, _request_default(name), field.description)


def _request_default(name: str) -> str:
    unset = SpeechBody(input="x")
    if name == "voice":
        return "`default`"
    if name in {"response_format", "speed", "stream"}:
        value = {"response_format": unset.format, "speed": unset.tempo, "stream": unset.streamed}[name]
        return str(value).lower()
    option = getattr(SpeechOptions(), name) if name in OPTION_RANGES else None
    return "" if option is None else f"{option:g}"


def _row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def configuration_row(name: str) -> str:
    return preset_row(name) if name in PRESETS else setting_row(name)


TABLES: dict[str, tuple[Iterable[str], Callable[[str], str]]] = {
    "configuration.md": ([*Settings.model_fields, *PRESETS], configuration_row),
    "http-api.md": (SpeechBody.model_fields, request_row),
}
"""File -> the first cells of its rows, and what makes a row of one."""


def first_cells(text: str) -> list[str]:
    """What the rows of all tables begin with."""
    return re.findall(r"^\| `([\w-]+)` \|", text, flags=re.MULTILINE)


def refreshed(path: Path) -> str:
    """The file with the rows of ``TABLES`` as the code has them."""
    names, row = TABLES[path.name]
    text = path.read_text(encoding="utf-8")
    for name in names:
        text = re.sub(rf"^\| `{name}` \|.*$", lambda _, name=name: row(name), text, count=1, flags=re.MULTILINE)
    return text


if __name__ == "__main__":
    for file in TABLES:
        target = ROOT / "docs" / file
        target.write_text(refreshed(target), encoding="utf-8")
