from __future__ import annotations

import pytest

from chatterbox_vllm.text.normalise import punc_norm
from tests.text_support import random_texts, upstream_punc_norm

CASES = [
    "",
    " ",
    "hello",
    " hello",
    "éa",
    "ßtrasse",
    "ǆ",
    "ŉx",
    "1. one",
    "Wait... what…  is : this ; thing - here — or – there ,now",
    "“Quoted” ‘text’",
    "ends in dash-",
    "ends in comma,",
    "你好。",
    "你好，",
    "こんにちは、",
    "本当？",
    "すごい！",
    "tab\tand\nnewline\r\n",
    "a ... b",
    "....",
    " - ",
    "trailing : ",
]


@pytest.mark.parametrize("multilingual", [False, True])
def test_equals_upstream(multilingual: bool) -> None:
    upstream = upstream_punc_norm(multilingual)
    for text in [*CASES, *random_texts(3000, seed=1)]:
        assert punc_norm(text, multilingual=multilingual) == upstream(text), repr(text)


def test_the_two_versions_differ_on_cjk_endings() -> None:
    assert punc_norm("你好。", multilingual=True) == "你好。"
    assert punc_norm("你好。", multilingual=False) == "你好。."
