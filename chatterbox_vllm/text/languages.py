"""The languages of the multilingual model, and what upstream does to the text of each before tokenising.

The packages that four of them use are optional. Each is imported, and may download its model, only when its language
is first asked for; without it the text is spoken as it is, after one warning.
Mirrors the functions of upstream's ``models/tokenizers/tokenizer.py``; Cangjie codes are in ``cangjie.py``, because
they are tokens rather than text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.text.optional import OptionalStep, TextStep

SUPPORTED_LANGUAGES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ar": "Arabic",
        "da": "Danish",
        "de": "German",
        "el": "Greek",
        "en": "English",
        "es": "Spanish",
        "fi": "Finnish",
        "fr": "French",
        "he": "Hebrew",
        "hi": "Hindi",
        "it": "Italian",
        "ja": "Japanese",
        "ko": "Korean",
        "ms": "Malay",
        "nl": "Dutch",
        "no": "Norwegian",
        "pl": "Polish",
        "pt": "Portuguese",
        "ru": "Russian",
        "sv": "Swedish",
        "sw": "Swahili",
        "tr": "Turkish",
        "zh": "Chinese",
    }
)


def check_language(code: str, *, param: str = "language_id") -> str:
    """The code in lower case.

    Raises:
        InvalidRequest: not one of ``SUPPORTED_LANGUAGES``; ``param`` names the field.
    """
    known = code.lower() if isinstance(code, str) else None
    if known not in SUPPORTED_LANGUAGES:
        languages = ", ".join(SUPPORTED_LANGUAGES)
        raise InvalidRequest(f"{param} must be one of {languages}, not {code!r:.40}", param=param)
    return known


def preprocess(text: str, language: str | None) -> str:
    """Lower case, NFKD, then the language's own step: the text that the multilingual tokenizer reads.

    Mirrors ``MTLTokenizer.preprocess_text`` and the part of ``encode`` up to the language token, except that Chinese
    is segmented but not yet turned into Cangjie codes.
    """
    text = unicodedata.normalize("NFKD", text.lower())
    step = _STEPS.get(language) if language else None
    return step(text) if step else text


def _segmenter() -> TextStep:
    from spacy_pkuseg import pkuseg

    segmenter = pkuseg()
    return lambda text: " ".join(segmenter.cut(text))


def _to_hiragana() -> TextStep:
    import pykakasi

    convert = pykakasi.kakasi().convert
    return lambda text: unicodedata.normalize("NFKD", "".join(map(_reading, convert(text))))


def _reading(word: Mapping[str, str]) -> str:
    """A word of pykakasi's answer: the reading of one with kanji in it, any other as it was written.

    A space keeps an initial は or へ from being read as a particle of the word before.
    """
    if not any("\u4e00" <= character <= "\u9fff" for character in word["orig"]):
        return word["orig"]
    reading = word["hira"]
    return f" {reading}" if reading.startswith(("は", "へ")) else reading


def _diacritizer() -> TextStep:
    from dicta_onnx import Dicta

    # Upstream passes no model file, which dicta-onnx 1.0 requires: Hebrew then goes on without diacritics, as there.
    add_diacritics: TextStep = Dicta().add_diacritics
    return add_diacritics


def _stresser() -> TextStep:
    from russian_text_stresser.text_stresser import RussianTextStresser

    stress_text: TextStep = RussianTextStresser().stress_text
    return stress_text


def _decompose_hangul(text: str) -> str:
    """Syllables to Jamo. NFKD has done it already, but for the unassigned tail of the block, and upstream strips."""
    return "".join(_jamo(character) if "\uac00" <= character <= "\ud7af" else character for character in text).strip()


def _jamo(syllable: str) -> str:
    initial, rest = divmod(ord(syllable) - 0xAC00, 21 * 28)
    medial, final = divmod(rest, 28)
    return chr(0x1100 + initial) + chr(0x1161 + medial) + (chr(0x11A7 + final) if final else "")


_STEPS: Final[Mapping[str, Callable[[str], str]]] = {
    "zh": OptionalStep(_segmenter, does="Chinese word segmentation", install="pip install spacy-pkuseg"),
    "ja": OptionalStep(_to_hiragana, does="Japanese kanji reading", install="pip install pykakasi"),
    "he": OptionalStep(_diacritizer, does="Hebrew diacritics", install="pip install dicta-onnx"),
    "ko": _decompose_hangul,
    "ru": OptionalStep(
        _stresser,
        does="Russian stress marking",
        install="pip install 'russian-text-stresser @ git+https://github.com/Vuizur/add-stress-to-epub'",
    ),
}
