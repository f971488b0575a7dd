"""The multilingual model in 23 languages, on an engine of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import InvalidRequest
from tests.audio_support import sound_file, voice_like
from tests.t3_reference import Request, upstream_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from chatterbox_vllm.tts import ChatterboxMultilingualTTS

HELLO = {
    "ar": "مرحبا بالعالم.",
    "da": "Hej, hvordan går det?",
    "de": "Guten Tag, wie geht es Ihnen?",
    "el": "Γεια σου, κόσμε.",
    "en": "Hello there.",
    "es": "¡Hola! ¿Qué tal?",
    "fi": "Hyvää päivää.",
    "fr": "Bonjour à tous.",
    "he": "שלום עולם.",
    "hi": "नमस्ते दुनिया।",
    "it": "Buongiorno a tutti.",
    "ja": "こんにちは、世界。",
    "ko": "안녕하세요.",
    "ms": "Selamat pagi.",
    "nl": "Goedemorgen allemaal.",
    "no": "God morgen.",
    "pl": "Dzień dobry.",
    "pt": "Bom dia a todos.",
    "ru": "Добрый день.",
    "sv": "God morgon.",
    "sw": "Habari ya asubuhi.",
    "tr": "Günaydın dünya.",
    "zh": "你好，世界。",
}


@pytest.fixture(scope="module")
def polyglot(multilingual_demo: Checkpoint, cache: Path) -> Iterator[ChatterboxMultilingualTTS]:
    from chatterbox_vllm.tts import ChatterboxMultilingualTTS

    with ChatterboxMultilingualTTS.from_local(multilingual_demo.folder, max_model_len=512, max_batch_size=32) as made:
        yield made


def test_all_languages(polyglot: ChatterboxMultilingualTTS) -> None:
    assert list(polyglot.get_supported_languages()) == list(HELLO)
    assert type(polyglot).get_supported_languages()["sw"] == "Swahili"
    wavs = polyglot.generate(list(HELLO.values()), list(HELLO), max_tokens=8, seed=1, progress=False)
    assert [wav.shape for wav in wavs] == [(1, 8 * 960)] * 23
    assert len({wav.numpy().tobytes() for wav in wavs}) == 23


def test_each_text_has_its_language(polyglot: ChatterboxMultilingualTTS) -> None:
    usual = {"max_tokens": 20, "seed": 1}
    batch = polyglot.generate(["Hallo."] * 4, language_id=["de", "nl", "DE", None], **usual)
    alone = [polyglot.generate("Hallo.", language, **usual) for language in ("de", "nl", "de", None)]
    assert all(torch.equal(a, b) for a, b in zip(batch, alone, strict=True))
    assert torch.equal(batch[0], batch[2])
    assert len({wav.numpy().tobytes() for wav in batch}) == 3


def test_every_method_takes_the_language_second(polyglot: ChatterboxMultilingualTTS) -> None:
    usual = {"max_tokens": 20, "seed": 1}
    german = polyglot.speech_tokens("Hallo.", "de", **usual)
    assert torch.equal(german, polyglot.speech_tokens("Hallo.", language_id="de", **usual))
    assert not torch.equal(german, polyglot.speech_tokens("Hallo.", "nl", **usual))
    streamed = torch.cat(list(polyglot.generate_stream("Hallo.", "de", **usual)), 1)
    assert streamed.shape == polyglot.generate("Hallo.", "de", **usual).shape


def test_conditionals(polyglot: ChatterboxMultilingualTTS) -> None:
    recording = sound_file(voice_like(1.0))
    usual = {"max_tokens": 15, "seed": 1, "language_id": "fr"}
    spoken = polyglot.generate_with_conds("Bonjour.", *polyglot.get_audio_conditionals(recording), **usual)
    assert torch.equal(spoken, polyglot.generate("Bonjour.", audio_prompt_path=recording, **usual))


def test_greedy_tokens_are_upstreams(polyglot: ChatterboxMultilingualTTS, multilingual_demo: Checkpoint) -> None:
    """Upstream picks no id that is masked here for these prompts."""
    languages, weights = ["fr", "ko", "ar", None], [0.5, 0.0, 1.0, 0.7]
    texts = [HELLO[language or "en"] for language in languages]
    voice, _ = polyglot.get_audio_conditionals()
    ids = [polyglot._engine._frontend.one(text, language) for text, language in zip(texts, languages, strict=True)]
    asked = [Request(each, voice, weight, 0.5) for each, weight in zip(ids, weights, strict=True)]
    theirs = upstream_tokens(multilingual_demo.t3, asked, 50)
    assert max(map(max, theirs)) < 6561
    ours = polyglot.speech_tokens(texts, languages, temperature=0, cfg_weight=weights, max_tokens=50)
    assert [each.tolist() for each in ours] == theirs


@pytest.mark.parametrize("language", ["tlh", "", "deutsch", 5])
def test_a_language_that_nobody_speaks(polyglot: ChatterboxMultilingualTTS, language: object) -> None:
    with pytest.raises(InvalidRequest, match=r"^language_id must be one of ar, da, de, .*, zh, not ") as refusal:
        polyglot.generate(["Hallo.", "Hallo."], ["de", language])
    assert refusal.value.param == "language_id"
