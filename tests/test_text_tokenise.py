from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType

import pytest

from chatterbox_vllm.checkpoint import Checkpoint, Variant
from chatterbox_vllm.errors import CheckpointError, InvalidRequest
from chatterbox_vllm.text import languages
from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES
from chatterbox_vllm.text.tokenise import EnglishTokenizer, MultilingualTokenizer, load_tokenizer
from tests.text_support import (
    CANGJIE,
    fake_module,
    random_texts,
    upstream_tokenizers,
    write_cangjie,
    write_tokenizer,
)

WITHOUT_PACKAGES = [code for code in SUPPORTED_LANGUAGES if code not in {"zh", "ja", "he", "ru"}]
TYPED = ["[STOP]", "[START]", "[SPACE]", "[UNK]", "[sigh]", "[PLACEHOLDER55]"]


@pytest.fixture
def english(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "tokenizer.json", multilingual=False)


@pytest.fixture
def multilingual(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "grapheme_mtl_merged_expanded_v1.json", multilingual=True)


@pytest.fixture
def cangjie(tmp_path: Path) -> Path:
    return write_cangjie(tmp_path / "Cangjie5_TC.json")


@pytest.fixture
def upstream(monkeypatch: pytest.MonkeyPatch, cangjie: Path) -> ModuleType:
    """Upstream's tokenizers, whose Cangjie table is ours and whose segmenter puts three characters to a word."""
    fake_module(monkeypatch, "spacy_pkuseg", pkuseg=Segmenter)
    monkeypatch.setitem(languages._STEPS, "zh", fresh_step("zh"))
    module = upstream_tokenizers()
    monkeypatch.setattr(module, "hf_hub_download", lambda **_: str(cangjie))
    return module


class Segmenter:
    def cut(self, text: str) -> list[str]:
        return [text[start : start + 3] for start in range(0, len(text), 3)]


def fresh_step(language: str) -> languages.OptionalStep:
    """The language's step as it is before its package was looked for."""
    known = languages._STEPS[language]
    assert isinstance(known, languages.OptionalStep)
    return languages.OptionalStep(known._load, does=known._does, install=known._install)


def test_english_ids_equal_upstreams(english: Path) -> None:
    mine, theirs = EnglishTokenizer(english), upstream_tokenizers().EnTokenizer(str(english))
    for text in ["", " ", "  a  ", "The thing, the other thing.", *random_texts(2000, seed=2, brackets=False)]:
        assert mine.encode(text) == theirs.encode(text), repr(text)


def test_multilingual_ids_equal_upstreams(multilingual: Path, cangjie: Path, upstream: ModuleType) -> None:
    mine, theirs = MultilingualTokenizer(multilingual, cangjie), upstream.MTLTokenizer(str(multilingual))
    for number, text in enumerate(["", " ", "今天天气好", *random_texts(1500, seed=3, brackets=False)]):
        for language in ("zh", "ko", WITHOUT_PACKAGES[number % len(WITHOUT_PACKAGES)], None):
            assert mine.encode(text, language) == theirs.encode(text, language_id=language), (language, text)


def test_brackets_that_make_no_token_equal_upstreams(english: Path, multilingual: Path, cangjie: Path) -> None:
    texts = ["[", "]", "[[", "a [b] c", "[Stop]", "[ STOP ]", "[laugh]", "array[0]"]
    theirs = upstream_tokenizers().EnTokenizer(str(english))
    assert [EnglishTokenizer(english).encode(text) for text in texts] == [theirs.encode(text) for text in texts]


@pytest.mark.parametrize("typed", [*TYPED, "[de]"])
def test_typed_english_control_tokens_are_characters(english: Path, typed: str) -> None:
    vocabulary = json.loads(english.read_text(encoding="utf-8"))["model"]["vocab"]
    theirs = upstream_tokenizers().EnTokenizer(str(english))
    ids = EnglishTokenizer(english).encode(f"say{typed}now {typed}")
    assert vocabulary[typed] in theirs.encode(f"say{typed}now")  # so there is something to escape
    assert ids == [*spelt(vocabulary, f"say{typed}now"), vocabulary["[SPACE]"], *spelt(vocabulary, typed)]


