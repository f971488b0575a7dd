"""Where text may be cut without tearing apart what a reader takes for one character.

The rules of Unicode's extended grapheme clusters that matter to the model's languages, without the tables.
"""

from __future__ import annotations

import unicodedata
from typing import Final

_JOINERS: Final = frozenset("\u200c\u200d")
_VIRAMA: Final = 9
"""Canonical combining class of the sign that ties two consonants into one in Indic scripts."""


def is_boundary(text: str, at: int, start: int) -> bool:
    """Whether ``text`` may be cut before index ``at``, given that it may be cut before ``start`` < ``at``."""
    before, after = text[at - 1], text[at]
    if _extends(after) or before == "\u200d" or unicodedata.combining(before) == _VIRAMA:
        return False
    return not (_is_flag_half(after) and _flag_halves_before(text, at, start) % 2)


def _extends(character: str) -> bool:
    """Whether ``character`` is written into the one before it."""
    return (
        unicodedata.category(character).startswith("M")
        or character in _JOINERS
        or "\u1160" <= character <= "\u11ff"  # Hangul vowels and finals
        or "\ud7b0" <= character <= "\ud7fb"
        or "\uff9e" <= character <= "\uff9f"  # half-width voicing marks
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # skin tones
        or "\U000e0020" <= character <= "\U000e007f"  # tags of regional flags
        or "\udc00" <= character <= "\udfff"  # the second of a surrogate pair
    )


def _is_flag_half(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _flag_halves_before(text: str, at: int, start: int) -> int:
    first = at
    while first > start and _is_flag_half(text[first - 1]):
        first -= 1
    return at - first
