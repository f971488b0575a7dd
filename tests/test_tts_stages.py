"""Each half of the Python API alone, against upstream's, and the two together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from chatterbox_vllm.audio.watermark import Watermarker
from chatterbox_vllm.checkpoint import Checkpoint, load_strict, load_tensors
from chatterbox_vllm.demo_checkpoint import networks
from chatterbox_vllm.errors import EngineDead, InvalidRequest, TooLarge
from chatterbox_vllm.text.split import split
from chatterbox_vllm.vocoder.stage import Vocoder
from tests import vocoder_support
from tests.audio_support import sound_file, voice_like
from tests.fake_engine import wait_for
from tests.t3_reference import Request, upstream_tokens

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS

TEXTS = ["Hello there.", "A somewhat longer sentence, with a comma in it; and more.", "No!", "Twenty-one people came."]
LONG = " ".join(f"This is sentence number {i}, and it goes on for a while." for i in range(12))
COUNT = 50


@pytest.fixture(scope="module")
def recording() -> bytes:
    return sound_file(voice_like(2.0, pitch=180.0))


@pytest.fixture(scope="module")
def tokens(model: ChatterboxTTS) -> Tensor:
    return model.speech_tokens(TEXTS[0], seed=1, max_tokens=40)


def test_tokens_are_sounds(model: ChatterboxTTS) -> None:
    one = model.speech_tokens(TEXTS[0], seed=1, max_tokens=40)
    assert (one.shape, one.dtype, one.device.type) == ((40,), torch.int64, "cpu")
    assert 0 <= one.min() <= one.max() < 6561
    several = model.speech_tokens(TEXTS, seed=[1, 2, 3, 4], max_tokens=[40, 30, 20, 10])
    assert torch.equal(several[0], one)
    assert [len(each) for each in several] == [40, 30, 20, 10]


def test_tokens_end_before_the_stop_token(model: ChatterboxTTS) -> None:
    """The demo checkpoint ends an utterance after some 75 tokens or more."""
    several = model.speech_tokens(TEXTS, seed=[1, 2, 3, 4], max_tokens=600)
    assert all(40 < len(each) < 600 for each in several)
    assert all(each.max() < 6561 for each in several)


def test_what_is_under_way_at_the_end_is_broken_off(model: ChatterboxTTS) -> None:
    """And told so. The engine goes on: this is what ``shutdown`` does before it ends vLLM's processes."""
    told: list[BaseException] = []

    def speak() -> None:
        try:
            model.speech_tokens(LONG, seed=1, max_tokens=900)
        except EngineDead as error:
            told.append(error)

    speaking = threading.Thread(target=speak)
    speaking.start()
    wait_for(lambda: bool(model._engine._t3._llm.output_processor.has_unfinished_requests()))
    model._loop.run(model._engine._t3.abort())
    speaking.join(10)
    assert [str(error) for error in told] == ["the T3 engine broke off (abort); it is shutting down or has failed"]
    assert len(model.speech_tokens(TEXTS[0], seed=1, max_tokens=40)) == 40


def test_greedy_tokens_are_upstreams(model: ChatterboxTTS, demo: Checkpoint, recording: bytes) -> None:
    """With the mask of ids that are no sound: on these prompts upstream picks none of them, which is checked here."""
    voices = [model.get_audio_conditionals(source)[0] for source in (None, recording)] * 2
    weights, exaggerations = [0.5, 0.0, 1.0, 0.3], [0.5, 1.2, 0.25, 0.5]
    asked = [
        Request(model._engine._frontend.one(text), voice, weight, exaggeration)
        for text, voice, weight, exaggeration in zip(TEXTS, voices, weights, exaggerations, strict=True)
    ]
    theirs = upstream_tokens(demo.t3, asked, COUNT)
    assert max(map(max, theirs)) < 6561
    ours = model.speech_tokens(
        TEXTS, voices, temperature=0, cfg_weight=weights, exaggeration=exaggerations, max_tokens=COUNT
    )
    assert [each.tolist() for each in ours] == theirs


def test_a_text_that_is_too_long_for_one_utterance(model: ChatterboxTTS) -> None:
    for text, said in (
        (LONG * 4, "max_model_len=1024; shorten it to 246 tokens"),
        ("word " * 3000, "reads 2048 at once"),
    ):
        with pytest.raises(TooLarge, match=said) as refusal:
            model.speech_tokens(text)
        assert refusal.value.param == "text"