@pytest.mark.parametrize("typed", [*TYPED, "[de]", "[he]", "[cj_a]", "[cj_.]", "[PAD]", "［de］", "[DE]"])
@pytest.mark.parametrize("language", ["en", "zh", None])
def test_typed_multilingual_control_tokens_are_characters(
    multilingual: Path, cangjie: Path, upstream: ModuleType, typed: str, language: str | None
) -> None:
    vocabulary = json.loads(multilingual.read_text(encoding="utf-8"))["model"]["vocab"]
    tokenizer = MultilingualTokenizer(multilingual, cangjie)
    controls = {id_ for token, id_ in vocabulary.items() if token.startswith("[") and token.endswith("]")}
    ours = [vocabulary[f"[{language}]"]] if language else []
    ids = tokenizer.encode(f"x{typed}y", language)
    assert ids[: len(ours)] == ours
    space = vocabulary["[SPACE]"]  # the segmenter's
    assert not {id_ for id_ in ids[len(ours) :] if id_ != space or language != "zh"} & (
        controls - {vocabulary["[UNK]"]}
    )


def test_our_own_control_tokens_still_work(multilingual: Path, cangjie: Path, upstream: ModuleType) -> None:
    vocabulary = json.loads(multilingual.read_text(encoding="utf-8"))["model"]["vocab"]
    ids = MultilingualTokenizer(multilingual, cangjie).encode("天禿 [cj_m]", "zh")
    first, second = (["[cj_m]", "[cj_k]", "[cj_.]"], ["[cj_m]", "[cj_k]", "[cj_1]", "[cj_.]"])
    assert ids[:9] == [vocabulary[token] for token in ["[zh]", *first, *second, "[SPACE]"]]
    assert vocabulary["[cj_m]"] not in ids[9:]


def test_a_language_the_tokenizer_lacks_is_refused(english: Path) -> None:
    with pytest.raises(InvalidRequest, match="'sw'") as caught:
        MultilingualTokenizer(english).encode("Habari", "sw")
    assert caught.value.param == "language_id"


def test_chinese_without_a_table_warns_once_and_goes_on(
    multilingual: Path, upstream: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = MultilingualTokenizer(multilingual)
    assert tokenizer.encode("今天", "zh") == tokenizer.encode("今天", "zh")
    assert [record.levelno for record in caplog.records if "Cangjie" in record.message] == [logging.WARNING]


def test_the_variant_decides_the_tokenizer(
    english: Path, multilingual: Path, cangjie: Path, upstream: ModuleType
) -> None:
    def checkpoint(variant: Variant, tokenizer: Path) -> Checkpoint:
        none = Path("none")
        return Checkpoint(none, variant, none, none, none, tokenizer, conds=None, cangjie=cangjie, is_demo=False)

    assert isinstance(load_tokenizer(checkpoint(Variant.ENGLISH, english)), EnglishTokenizer)
    both = load_tokenizer(checkpoint(Variant.MULTILINGUAL_V3, multilingual))
    assert both.encode("天", "zh") == upstream.MTLTokenizer(str(multilingual)).encode("天", language_id="zh")


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        EnglishTokenizer(path)


@pytest.mark.parametrize("token", ["[START]", "[STOP]", "[SPACE]"])
def test_a_tokenizer_without_a_token_we_need_is_refused(english: Path, token: str) -> None:
    description = json.loads(english.read_text(encoding="utf-8"))
    description["added_tokens"] = [added for added in description["added_tokens"] if added["content"] != token]
    english.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        EnglishTokenizer(english)
    assert token in str(caught.value)


@pytest.mark.parametrize("entries", [["天"], [1], ["天\tmk", None]])
def test_a_broken_cangjie_table_is_named(multilingual: Path, tmp_path: Path, entries: list[object]) -> None:
    path = tmp_path / "Cangjie5_TC.json"
    path.write_text(json.dumps([*CANGJIE, *entries]), encoding="utf-8")
    with pytest.raises(CheckpointError, match="Cangjie5_TC"):
        MultilingualTokenizer(multilingual, path)


def spelt(vocabulary: dict[str, int], text: str) -> list[int]:
    """Ids of a text in which no merge applies, character by character."""
    return [vocabulary[character] for character in text]
