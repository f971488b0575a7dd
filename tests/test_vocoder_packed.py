"""Without upstream's very bits, the mel is upstream's all the same, and so is the sound of the same pitch."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch

from chatterbox_vllm.vocoder import packed, weights
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.int8 import Int8Linear
from chatterbox_vllm.vocoder.packed import PackedConv, PackedLinear, pack
from chatterbox_vllm.vocoder.utterance import Chunk
from tests.vocoder_support import speech, upstream, upstream_whole, vocoder, voice, whole

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="oneDNN has no kernels for this CPU"
)


@pytest.mark.parametrize(("count", "prompt", "steps"), [(1, 25, 10), (7, 25, 3), (40, 10, 10), (140, 25, 10)])
def test_mel_is_upstreams_and_so_are_samples_of_its_pitch(count, prompt, steps):
    of, tokens, own = voice(prompt, seed=count), speech(count), vocoder(exact=False)
    expected_mel, expected = upstream_whole(tokens, of, seed=5, steps=steps)
    with torch.inference_mode():
        pitch = upstream().mel2wav.f0_predictor(expected_mel.T[None])
    with patch.object(own.networks.mel2wav.f0_predictor, "forward", lambda mel, edges: pitch):
        mel, samples = whole(own, tokens, of, seed=5, steps=steps)
    assert 0 < (mel - expected_mel).abs().max() <= 1e-4
    assert (samples - expected).abs().max() <= 1e-4


def test_padded_rows_have_the_mel_they_have_alone():
    own = vocoder(exact=False, max_frames=100_000)
    requests = [(voice(25), speech(25)), (voice(10, seed=1), speech(3)), (voice(7, seed=2), speech(60))]
    chunks = [Chunk(own.open(of, seed=1), tokens, final=True) for of, tokens in requests]
    own.advance(chunks)
    for chunk, (of, tokens) in zip(chunks, requests, strict=True):
        alone, _ = whole(own, tokens, of, seed=1)
        assert (chunk.utterance.mel - alone).abs().max() <= 1e-5


@torch.inference_mode()
def test_packed_layers_compute_what_the_layers_compute():
    estimator = vocoder().networks.flow.estimator
    plain, x = vocoder().networks.flow.estimator, torch.randn(2, 30, 320)
    shifts = plain.shifts(torch.tensor([0.3]))[0]
    expected = plain(x, shifts, None)
    pack(estimator)
    assert isinstance(estimator.final_block.block["0"], PackedConv)
    assert isinstance(estimator.mid_blocks[0][1][0].ff.net["0"], PackedLinear)
    assert not [layer for stage in estimator.stages for layer in stage.modules() if type(layer) is torch.nn.Linear]
    torch.testing.assert_close(estimator(x, shifts, None), expected, atol=1e-5, rtol=1e-5)
    columns = torch.randn(1, 320, 30).transpose(1, 2)
    assert torch.equal(estimator(columns, shifts, None), estimator(columns.contiguous(), shifts, None))


def test_who_asks_for_float32_gets_upstreams_bits(demo):
    def last(dtype: torch.dtype | None) -> torch.nn.Module:
        blueprint = Blueprint(demo.s3gen, dtype=dtype)
        return blueprint.build(blueprint.read()).networks.flow.estimator.final_proj

    assert isinstance(last(None), PackedLinear)
    assert isinstance(last(torch.float32), torch.nn.Conv1d)


def test_what_is_quantised_stays_so(demo):
    blueprint = Blueprint(demo.s3gen, estimator="int8")
    own = blueprint.build(blueprint.read())
    stage = own.networks.flow.estimator.mid_blocks[0]
    assert isinstance(stage[1][0].ff.net["0"]["proj"], Int8Linear)
    assert isinstance(stage[0].res_conv, PackedLinear)
    assert own.synthesize(speech(5), voice(), seed=1).isfinite().all()


def test_other_processors_and_half_precision_keep_the_layers(monkeypatch):
    kept = weights.build(vocoder(exact=False, dtype=torch.bfloat16).networks.state_dict(), "s3gen.safetensors")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    pack(kept.flow.estimator)
    assert not [layer for layer in kept.modules() if isinstance(layer, packed.PackedLinear)]