def test_sound_is_the_vocoders(model: ChatterboxTTS, demo: Checkpoint, tokens: Tensor) -> None:
    builtin, _ = model.get_audio_conditionals()
    vocoder = Vocoder.from_checkpoint(demo.s3gen)
    wav = model.synthesize(tokens, seed=3)
    assert (wav.shape, wav.dtype) == ((1, 40 * 960), torch.float32)
    assert torch.equal(wav[0], vocoder.synthesize(tokens, builtin, seed=3))
    assert torch.equal(wav, model.synthesize(tokens[None].to(torch.int32), builtin, seed=3))
    quick = model.synthesize(tokens, seed=3, diffusion_steps=2)
    assert torch.equal(quick[0], vocoder.synthesize(tokens, builtin, seed=3, diffusion_steps=2))
    assert model.synthesize(tokens[:0]).shape == (1, 0)


def test_sound_is_upstreams(
    model: ChatterboxTTS, demo: Checkpoint, tokens: Tensor, recording: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upstream's S3Gen with the checkpoint's weights, given our noise. The served vocoder's phase is a little off."""
    exact = Vocoder.from_checkpoint(demo.s3gen, exact=True)
    s3gen = networks.s3gen("tiny")
    load_strict(s3gen, load_tensors(demo.s3gen), file=demo.s3gen)
    monkeypatch.setattr(vocoder_support, "upstream", lambda: s3gen)
    for source, seed in ((None, 0), (recording, 7)):
        voice, _ = model.get_audio_conditionals(source)
        _, theirs = vocoder_support.upstream_whole(tokens, voice, seed=seed)
        assert theirs.std() > 0.003
        assert (exact.synthesize(tokens, voice, seed=seed) - theirs).abs().max() <= 1e-4
        assert (model.synthesize(tokens, voice, seed=seed)[0] - theirs).abs().mean() <= 3e-5


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tokens": [1, 2]}, "tokens"),
        ({"tokens": torch.tensor([1.0, 2.0])}, "tokens"),
        ({"tokens": torch.tensor([True])}, "tokens"),
        ({"tokens": torch.tensor(5)}, "tokens"),
        ({"tokens": torch.ones(2, 3, dtype=torch.int64)}, "tokens"),
        ({"tokens": torch.tensor([1, 6561])}, "tokens"),
        ({"tokens": torch.tensor([-1])}, "tokens"),
        ({"voice": 5}, "voice"),
        ({"voice": b"no sound"}, "voice"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"diffusion_steps": 0}, "diffusion_steps"),
    ],
)
def test_what_has_no_sound(model: ChatterboxTTS, change: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match=param) as refusal:
        model.synthesize(**{"tokens": torch.tensor([1, 2])} | change)
    assert refusal.value.param == param


def test_speech_is_tokens_then_sound_then_watermark(model: ChatterboxTTS, recording: bytes) -> None:
    mark = Watermarker()
    for text, seed in ((TEXTS[0], 1), (TEXTS[1], 2)):
        tokens = model.speech_tokens(text, recording, seed=seed, max_tokens=30, cfg_weight=0.8)
        sound = model.synthesize(tokens, recording, seed=seed, diffusion_steps=4)[0].numpy()
        spoken = model.generate(text, recording, seed=seed, max_tokens=30, cfg_weight=0.8, diffusion_steps=4)
        np.testing.assert_array_equal(spoken[0].numpy(), mark(sound))


def test_speech_is_marked(model: ChatterboxTTS, tokens: Tensor) -> None:
    mark = Watermarker()
    assert mark.confidence(model.generate(TEXTS[0], seed=1, max_tokens=50)[0].numpy()) > 0.9
    assert mark.confidence(model.synthesize(tokens, seed=1)[0].numpy()) < 0.5


def test_a_long_text_is_spoken_in_parts_and_joined(model: ChatterboxTTS) -> None:
    """Part i has the seed's i-th successor."""
    parts = split(LONG, max_characters=300)
    assert len(parts) == 3
    tokens = model.speech_tokens(parts, seed=[9, 10, 11], max_tokens=30)
    sound = torch.cat([model.synthesize(each, seed=9 + i) for i, each in enumerate(tokens)], 1)
    spoken = model.generate(LONG, seed=9, max_tokens=30)
    assert spoken.shape == (1, 3 * 30 * 960)
    np.testing.assert_array_equal(spoken[0].numpy(), Watermarker()(sound[0].numpy()))
