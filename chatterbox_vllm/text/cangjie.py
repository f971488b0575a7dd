"""Chinese characters as Cangjie codes, the form in which the multilingual model reads them."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

from chatterbox_vllm.errors import CheckpointError


class CangjieTable:
    """The checkpoint's ``Cangjie5_TC.json``: a list of "glyph<TAB>code" strings.

    Mirrors upstream's ``ChineseCangjieConverter``, less its download.

    Raises:
        CheckpointError: the file is not such a list.
    """

    def __init__(self, path: Path) -> None:
        self._codes: dict[str, str] = {}
        first_rank: dict[tuple[str, str], int] = {}
        seen: Counter[str] = Counter()
        for glyph, code in _entries(path):
            rank = first_rank.setdefault((glyph, code), seen[code])
            seen[code] += 1
            self._codes[glyph] = f"{code}{rank or ''}"

    def tokens(self, character: str) -> list[str]:
        """Names of the tokens that stand for ``character``; empty when it stands for itself.

        Glyphs that share a code are told apart by their rank among them, which follows the code in decimal.
        """
        code = self._codes.get(character)
        if code is None or unicodedata.category(character) != "Lo":
            return []
        return [*(f"[cj_{key}]" for key in code), "[cj_.]"]


def _entries(path: Path) -> list[tuple[str, str]]:
    try:
        lines = json.loads(path.read_text(encoding="utf-8"))
        return [(fields[0], fields[1]) for fields in (line.split("\t") for line in lines)]
    except (OSError, ValueError, AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path} is not a Cangjie table (a list of 'glyph<TAB>code' strings): {error}") from error
