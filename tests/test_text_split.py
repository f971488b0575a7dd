from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.text.split import is_speakable, split

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
FLAG = "\U0001f1e9\U0001f1ea"


def visible(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize(
    "text",
    [
        "It is late.|Is it?|It is!|Well...|I see…",
        "“Is it?”|(It is.)|'Yes.'|He said \"no.\"|*Really!*",
        "Costs 3.14 or 1,000 at 10:30.|Visit example.com now.|Version 2.0.1 is out.",
        "Dr. Smith met Mr. J. R. Jones, e.g. at 5 p.m. today.|They talked.",
        "“What?” he asked.|“Nothing...” she said.|Silence.",
        "Am 3. Mai war z. B. Herr Dr. Kurz da.|Ja, bzw. nein.",
        "¿Qué tal?|¡Muy bien!|La Sra. García vino.",
        "« Bonjour. »|Il dit : « Quoi ? »|Oui !",
        "今天天气很好。|你好吗？|“真的！”|他说：好｡",
        "你好吗?|我很好!|再见……|好",
        "今日は良い天気です。|「本当？」|はい！",
        "مرحبا كيف حالك؟|أنا بخير، شكرا.|مع السلامة۔",
        "नमस्ते।|आप कैसे हैं?|मैं ठीक हूँ॥",
        "Τι κάνεις\u037e|Καλά.",
        "Привет!|Как дела, т.е. что нового?|Хорошо.",
        "שלום.|מה שלומך?|טוב!",
        "안녕하세요.|네.|잘 지내세요?|네!",
        "A title\n\n|First paragraph without an end\n \n|Second",
    ],
)
def test_sentences_of_every_script(text: str) -> None:
    expected = [part.strip() for part in text.split("|")]
    joiner = "" if any("\u3000" <= character <= "\u9fff" for character in text) else " "
    for first, second in pairwise(expected):
        both = first + ("\n\n" if "\n" in text else joiner) + second
        assert split(both, max_characters=len(both) - 1) == [first, second]


def test_sentences_are_packed_together() -> None:
    text = "One two. Three four. Five six. Seven."
    assert split(text, max_characters=20) == ["One two. Three four.", "Five six. Seven."]
    assert split(text, max_characters=len(text)) == [text]
    assert split(f"  {text}\n") == [text]


def test_a_long_sentence_is_cut_at_clauses_then_words() -> None:
    assert split("Short. First the one, then the other; at last — the third.", max_characters=24) == [
        "Short.",
        "First the one,",
        "then the other;",
        "at last — the third.",
    ]
    assert split("one two three four five", max_characters=9) == ["one two", "three", "four five"]
    assert split("今天天气很好，我们去公园玩，好吗", max_characters=8) == ["今天天气很好，", "我们去公园玩，", "好吗"]


def test_numbers_are_not_cut_where_words_can_be() -> None:
    pieces = split("about 3.14 and 1,000,000 and 10:30 or so it goes on", max_characters=12)
    assert {"3.14", "1,000,000", "10:30"} <= set(" ".join(pieces).split())


def test_what_has_no_words_is_cut_into_nearly_equal_parts() -> None:
    assert [len(piece) for piece in split("a" * 301)] == [151, 150]
    assert [len(piece) for piece in split("b" * 900)] == [300, 300, 300]


@pytest.mark.parametrize(
    "cluster", ["e\u0301", "\u1112\u1161\u11ab", FAMILY, FLAG, "\U0001f44d\U0001f3fd", "क्ष", "ハ\uff9e"]
)
@pytest.mark.parametrize("limit", [7, 8, 9, 10])
def test_a_written_character_is_never_cut(cluster: str, limit: int) -> None:
    for piece in split("a" + cluster * 50, max_characters=limit):
        assert visible(piece).removeprefix("a").replace(cluster, "") == ""


@given(st.text(max_size=400) | st.text(alphabet="ab .,!?…—。、\n\u0301", max_size=400), st.integers(1, 60))
@settings(max_examples=500, deadline=None)
def test_nothing_is_lost_and_the_limit_is_kept(text: str, limit: int) -> None:
    pieces = split(text, max_characters=limit)
    assert visible("".join(pieces)) == visible(text)
    assert all(0 < len(piece) <= limit and piece == piece.strip() for piece in pieces)


def test_no_piece_is_punctuation_alone() -> None:
    rng = random.Random(7)
    marks = [".", " !", " ?!", " ...", " — ", ", ", "。", " »", "« ", "\n\n", "\n", " ", " - ", '"']
    for _ in range(2000):
        words = rng.choices(["word", "a longer word", "I"], k=rng.randrange(1, 15))
        text = "".join(word + "".join(rng.choices(marks, k=rng.randrange(4))) for word in ["« ", *words])
        assert all(map(is_speakable, split(text, max_characters=40))), text


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_blank_text_is_no_piece(text: str) -> None:
    assert split(text) == []


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least 1"):
        split("text", max_characters=0)


@pytest.mark.parametrize(
    "unit", ["a", ".", "! ", ",*", "a, ", "\u0301", FLAG, "...,", '."', "- ", "。", "a.b", ",\n", "—"]
)
def test_time_is_linear(unit: str) -> None:
    def seconds(size: int) -> float:
        text, times = unit * (size // len(unit)), []
        for _ in range(2):  # into one may fall a collection of all that other tests have left
            started = time.process_time()
            split(text)
            times.append(time.process_time() - started)
        return min(times)

    assert seconds(400_000) < 40 * max(seconds(40_000), 0.01)
