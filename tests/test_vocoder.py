"""Our S3Gen is upstream's: same weights, same noise, same sound."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatterbox_vllm.demo_checkpoint import networks
from chatterbox_vllm.errors import CheckpointError, InvalidRequest
from chatterbox_vllm.types import VoiceFeatures
from chatterbox_vllm.vocoder import noise, source, weights
from chatterbox_vllm.vocoder.noise import Stream
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk
from tests.vocoder_support import our_noise, speech, tensors, upstream, upstream_whole, vocoder, voice, whole


@pytest.mark.parametrize(("count", "prompt", "steps"), [(1, 25, 10), (7, 25, 3), (40, 10, 10), (140, 25, 10)])
def test_mel_and_samples_are_upstreams(count, prompt, steps):
    of, tokens = voice(prompt, seed=count), speech(count)
    expected_mel, expected = upstream_whole(tokens, of, seed=5, steps=steps)
    mel, samples = whole(vocoder(), tokens, of, seed=5, steps=steps)
    assert samples.dtype == torch.float32
    assert not samples.is_inference()
    assert samples.shape == (960 * count,)
    assert expected_mel.std() > 0.5
    assert (mel - expected_mel).abs().max() <= 1e-4
    assert (samples - expected).abs().max() <= 1e-4


def test_the_comparison_hears_voiced_and_unvoiced_sound():
    mel, samples = upstream_whole(speech(140), voice(25, seed=140), seed=5)
    with torch.inference_mode():
        voiced = upstream().mel2wav.f0_predictor(mel.T[None]) > 10
    assert 0.5 < voiced.float().mean() < 1.0
    assert samples.std() > 0.01
    assert (samples.abs() == 0.99).float().mean() < 0.01


def test_another_seed_is_another_sound():
    own, tokens, of = vocoder(), speech(20), voice()
    first, second, again = (own.synthesize(tokens, of, seed=seed) for seed in (1, 2, 1))
    assert torch.equal(first, again)
    assert (first - second).abs().max() > 0.05


def test_a_prompt_mel_with_an_odd_frame_costs_no_sound():
    odd = voice(12, odd_frame=True)
    even = VoiceFeatures(
        odd.speaker_embedding, odd.t3_prompt_tokens, odd.prompt_tokens, odd.prompt_mel[:24], odd.x_vector
    )
    _, expected = upstream_whole(speech(20), even, seed=1)
    _, samples = whole(vocoder(), speech(20), odd, seed=1)
    assert (samples - expected).abs().max() <= 1e-4


def test_the_start_is_silent_and_then_fades_in():
    samples = vocoder().synthesize(speech(10), voice(), seed=1)
    assert not samples[:480].any()
    assert samples[480:600].abs().max() < samples[900:].abs().max() / 4


def test_no_tokens_make_no_sound():
    own = vocoder()
    assert own.synthesize(speech(0), voice(), seed=1).shape == (0,)


def test_phases_are_upstreams_after_forty_seconds():
    """Upstream rounds its running sum; 300 Hz times nine have gone through 108,000 cycles by then."""
    pitch = 300 + 40 * torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)).cumsum(1).sin()
    pitch[0, 700:900] = 4.0
    upstreams = upstream().mel2wav.m_source
    keys, zeros = (torch.tensor([noise.key(3, stream)]) for stream in (Stream.PHASE, Stream.SOURCE)), torch.zeros(1, 9)
    offsets = noise.phases(next(keys), 8)
    draws = noise.normals(next(keys), torch.zeros(1, dtype=torch.int64), 2000 * 480, 9)
    with torch.inference_mode(), our_noise(3):
        expected = upstreams(pitch.repeat_interleave(480, dim=1)[..., None])[0].squeeze(-1)
    own = vocoder().networks.mel2wav.m_source
    cycles = source.cycles_at_frames(pitch, 9, zeros.double(), torch.zeros(1, dtype=torch.int64))
    with torch.inference_mode():
        actual = own(pitch, cycles[..., :-1], offsets, draws)
    assert expected.std() > 0.01
    assert (actual - expected).abs().max() <= 1e-5


def test_half_precision_in_the_estimator_stays_close():
    tokens, of = speech(40), voice()
    exact, _ = whole(vocoder(), tokens, of, seed=1)
    half, samples = whole(vocoder(dtype=torch.bfloat16), tokens, of, seed=1)
    decibels = 8.686 * (half - exact).abs().mean()
    assert 0.0 < decibels < 0.5
    assert samples.isfinite().all()


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor([1, 6561]),
        torch.tensor([-1]),
        torch.tensor([1, 2], dtype=torch.int32),
        torch.tensor([1.0]),
        torch.zeros(1, 2, dtype=torch.int64),
        [1, 2],
    ],
)
def test_what_is_no_list_of_sounds_is_refused(tokens):
    with pytest.raises(InvalidRequest) as caught:
        vocoder().synthesize(tokens, voice(), seed=1)
    assert caught.value.param == "tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_tokens", torch.tensor([6561])),
        ("prompt_mel", torch.zeros(80, 50)),
        ("prompt_mel", torch.zeros(50, 80, dtype=torch.float64)),
        ("x_vector", torch.zeros(1, 192)),
    ],
)
def test_features_that_do_not_fit_are_refused(field, value):
    good = voice()
    parts = {name: getattr(good, name) for name in good.__dataclass_fields__} | {field: value}
    with pytest.raises(InvalidRequest) as caught:
        vocoder().open(VoiceFeatures(**parts), seed=1)
    assert caught.value.param == "voice"


@pytest.mark.parametrize("steps", [0, 101, 2.5, True])
def test_steps_out_of_range_are_refused(steps):
    with pytest.raises(InvalidRequest) as caught:
        vocoder().open(voice(), seed=1, diffusion_steps=steps)
    assert caught.value.param == "diffusion_steps"


def test_a_checkpoint_file_loads(tmp_path: Path):
    path = tmp_path / "s3gen.safetensors"
    save_file(tensors() | {"tokenizer.quantizer.x": torch.zeros(1), "speaker_encoder.head.x": torch.zeros(1)}, path)
    own = Vocoder.from_checkpoint(path, exact=True)
    assert torch.equal(own.synthesize(speech(5), voice(), seed=1), vocoder().synthesize(speech(5), voice(), seed=1))


def test_the_real_sizes_are_read_off_the_shapes():
    with torch.device("meta"):
        real = networks.s3gen("full").state_dict()
    own = weights.build(real, Path("s3gen.safetensors"))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in own.named_children()}
    assert counts["flow"] == 71_302_480 + 37_831_168 + 6561 * 512 + 80 * 193 + 80 * 513
    # 82 norms were folded away: one number for each channel.
    norms = sum(tensor.numel() for key, tensor in real.items() if key.endswith("original0"))
    assert counts["mel2wav"] == 20_821_295 - norms


def test_every_key_must_be_known_present_and_of_its_shape():
    good = tensors()
    first = "flow.decoder.estimator.mid_blocks.0.0.res_conv.bias"
    with pytest.raises(CheckpointError, match=r"s3gen\.x.*flow\.decoder\.time_embed_mixer"):
        weights.build(good | {"flow.decoder.time_embed_mixer": torch.zeros(1)}, Path("s3gen.x"))
    with pytest.raises(CheckpointError, match=first):
        weights.build({key: tensor for key, tensor in good.items() if key != first}, Path("s3gen.x"))
    with pytest.raises(CheckpointError, match=first):
        weights.build(good | {first: torch.zeros(3)}, Path("s3gen.x"))
    with pytest.raises(CheckpointError, match="conv_pre"):
        weights.build({k: t for k, t in good.items() if k != "mel2wav.conv_pre.bias"}, Path("s3gen.x"))
    with pytest.raises(CheckpointError, match=r"input_embedding"):
        weights.build({"speech_head.weight": torch.zeros(2, 2)}, Path("t3.x"))
    weights.build(good | {"tokenizer.anything": torch.zeros(1)}, Path("s3gen.x"))


def test_a_second_final_chunk_is_a_mistake():
    own = vocoder()
    utterance = own.open(voice(), seed=1)
    own.advance([Chunk(utterance, speech(3), final=True)])
    with pytest.raises(ValueError, match="final"):
        own.advance([Chunk(utterance, speech(3), final=True)])
