"""The tokenizers of a demo checkpoint: valid files of the ``tokenizers`` library with upstream's sizes and tokens.

Like upstream's they are byte-pair encodings over characters, split at white space and punctuation, in which control
tokens such as ``[SPACE]`` are added tokens. The merges spell a few common words, and what is left of the vocabulary
is filled with placeholders.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Sequence
from typing import Any, Final

from chatterbox_vllm.demo_checkpoint.networks import ENGLISH_VOCABULARY, MULTILINGUAL_VOCABULARY
from chatterbox_vllm.types import START_TEXT, STOP_TEXT

_FIXED: Final = {STOP_TEXT: "[STOP]", 1: "[UNK]", 2: "[SPACE]", START_TEXT: "[START]"}
_SPECIAL: Final = ("[PAD]", "[SEP]", "[CLS]", "[MASK]")
_LANGUAGES: Final = "ar da de el en es fi fr he hi it ja ko ms nl no pl pt ru sv sw tr zh"
_CANGJIE_KEYS: Final = string.ascii_lowercase + string.digits + "."
_WORDS: Final = (
    "the and ing you that was for are with his they this have from one had word but not what all were when your can "
    "said there use each which she how their will other about out many then them these some her would make like him "
    "into time has look two more write see number way could people than first water been call who now find long down "
    "day did get come made may part over new sound take only little work know place year live back give most very "
    "hello speech"
)

# What the 23 languages are written with: (first, last) code points. Folded to lower case and NFKD, as text will be.
_SCRIPTS: Final = (
    (0x21, 0x7E),
    (0xA1, 0x17F),  # Latin
    (0x300, 0x345),  # combining marks
    (0x370, 0x3CE),  # Greek
    (0x400, 0x45F),  # Cyrillic
    (0x5B0, 0x5EA),  # Hebrew
    (0x60C, 0x669),  # Arabic
    (0x900, 0x97F),  # Devanagari
    (0x2010, 0x2026),  # dashes, quotation marks
    (0x3001, 0x3002),  # ideographic comma and full stop
    (0x3041, 0x30FF),  # Hiragana, Katakana
    (0x1100, 0x1112),  # Jamo: initial, medial, final
    (0x1161, 0x1175),
    (0x11A8, 0x11C2),
)

# Codes of common characters; 曰 shares the code of 日, as some pairs do in the whole table.
_CANGJIE: Final = (
    "日a 曰a 月b 金c 木d 水e 火f 土g 山u 口r 女v 田w 人o 心p 手q 大k 中l 一m 二mm 三mmm 十j 上ym 下my 不mf 了nn 子nd "
    "小nc 好vnd 你onf 我hqi 他opd 她vpd 是amyo 的hapi 有kb 在klg 天mk 今oin 明ab 早aj 林dd 森ddd 生hqm 文yk 字jnd "
    "國wirm 来dt 去gi 說yrcru 話yrhjr 語yrmmr 世pt 界woll"
)


def english_tokenizer() -> dict[str, Any]:
    """``tokenizer.json``: 704 tokens, case-sensitive."""
    characters = string.ascii_letters + string.digits + string.punctuation
    return _tokenizer(characters, added=_SPECIAL, size=ENGLISH_VOCABULARY)


def multilingual_tokenizer() -> dict[str, Any]:
    """``grapheme_mtl_merged_expanded_v1.json``: 2454 tokens for lower-case NFKD text."""
    added = [*_SPECIAL, *(f"[{code}]" for code in _LANGUAGES.split()), *(f"[cj_{key}]" for key in _CANGJIE_KEYS)]
    return _tokenizer(_folded_characters(), added=added, size=MULTILINGUAL_VOCABULARY)


def cangjie_table() -> list[str]:
    """``Cangjie5_TC.json`` in upstream's format, one "character, tab, code" an entry, for a few dozen characters."""
    return [f"{entry[0]}\t{entry[1:]}" for entry in _CANGJIE.split()]


def _folded_characters() -> str:
    every = "".join(chr(code) for first, last in _SCRIPTS for code in range(first, last + 1))
    folded = unicodedata.normalize("NFKD", every.lower())
    return "".join(dict.fromkeys(c for c in folded if unicodedata.category(c)[0] in "LMNPS"))


def _merges() -> list[tuple[str, str]]:
    """The pairs that build ``_WORDS`` from left to right, each once."""
    steps = ((word[:end], word[end]) for word in _WORDS.split() for end in range(1, len(word)))
    return list(dict.fromkeys(steps))


def _tokenizer(characters: str, *, added: Sequence[str], size: int) -> dict[str, Any]:
    merges = _merges()
    tokens = [*added, *characters, *(left + right for left, right in merges)]
    vocabulary = _numbered(tokens, size)
    special = [*_FIXED.values(), *added]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted((_added(token, vocabulary[token]) for token in special), key=lambda entry: entry["id"]),
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "[UNK]",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _numbered(tokens: Sequence[str], size: int) -> dict[str, int]:
    """``size`` tokens: the fixed ones, then ``tokens``, then placeholders in what is left."""
    free = [number for number in range(size) if number not in _FIXED]
    named = [*tokens, *(f"[PLACEHOLDER{number}]" for number in range(len(free) - len(tokens)))]
    numbered = dict(zip(named, free, strict=True)) | {token: number for number, token in _FIXED.items()}
    return dict(sorted(numbered.items(), key=lambda item: item[1]))


def _added(token: str, number: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
