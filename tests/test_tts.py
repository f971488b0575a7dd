"""The Python API on a real engine: texts, batches, voices, options, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chatterbox_vllm.errors import InvalidAudio, InvalidRequest
from chatterbox_vllm.types import OPTION_RANGES, VoiceFeatures
from tests.audio_support import ffmpeg_file, sound_file, voice_like

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS

TEXT = "Hello there."
TEXTS = [TEXT, "A somewhat longer sentence, with a comma.", "No!", "Twenty-one people were there."]
SAMPLES = 960
"""Of one speech token."""


@pytest.fixture(scope="module")
def anna(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("voices") / "anna.wav"
    path.write_bytes(sound_file(voice_like(2.0, pitch=210.0)))
    return path


@pytest.fixture(scope="module")
def ben() -> bytes:
    return sound_file(voice_like(3.0, pitch=95.0), kind="MP3")


def test_one_text(model: ChatterboxTTS) -> None:
    wav = model.generate(TEXT, max_tokens=30, seed=1)
    assert wav.shape == (1, 30 * SAMPLES)
    assert (wav.dtype, wav.device.type, wav.is_inference()) == (torch.float32, "cpu", False)
    assert torch.isfinite(wav).all()
    assert 0.003 < wav.std() < 1
    assert model.sr == 24_000


def test_a_batch_is_its_texts_one_by_one(model: ChatterboxTTS) -> None:
    batch = model.generate(TEXTS, max_tokens=40, seed=[3, 1, 4, 1])
    alone = [model.generate(text, max_tokens=40, seed=seed) for text, seed in zip(TEXTS, [3, 1, 4, 1], strict=True)]
    assert isinstance(batch, list)
    assert all(torch.equal(a, b) for a, b in zip(batch, alone, strict=True))
    assert len({wav.numpy().tobytes() for wav in batch}) == 4


def test_a_list_of_one_and_of_none(model: ChatterboxTTS) -> None:
    (wav,) = model.generate([TEXT], max_tokens=10, seed=1)
    assert torch.equal(wav, model.generate(TEXT, max_tokens=10, seed=1))
    assert model.generate([]) == []


def test_each_text_has_its_own_voice_language_and_options(model: ChatterboxTTS, anna: Path, ben: bytes) -> None:
    features, _ = model.get_audio_conditionals(ben)
    columns: dict[str, list[Any]] = {
        "audio_prompt_path": [None, anna, ben, features],
        "language_id": [None, "en", "EN", None],
        "exaggeration": [0.5, 1.5, 0.3, 0.3],
        "cfg_weight": [0.5, 0.0, 1.0, 1.0],
        "temperature": [0.8, 0.3, 1.1, 1.1],
        "top_p": [1.0, 0.9, 0.5, 0.5],
        "min_p": [0.05, 0.0, 0.2, 0.2],
        "repetition_penalty": [1.2, 1.0, 2.0, 2.0],
        "seed": [5, 6, 7, 7],
        "max_tokens": [10, 20, 30, 30],
        "diffusion_steps": [10, 2, 5, 5],
    }
    batch = model.generate([TEXT] * 4, **columns)
    for i, wav in enumerate(batch):
        assert torch.equal(wav, model.generate(TEXT, **{name: values[i] for name, values in columns.items()}))
    assert [wav.shape[1] // SAMPLES for wav in batch] == [10, 20, 30, 30]
    assert torch.equal(batch[2], batch[3]), "a recording is its features"


OTHERS = {"exaggeration": 1.5, "cfg_weight": 0.0, "temperature": 0.2, "top_p": 0.1, "min_p": 0.9, "seed": 2}
OTHERS |= {"repetition_penalty": 0.1, "max_tokens": 24, "diffusion_steps": 3}


@pytest.mark.parametrize("name", OPTION_RANGES)
def test_each_option_is_heard(model: ChatterboxTTS, name: str) -> None:
    usual: dict[str, Any] = {"seed": 1, "max_tokens": 25}
    assert not torch.equal(model.generate(TEXT, **usual), model.generate(TEXT, **usual | {name: OTHERS[name]}))


def test_the_defaults_are_upstreams(model: ChatterboxTTS) -> None:
    upstreams = {"repetition_penalty": 1.2, "min_p": 0.05, "top_p": 1.0, "exaggeration": 0.5, "cfg_weight": 0.5}
    usual = {"seed": 1, "max_tokens": 25}
    said = model.generate(TEXT, None, None, temperature=0.8, diffusion_steps=10, **upstreams, **usual)
    assert torch.equal(model.generate(TEXT, **usual), said)


def test_a_seed_is_repeatable_and_no_seed_is_not(model: ChatterboxTTS) -> None:
    again = [model.generate(TEXT, max_tokens=25, seed=2**63 - 1) for _ in range(2)]
    assert torch.equal(*again)
    chance = model.generate([TEXT] * 3, max_tokens=25)
    assert len({wav.numpy().tobytes() for wav in chance}) == 3


@pytest.mark.parametrize("name", ["audio_prompt_path", "language_id", *OPTION_RANGES])
def test_a_list_of_the_wrong_length_is_named(model: ChatterboxTTS, name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name} has 3 values for 2 texts$") as refusal:
        model.generate([TEXT, TEXT], **{name: [None] * 3})
    assert refusal.value.param == name


def test_an_unknown_option_is_named(model: ChatterboxTTS) -> None:
    with pytest.raises(InvalidRequest, match=r"^temprature is no option; there are cfg_weight, diff") as refusal:
        model.generate(TEXT, temprature=0.3)
    assert refusal.value.param == "temprature"


def bad_values() -> list[tuple[str, Any]]:
    integers = {"seed", "max_tokens", "diffusion_steps"}
    wrong: list[tuple[str, Any]] = []
    for name, (low, high) in OPTION_RANGES.items():
        wrong += [(name, value) for value in (low - 1, high + 1, math.nan, math.inf, "1", True, b"1", {})]
        wrong.append((name, 1.5) if name in integers else (name, None))
    return wrong


@pytest.mark.parametrize(("name", "value"), bad_values(), ids=lambda it: repr(it)[:20])
def test_a_bad_value_is_named_with_its_range(model: ChatterboxTTS, name: str, value: Any) -> None:
    for text, given in ((TEXT, value), ([TEXT, TEXT], [OPTION_RANGES[name][1], value])):
        with pytest.raises(InvalidRequest, match=f"^{name} must be .*{OPTION_RANGES[name][1]}") as refusal:
            model.generate(text, **{name: given})
        assert refusal.value.param == name


def test_no_probability_is_left(model: ChatterboxTTS) -> None:
    with pytest.raises(InvalidRequest, match=r"^top_p must be greater than 0 and at most 1$"):
        model.generate(TEXT, top_p=0.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "text is empty"),
        (" \n\u200b", "text is empty"),
        ("NUL\x00", r"NUL\) at position 3"),
        ("\ud800", "surrogate"),
        (None, "text must be a string or a list of strings, not NoneType"),
        (b"bytes", "not bytes"),
        (5, "not int"),
        ({"text": 1}, "not dict"),
        ([TEXT, ""], "text is empty"),
        ([TEXT, 5], "text must be a string, not int"),
    ],
)  # fmt: skip
def test_a_text_that_cannot_be_spoken(model: ChatterboxTTS, text: Any, said: str) -> None:
    for speak in (model.generate, model.speech_tokens):
        with pytest.raises(InvalidRequest, match=said) as refusal:
            speak(text, max_tokens=5)
        assert refusal.value.param == "text"


@pytest.mark.parametrize("language", ["fr", "xx", 5])
def test_another_language(model: ChatterboxTTS, language: Any) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        model.generate(TEXT, language_id=language)
    assert refusal.value.param == "language_id"
    assert model.get_supported_languages() == {"en": "English"}


def recordings() -> dict[str, bytes]:
    sound = voice_like(1.5)
    stereo = np.stack([sound, 0.3 * sound[::-1]], axis=1)
    return {
        "wav": sound_file(sound),
        "wav, 24 bit, 44.1 kHz": sound_file(voice_like(1.5, 44_100), 44_100, subtype="PCM_24"),
        "wav, stereo": sound_file(stereo),
        "wav, 8 kHz": sound_file(voice_like(1.5, 8000), 8000),
        "mp3": sound_file(sound, kind="MP3"),
        "flac": sound_file(sound, kind="FLAC"),
        "m4a": ffmpeg_file(sound, "mp4", "aac"),
    }


@pytest.mark.parametrize("kind", recordings())
def test_a_voice_from_a_recording(model: ChatterboxTTS, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "voice"
    path.write_bytes(recordings()[kind])
    usual = {"seed": 1, "max_tokens": 12}
    wav = model.generate(TEXT, audio_prompt_path=str(path), **usual)
    assert wav.shape == (1, 12 * SAMPLES)
    assert not torch.equal(wav, model.generate(TEXT, **usual))
    path.unlink()
    assert torch.equal(wav, model.generate(TEXT, recordings()[kind], **usual)), "known by its content"


@pytest.mark.parametrize(
    ("recording", "said"),
    [
        (b"", "empty"),
        (sound_file(voice_like(1.0))[:-9000], "truncated"),
        (b"this is a text " * 100, "not"),
        (sound_file(np.zeros(24_000)), "silent"),
        (sound_file(voice_like(0.2)), "at least 0.5 s"),
        (sound_file(voice_like(61.0, 8000), 8000), "longer than 60 s"),
        (Path("nobody.wav"), "there is no file 'nobody.wav'"),
        (Path("/"), "directory"),
    ],
    ids=["0 bytes", "truncated", "text", "silent", "short", "long", "no file", "folder"],
)
def test_a_recording_that_cannot_be_used(model: ChatterboxTTS, recording: bytes | Path, said: str) -> None:
    with pytest.raises(InvalidAudio, match=f"^audio_prompt_path.*{said}") as refusal:
        model.generate([TEXT, TEXT], [None, recording])
    assert refusal.value.param == "audio_prompt_path"


@pytest.mark.parametrize("voice", [5, {}, np.zeros(3)])
def test_a_voice_of_a_wrong_type(model: ChatterboxTTS, voice: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^audio_prompt_path must be a path, a file's bytes or VoiceFeatures"):
        model.generate(TEXT, audio_prompt_path=voice)


def test_conditionals(model: ChatterboxTTS, anna: Path) -> None:
    usual = {"seed": 1, "max_tokens": 20}
    s3gen_ref, cond = model.get_audio_conditionals(anna)
    assert isinstance(s3gen_ref, VoiceFeatures)
    assert torch.equal(model.generate_with_conds(TEXT, s3gen_ref, cond, **usual), model.generate(TEXT, anna, **usual))
    for wrong in ({"s3gen_ref": s3gen_ref, "cond_emb": None}, {"s3gen_ref": {}, "cond_emb": cond}):
        with pytest.raises(InvalidRequest, match="must be what get_audio_conditionals returns, a"):
            model.generate_with_conds(TEXT, **wrong)
    lively = model.update_exaggeration(cond, 1.7)
    said = model.generate_with_conds([TEXT, TEXT], s3gen_ref, lively, **usual)
    assert all(torch.equal(wav, model.generate(TEXT, anna, exaggeration=1.7, **usual)) for wav in said)
    assert cond.exaggeration == 0.5
    with pytest.raises(InvalidRequest, match="exaggeration must be"):
        model.update_exaggeration(cond, math.nan)


def test_conditionals_of_two_voices(model: ChatterboxTTS, anna: Path) -> None:
    """Delivery of the one, timbre of the other."""
    builtin, delivery = model.get_audio_conditionals()
    timbre, _ = model.get_audio_conditionals(anna)
    usual = {"seed": 1, "max_tokens": 20}
    tokens = model.speech_tokens(TEXT, **usual)
    expected = model._engine._watermarker(model.synthesize(tokens, timbre, seed=1)[0].numpy())
    assert torch.equal(model.generate_with_conds(TEXT, timbre, delivery, **usual)[0], torch.from_numpy(expected))
    assert builtin is not timbre


def test_prepared_conditionals(model: ChatterboxTTS, anna: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_default_voice", None)  # and so again afterwards
    usual = {"seed": 1, "max_tokens": 20}
    before = model.generate(TEXT, **usual)
    model.prepare_conditionals(anna, exaggeration=0.7)
    assert torch.equal(model.generate(TEXT, **usual), model.generate(TEXT, anna, **usual))
    assert not torch.equal(model.generate(TEXT, **usual), before)


@pytest.mark.parametrize(
    ("count", "progress", "shown"), [(7, None, False), (8, None, True), (8, False, False), (1, True, True)]
)
def test_progress(
    model: ChatterboxTTS, capsys: pytest.CaptureFixture[str], count: int, progress: bool | None, shown: bool
) -> None:
    model.generate([TEXT] * count, max_tokens=3, progress=progress)
    printed = capsys.readouterr()
    assert printed.out == ""
    if shown:
        assert "Speaking" in printed.err
        assert f"{count}/{count}" in printed.err
    else:
        assert printed.err == ""
