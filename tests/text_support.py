"""Upstream's text code without the rest of upstream, and tokenizers with the structure of upstream's files."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES

SPECIAL = ["[UH]", "[UM]", "[giggle]", "[laughter]", "[sigh]", "[ipa]", "[PLACEHOLDER55]"]
LANGUAGE_TAGS = [f"[{code}]" for code in SUPPORTED_LANGUAGES]
CANGJIE_TAGS = [f"[cj_{key}]" for key in "abcdefghijklmnopqrstuvwxyz0123456789."]
MERGES = ["t h", "i n", "th e", "a n", "e r", "in g", "o u", "к о", "ν α"]
# two share a code, one is listed twice, one is no Chinese character
CANGJIE = ["今\toin", "天\tmk", "禿\tmk", "好\tvnd", "我\thqi", "们\toils", "好\tvnd", "a\tx", "畳\tBAD"]
CHARACTERS = (
    "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmnopqrstuvwxyz{|}~\u00a0"
    "¡¿«»ßαβγδεζηθικλμνξοπρστυφχψωςабвгдежзиклмнопрстухцчшщъыьэюя\u0300\u0301\u0303\u0306\u0308\u030c\u0327\u3099"
    "אבגדהاأبتثجحअआकखगनमस्तेあいうえおかはへんアカン、。，？！今天我"
)
EXOTIC = (
    "Ωﬁ①½ǅİẞＡ［］【】éüñçøå—–…“”‘’«»¿¡　 \u00a0\u2028\u200b\u0301"
    "여보세요ᄒ\ud7a4日本語へ行く天好们禿한글😀👍🏽🇩🇪\t\n'\"[]_"
)


def upstream_punc_norm(multilingual: bool) -> Callable[[str], str]:
    return _text_code(multilingual)["punc_norm"]


def upstream_languages() -> dict[str, str]:
    return _text_code(True)["SUPPORTED_LANGUAGES"]


@cache
def _text_code(multilingual: bool) -> dict[str, Any]:
    """What upstream's file defines without the networks that importing it would pull in."""
    tree = ast.parse((_wheel() / ("mtl_tts.py" if multilingual else "tts.py")).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.Assign)]
    namespace: dict[str, Any] = {}
    exec(compile(tree, "upstream", "exec"), namespace)
    return namespace


def upstream_tokenizers() -> ModuleType:
    """A fresh copy of upstream's ``models/tokenizers/tokenizer.py``: its optional packages not looked for yet."""
    path = _wheel() / "models" / "tokenizers" / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("upstream_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _wheel() -> Path:
    spec = importlib.util.find_spec("chatterbox")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("upstream's wheel is not installed")
    return Path(spec.submodule_search_locations[0])


def write_tokenizer(path: Path, *, multilingual: bool) -> Path:
    """A BPE tokenizer as upstream's: no normaliser, Whitespace pre-tokenizer, added tokens that are not normalised."""
    added = [*SPECIAL, *(["[PAD]", "[SEP]", *LANGUAGE_TAGS, *CANGJIE_TAGS] if multilingual else ["[de]", "[fr]"])]
    vocabulary = {"[STOP]": 0, "[UNK]": 1, "[SPACE]": 2, "[START]": 255}
    taken = set(vocabulary.values())
    free = (number for number in range(10_000) if number not in taken)
    for token in dict.fromkeys([*CHARACTERS, *(pair.replace(" ", "") for pair in MERGES), *added]):
        vocabulary[token] = next(free)
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(vocabulary, token) for token in ["[STOP]", "[UNK]", "[SPACE]", "[START]", *added]],
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
            "merges": MERGES,
        },
    }
    path.write_text(json.dumps(description), encoding="utf-8")
    return path


def _added(vocabulary: dict[str, int], token: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": vocabulary[token], "content": token, "special": token not in LANGUAGE_TAGS, **plain}


def write_cangjie(path: Path, entries: Sequence[str] = CANGJIE) -> Path:
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return path


def random_texts(count: int, *, seed: int, brackets: bool = True) -> list[str]:
    """Texts over many scripts, with runs of punctuation and of white space."""
    rng = random.Random(seed)
    parts = [*CHARACTERS, *EXOTIC, " ", " ", "the ", "thing", "...", " - ", " ,", ": ", ";", "  ", "\n", "\r\n"]
    if not brackets:
        parts = [part for part in parts if part not in "[]［］"]
    return ["".join(rng.choices(parts, k=rng.randrange(40))) for _ in range(count)]


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    """Puts a module of that name, and its parents, where an import finds it."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:depth]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for key, value in contents.items():
        setattr(module, key, value)
