"""Enrolment equals upstream's prepare_conditionals, run by upstream's own class on the same random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from chatterbox_vllm import upstream
from chatterbox_vllm.audio.decode import Waveform, decode
from chatterbox_vllm.checkpoint import DERIVED_KEYS, Checkpoint, Variant, load_strict, load_tensors
from chatterbox_vllm.demo_checkpoint import networks, write_demo
from chatterbox_vllm.errors import CheckpointError, InvalidAudio
from chatterbox_vllm.quantization.matrices import matrices_of
from chatterbox_vllm.voices import enrolment
from chatterbox_vllm.voices.enrolment import Enroller, load_enrolment_parts, load_voice_encoder, warm_up
from tests.audio_support import sound_file, voice_like


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def enroller(checkpoint: Checkpoint) -> Enroller:
    return Enroller(checkpoint)


@pytest.fixture(scope="module")
def reference(checkpoint: Checkpoint) -> Any:
    """Upstream's ChatterboxTTS with nothing but the networks that enrol."""
    s3gen, encoder = networks.s3gen("tiny"), networks.voice_encoder()
    load_strict(s3gen, load_tensors(checkpoint.s3gen), file=checkpoint.s3gen, optional=DERIVED_KEYS)
    load_strict(encoder, load_tensors(checkpoint.voice_encoder), file=checkpoint.voice_encoder)
    tts = upstream.import_module("chatterbox.tts").ChatterboxTTS
    it = tts.__new__(tts)
    it.s3gen, it.ve, it.device = s3gen, encoder, "cpu"
    it.t3 = SimpleNamespace(hp=SimpleNamespace(speech_cond_prompt_len=150))
    return it


def recording(seconds: float, rate: int, kind: str) -> bytes:
    sound = voice_like(seconds, rate, pitch=110 + seconds)
    stereo = np.stack([sound, 0.5 * sound[::-1]], axis=1)
    return sound_file(stereo if kind == "stereo" else sound, rate, "MP3" if kind == "mp3" else "WAV")


