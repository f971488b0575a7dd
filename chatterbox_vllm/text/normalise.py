"""Upstream's clean-up of punctuation, character for character.

The model was trained behind this function, so its quirks are kept: the first letter is capitalised before white
space is collapsed, and the replacements run in this order.
"""

from __future__ import annotations

from typing import Final

_EMPTY: Final = "You need to add some text for me to talk."
_REPLACEMENTS: Final = (
    ("...", ", "),
    ("…", ", "),
    (":", ","),
    (" - ", ", "),
    (";", ", "),
    ("—", "-"),
    ("–", "-"),
    (" ,", ","),
    ("“", '"'),
    ("”", '"'),
    ("‘", "'"),
    ("’", "'"),
)
_ENDINGS: Final = (".", "!", "?", "-", ",")
_MULTILINGUAL_ENDINGS: Final = (*_ENDINGS, "、", "，", "。", "？", "！")


def punc_norm(text: str, *, multilingual: bool) -> str:
    """``text`` as the model expects it, ending in punctuation.

    Mirrors ``punc_norm`` of upstream's ``tts.py``, or with ``multilingual`` of its ``mtl_tts.py``, which also accepts
    Chinese and Japanese endings. Empty text becomes a fixed sentence there, and so here.
    """
    if not text:
        return _EMPTY
    if text[0].islower():
        text = text[0].upper() + text[1:]
    text = " ".join(text.split())
    for uncommon, common in _REPLACEMENTS:
        text = text.replace(uncommon, common)
    text = text.rstrip(" ")
    endings = _MULTILINGUAL_ENDINGS if multilingual else _ENDINGS
    return text if text.endswith(endings) else text + "."
