from __future__ import annotations

import logging
import sys
import threading
import time
import unicodedata
from collections.abc import Callable

import pytest

from chatterbox_vllm.errors import InvalidRequest
from chatterbox_vllm.text import languages
from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES, check_language, preprocess
from chatterbox_vllm.text.optional import OptionalStep
from tests.text_support import fake_module, random_texts, upstream_languages, upstream_tokenizers

PACKAGES = {"zh": "spacy_pkuseg", "ja": "pykakasi", "he": "dicta_onnx", "ru": "russian_text_stresser"}
INSTALLS = {"zh": "spacy-pkuseg", "ja": "pykakasi", "he": "dicta-onnx", "ru": "russian-text-stresser"}


@pytest.fixture(autouse=True)
def untouched_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test finds the optional packages not yet looked for."""
    for language, step in languages._STEPS.items():
        if isinstance(step, OptionalStep):
            fresh = OptionalStep(step._load, does=step._does, install=step._install)
            monkeypatch.setitem(languages._STEPS, language, fresh)


def hide(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)


def test_the_languages_are_upstreams() -> None:
    assert dict(SUPPORTED_LANGUAGES) == upstream_languages()
    assert len(SUPPORTED_LANGUAGES) == 23


@pytest.mark.parametrize("code", ["zh", "ZH", "No"])
def test_codes_are_accepted_in_any_case(code: str) -> None:
    assert check_language(code) == code.lower()


@pytest.mark.parametrize("code", ["", "xx", "en-US", "English", " en", None, 3, ["en"]])
def test_other_codes_are_refused_by_name(code: object) -> None:
    with pytest.raises(InvalidRequest, match="ar, da, de") as caught:
        check_language(code, param="language")  # type: ignore[arg-type]
    assert caught.value.param == "language"


@pytest.mark.parametrize("language", PACKAGES)
def test_an_absent_package_is_one_warning_with_its_install_command(
    language: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide(monkeypatch, PACKAGES[language])
    text = "今日は Привет שלום"
    assert preprocess(text, language) == preprocess(text, language) == unicodedata.normalize("NFKD", text.lower())
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "pip install" in caplog.text
    assert INSTALLS[language] in caplog.text


def test_no_package_is_looked_for_until_its_language_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hide(monkeypatch, *PACKAGES.values())
    for language in [None, *(code for code in SUPPORTED_LANGUAGES if code not in PACKAGES)]:
        preprocess("text", language)
    assert not caplog.records


@pytest.mark.parametrize("failure", [OSError("no network"), RuntimeError("bad hash"), KeyError("Content-Length")])
def test_a_failed_download_leaves_chinese_unsegmented(
    failure: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def pkuseg() -> None:
        attempts.append(1)
        raise failure

    fake_module(monkeypatch, "spacy_pkuseg", pkuseg=pkuseg)
    assert [preprocess("今天", "zh") for _ in range(3)] == ["今天"] * 3
    assert len(attempts) == 1
    assert len(caplog.records) == 1
    assert type(failure).__name__ in caplog.text


def test_hebrew_without_a_model_file_is_spoken_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Dicta:
        def __init__(self, model_path: str) -> None: ...

    fake_module(monkeypatch, "dicta_onnx", Dicta=Dicta)
    assert preprocess("שלום", "he") == "שלום"
    assert "model_path" in caplog.text


class Stresser:
    """Marks every letter о, and fails on a "!"."""

    def stress_text(self, text: str) -> str:
        if "!" in text:
            raise ValueError("exclamation")
        return text.replace("о", "о\u0301")


class Dicta:
    def add_diacritics(self, text: str) -> str:
        return text.replace("ש", "ש\u05c1")


def test_installed_packages_give_what_upstream_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "russian_text_stresser.text_stresser", RussianTextStresser=Stresser)
    fake_module(monkeypatch, "dicta_onnx", Dicta=Dicta)
    upstream = upstream_tokenizers()
    for text in ["Молоко, йод", "Стой!", "Молоко", "שלום", *random_texts(300, seed=4)]:
        folded = unicodedata.normalize("NFKD", text.lower())
        assert preprocess(text, "ru") == upstream.add_russian_stress(folded)
        assert preprocess(text, "he") == upstream.add_hebrew_diacritics(folded)
    assert preprocess("молоко", "ru") != "молоко"


def test_korean_equals_upstream() -> None:
    upstream = upstream_tokenizers()
    for text in [" 안녕하세요, 세계! ", "\ud7a3", "\ud7a4\ud7af", "ᄒ", "", *random_texts(500, seed=5)]:
        folded = unicodedata.normalize("NFKD", text.lower())
        assert preprocess(text, "ko") == upstream.korean_normalize(folded), repr(text)


WORDS = [
    ("今日は", "こんにちは"),
    ("歯", "は"),
    ("部屋", "へや"),
    ("カタカナ", "かたかな"),
    ("です", "です"),
    ("x", "x"),
    ("々", ""),
]


def kakasi_of(words: list[tuple[str, str]]) -> Callable[[], object]:
    class Kakasi:
        def convert(self, text: str) -> list[dict[str, str]]:
            return [{"orig": word, "hira": reading} for word, reading in words]

    return Kakasi


def test_kanji_are_read_as_upstream_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_module(monkeypatch, "pykakasi", kakasi=kakasi_of(WORDS))
    assert preprocess("any", "ja") == upstream_tokenizers().hiragana_normalize("any")
    assert preprocess("any", "ja") == "こんにちは は へやカタカナて\u3099すx々"


def test_japanese_equals_upstream_with_the_real_package() -> None:
    pytest.importorskip("pykakasi")
    upstream = upstream_tokenizers()
    texts = ["今日は良い天気です。東京へ行く。", "歯が痛い、ガギグゲゴ", "部屋と歯ブラシ 2024年", "ﾊﾟｿｺﾝ", ""]
    for text in [*texts, *random_texts(300, seed=6)]:
        folded = unicodedata.normalize("NFKD", text.lower())
        assert preprocess(text, "ja") == upstream.hiragana_normalize(folded), repr(text)


def test_a_package_is_loaded_once_and_called_by_one_thread_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    inside: list[int] = []
    most: list[int] = []

    class Slow:
        def __init__(self) -> None:
            loads.append(1)
            time.sleep(0.02)

        def cut(self, text: str) -> list[str]:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()
            return list(text)

    fake_module(monkeypatch, "spacy_pkuseg", pkuseg=Slow)
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(preprocess("今天", "zh"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["今 天"] * 8
    assert len(loads) == 1
    assert max(most) == 1