@pytest.mark.parametrize(
    ("seconds", "rate", "kind"),
    [(0.5, 24_000, "wav"), (0.51, 24_000, "wav"), (3.33, 44_100, "stereo"), (6.0, 16_000, "wav"),
     (10.03, 24_000, "wav"), (13.0, 48_000, "mp3"), (0.5, 8_000, "wav")],
)  # fmt: skip
def test_features_are_upstreams(
    seconds: float, rate: int, kind: str, enroller: Enroller, reference: Any, tmp_path: Path
) -> None:
    file = tmp_path / "voice"
    file.write_bytes(recording(seconds, rate, kind))
    with torch.no_grad():
        reference.prepare_conditionals(str(file))
    t3, gen = reference.conds.t3, reference.conds.gen
    features = enroller.enrol(decode(file))

    frames = 2 * gen["prompt_token"].shape[1]
    assert torch.equal(features.prompt_tokens, gen["prompt_token"][0])
    assert torch.equal(features.t3_prompt_tokens, t3.cond_prompt_speech_tokens[0])
    assert features.prompt_mel.shape == (frames, 80)
    for ours, theirs in (
        (features.prompt_mel, gen["prompt_feat"][0, :frames]),
        (features.x_vector, gen["embedding"][0]),
        (features.speaker_embedding, t3.speaker_emb[0]),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_half_a_second_has_the_odd_mel_frame(reference: Any) -> None:
    """Without it, the test above would not see the trap that ``matched`` is for."""
    with torch.no_grad():
        features = reference.s3gen.embed_ref(voice_like(0.5), 24_000, device="cpu")
    assert features["prompt_feat"].shape[1] == 2 * features["prompt_token"].shape[1] + 1


def test_another_voice_has_other_features(enroller: Enroller) -> None:
    low, high = (enroller.enrol(Waveform(voice_like(2.0, pitch=pitch), 24_000)) for pitch in (90, 250))
    assert not torch.equal(low.prompt_tokens, high.prompt_tokens)
    assert (low.x_vector - high.x_vector).abs().max() > 1e-3
    assert low.digest != high.digest
    assert low.digest == enroller.enrol(Waveform(voice_like(2.0, pitch=90), 24_000)).digest


def test_features_are_ordinary_tensors(enroller: Enroller) -> None:
    features = enroller.enrol(Waveform(voice_like(1.0), 24_000))
    for tensor in (features.speaker_embedding, features.t3_prompt_tokens, features.prompt_mel, features.x_vector):
        assert not tensor.is_inference()
        assert tensor.is_contiguous()
        assert tensor.device.type == "cpu"


def test_a_click_in_silence_does_not_crash(enroller: Enroller) -> None:
    samples = np.zeros(24_000, np.float32)
    samples[12_000] = 0.9
    features = enroller.enrol(Waveform(samples, 24_000))
    assert features.x_vector.isfinite().all()


def test_no_voice_is_said_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A VoiceEncoder that hears nothing divides by zero."""
    tensors = load_file(checkpoint.voice_encoder)
    tensors["proj.weight"].zero_()
    tensors["proj.bias"].fill_(-1.0)
    save_file(tensors, tmp_path / "ve.safetensors")
    deaf = Enroller(replace(checkpoint, voice_encoder=tmp_path / "ve.safetensors"))
    with pytest.raises(InvalidAudio, match=r"no voice can be made.*speaker_embedding") as caught:
        deaf.enrol(Waveform(voice_like(1.0), 24_000), param="ref_audio")
    assert caught.value.param == "ref_audio"


def test_unloading_is_not_the_end(checkpoint: Checkpoint) -> None:
    enroller = Enroller(checkpoint)
    before = enroller.enrol(Waveform(voice_like(1.0), 24_000))
    enroller.unload()
    assert enroller._networks is None
    assert enroller.enrol(Waveform(voice_like(1.0), 24_000)).digest == before.digest


@pytest.mark.parametrize("method", ["int8", "bnb-4bit"])
def test_a_quantised_projection(method: str, checkpoint: Checkpoint, enroller: Enroller) -> None:
    if method == "bnb-4bit":
        pytest.importorskip("bitsandbytes")
    small = Enroller(checkpoint, voice_encoder=method)
    waveform = Waveform(voice_like(1.0), 24_000)
    expected, actual = enroller.enrol(waveform), small.enrol(waveform)
    assert 0.98 < torch.cosine_similarity(expected.speaker_embedding, actual.speaker_embedding, dim=0) < 1.0
    assert torch.equal(expected.x_vector, actual.x_vector)
    assert small._networks is not None
    (matrix,) = matrices_of(small._networks.voice_encoder)
    assert matrix.shape == (256, 256)
    assert matrix.nbytes < 4 * 256 * 256 / (3.9 if method == "int8" else 7.5)
    assert small.identity() != enroller.identity()  # a voice kept from before is enrolled anew


@pytest.mark.parametrize("short", [False, True])
def test_networks_leave_a_gpu_that_is_short_of_memory(checkpoint: Checkpoint, short: bool, monkeypatch: Any) -> None:
    moves: list[str] = []
    to = enrolment._Networks.to
    monkeypatch.setattr(enrolment, "is_short_of_memory", lambda device: short and device == "cpu:0")
    monkeypatch.setattr(enrolment._Networks, "to", lambda self, device: (moves.append(device), to(self, device)))
    enroller = Enroller(checkpoint, device="cpu:0")  # stands for a GPU
    first, again = (enroller.enrol(Waveform(voice_like(1.0), 24_000)) for _ in range(2))
    assert moves == ["cpu:0", *(["cpu"] if short else [])] * 2
    assert first.digest == again.digest


def test_how_much_is_short_of_memory(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30 * {"cuda:0": 3, "cuda:1": 5}[device], 2**35))
    assert [enrolment.is_short_of_memory(device) for device in ("cpu", "cuda:0", "cuda:1")] == [False, True, False]


def test_multilingual_files(tmp_path: Path) -> None:
    multilingual = Enroller(write_demo(tmp_path / "demo", variant=Variant.MULTILINGUAL))
    assert multilingual.enrol(Waveform(voice_like(1.0), 24_000)).x_vector.shape == (192,)


def test_sizes_come_from_the_tensors(tmp_path: Path) -> None:
    wide = upstream.load("s3gen.xvector").CAMPPlus(memory_efficient=False, init_channels=64, growth_rate=16)
    tensors = {f"speaker_encoder.{key}": tensor for key, tensor in wide.state_dict().items()}
    width, layers = 192, 1
    model = upstream.import_module("s3tokenizer.model_v2")
    config = model.ModelConfig(n_audio_state=width, n_audio_head=3, n_audio_layer=layers)
    tokenizer = model.S3TokenizerV2("speech_tokenizer_v2_25hz", config)
    tensors |= {f"tokenizer.{key}": tensor for key, tensor in tokenizer.state_dict().items()}
    save_file(tensors, tmp_path / "s3gen.safetensors")
    loaded, speaker = load_enrolment_parts(tmp_path / "s3gen.safetensors")
    assert (loaded.config.n_audio_state, loaded.config.n_audio_head, loaded.config.n_audio_layer) == (192, 3, 1)
    assert torch.equal(speaker.state_dict()["head.conv1.weight"], wide.state_dict()["head.conv1.weight"])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("tokenizer.encoder.blocks.0.attn.query.weight"), "encoder.blocks.0.attn.query.weight"),
        (lambda t: t.pop("speaker_encoder.xvector.dense.linear.weight"), "speaker_encoder.xvector.dense.linear.weight"),
        (lambda t: t.update({"tokenizer.extra": torch.zeros(1)}), "extra"),
        (lambda t: t.update({"vocoder.weight": torch.zeros(1)}), "vocoder.weight"),
        (lambda t: t.update({"speaker_encoder.head.bn1.bias": torch.zeros(5)}), "head.bn1.bias"),
    ],
)
def test_keys_are_strict(change: Any, named: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(checkpoint.s3gen)
    change(tensors)
    save_file(tensors, tmp_path / "s3gen.safetensors")
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        load_enrolment_parts(tmp_path / "s3gen.safetensors")


def test_the_voice_encoder_is_strict(checkpoint: Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(checkpoint.voice_encoder)
    tensors["lstm.weight_ih_l7"] = torch.zeros(1)
    save_file(tensors, tmp_path / "ve.safetensors")
    with pytest.raises(CheckpointError, match=r"lstm\.weight_ih_l7"):
        load_voice_encoder(tmp_path / "ve.safetensors")


def test_derived_keys_may_be_missing(checkpoint: Checkpoint, enroller: Enroller, tmp_path: Path) -> None:
    tensors = {key: tensor for key, tensor in load_file(checkpoint.s3gen).items() if key not in DERIVED_KEYS}
    save_file(tensors, tmp_path / "s3gen.safetensors")
    without = Enroller(replace(checkpoint, s3gen=tmp_path / "s3gen.safetensors"))
    waveform = Waveform(voice_like(1.0), 24_000)
    assert without.enrol(waveform).digest == enroller.enrol(waveform).digest
    assert without.identity() != enroller.identity()


def test_warm_up() -> None:
    warm_up()
