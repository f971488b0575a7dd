from __future__ import annotations

import time
from pathlib import Path

import pytest

from chatterbox_vllm.errors import InvalidRequest, TooLarge
from chatterbox_vllm.text.frontend import TextFrontend
from chatterbox_vllm.text.tokenise import EnglishTokenizer, MultilingualTokenizer
from chatterbox_vllm.types import MAX_TEXT_TOKENS
from tests.text_support import upstream_punc_norm, upstream_tokenizers, write_cangjie, write_tokenizer


@pytest.fixture
def english_file(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json", multilingual=False)


@pytest.fixture
def english(english_file: Path) -> TextFrontend:
    return TextFrontend(EnglishTokenizer(english_file), multilingual=False)


@pytest.fixture
def multilingual(tmp_path: Path) -> TextFrontend:
    file = write_tokenizer(tmp_path / "grapheme_mtl_merged_expanded_v1.json", multilingual=True)
    table = write_cangjie(tmp_path / "Cangjie5_TC.json")
    return TextFrontend(MultilingualTokenizer(file, table), multilingual=True)


def test_a_short_text_is_one_piece_with_upstreams_ids(english: TextFrontend, english_file: Path) -> None:
    text = "hello   there: 3.14 — “really” ... yes"
    expected = upstream_tokenizers().EnTokenizer(str(english_file)).encode(upstream_punc_norm(False)(text))
    assert english.prepare(text) == [expected]
    assert english.one(text) == expected


@pytest.mark.parametrize("text", [" hello there", "\n\thello there.  ", "hello there ", "\u3000...hello"])
def test_white_space_around_a_short_text_is_upstreams_business(
    english: TextFrontend, english_file: Path, text: str
) -> None:
    expected = upstream_tokenizers().EnTokenizer(str(english_file)).encode(upstream_punc_norm(False)(text))
    assert english.prepare(text) == [english.one(text)] == [expected]


def test_a_long_text_is_its_sentences(english: TextFrontend) -> None:
    first, second = "The first sentence is here.", "Is the second one there?"
    assert english.prepare(f"{first} {second}", max_characters=30) == [english.one(first), english.one(second)]
    assert len(english.prepare(f"{first} {second}", max_characters=60)) == 1


def test_pieces_over_the_token_limit_are_cut_further(multilingual: TextFrontend) -> None:
    ligature = "\ufdfa"  # one character, 18 after NFKD
    pieces = multilingual.prepare(ligature * 300, "ar")
    assert len(pieces) == 4
    assert all(len(ids) <= MAX_TEXT_TOKENS for ids in pieces)
    with pytest.raises(TooLarge) as caught:
        multilingual.prepare(ligature, "ar", max_tokens=10, param="input")
    assert caught.value.param == "input"


def test_one_piece_has_a_limit(english: TextFrontend) -> None:
    assert len(english.one("x" * (MAX_TEXT_TOKENS - 1))) == MAX_TEXT_TOKENS
    with pytest.raises(TooLarge, match="2048") as caught:
        english.one("x" * MAX_TEXT_TOKENS, param="input")
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        (" \t\r\n\u3000\u00a0", "empty"),
        ("\u200b\ufeff \u202e", "empty"),
        ("a\x00b", r"U\+0000 \(NUL\) at position 1"),
        ("ab\x1b[0m", r"U\+001B at position 2"),
        ("\x7f", r"U\+007F at position 0"),
        ("ab\x85", r"U\+0085 at position 2"),
        ("a\x0bb", r"U\+000B"),
        ("a\ud83d", r"surrogate pair U\+D83D at position 1"),
        ("\ude00", "surrogate"),
        (None, "string, not NoneType"),
        (b"bytes", "string, not bytes"),
        (["a"], "string, not list"),
    ],
)
def test_unusable_text_is_refused_by_name(english: TextFrontend, text: object, says: str) -> None:
    for method in (english.prepare, english.one):
        with pytest.raises(InvalidRequest, match=says) as caught:
            method(text, param="input")  # type: ignore[operator]
        assert caught.value.param == "input"


def test_line_breaks_and_tabs_are_white_space(english: TextFrontend) -> None:
    assert english.prepare("one\ttwo\r\nthree") == english.prepare("one two three")


def test_marks_alone_are_spoken_but_not_beside_words(english: TextFrontend) -> None:
    assert english.prepare("...") == [english.one("...")]
    assert english.prepare("word " + "!" * 700, max_characters=100) == [english.one("word " + "!" * 84)]


def test_an_english_model_takes_english_only(english: TextFrontend) -> None:
    assert english.prepare("text", "EN") == english.prepare("text", None) == english.prepare("text")
    for language in ("de", "xx"):
        with pytest.raises(InvalidRequest) as caught:
            english.prepare("text", language)
        assert caught.value.param == "language_id"


def test_a_multilingual_model_takes_all_languages(multilingual: TextFrontend) -> None:
    [german], [none] = multilingual.prepare("Guten Tag", "DE"), multilingual.prepare("Guten Tag")
    assert german[1:] == none
    assert multilingual.prepare("guten tag.", "de") == [german]
    with pytest.raises(InvalidRequest) as caught:
        multilingual.one("text", "xx")
    assert caught.value.param == "language_id"


def test_a_chinese_ending_is_kept_by_the_multilingual_model_only(
    english: TextFrontend, multilingual: TextFrontend
) -> None:
    assert english.one("a。") == english.one("a。.")
    assert multilingual.one("a。") != multilingual.one("a。.")


def test_a_megabyte_is_linear(english: TextFrontend) -> None:
    def seconds(text: str) -> float:
        started = time.process_time()
        pieces = english.prepare(text)
        assert len(pieces) >= len(text) // 300
        return time.process_time() - started

    for unit in ("The quick brown fox. ", "x"):
        assert seconds(unit * (400_000 // len(unit))) < 40 * max(seconds(unit * (40_000 // len(unit))), 0.01)
