"""A quantised vocoder on a CPU, what a vocoder says of its memory, and HiFT in pieces."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.vocoder import backend, stage, weights
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.distance import mel_distance
from chatterbox_vllm.vocoder.hift import GAP, Stretch
from chatterbox_vllm.vocoder.host import ThreadHost
from chatterbox_vllm.vocoder.int8 import Int8Linear
from chatterbox_vllm.vocoder.pieces import in_pieces
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk
from chatterbox_vllm.vocoder.worker import VocoderPool
from tests.vocoder_support import At, speech, tensors, vocoder, voice, whole

INT8 = {"flow_encoder": "int8", "estimator": "int8"}


def quantised(**methods: str) -> Vocoder:
    networks = weights.build(tensors(), Path("s3gen.safetensors"))
    weights.quantize(networks, {"flow_encoder": "none", "estimator": "none"} | methods, Int8Linear)
    return Vocoder(networks)


@pytest.fixture(scope="module")
def in_int8() -> Vocoder:
    return quantised(**INT8)


def test_int8_stays_close(in_int8):
    """Closer than another seed by far: 8 dB."""
    expected, _ = whole(vocoder(), speech(40), voice(), seed=1)
    actual, samples = whole(in_int8, speech(40), voice(), seed=1)
    assert 0.0 < mel_distance(expected, actual) < 0.5
    assert samples.isfinite().all()


def test_int8_takes_a_quarter(in_int8):
    now = in_int8.footprint()
    plain = vocoder().footprint()
    assert plain.weights == plain.before == now.before
    assert (now.allocated, now.peak) == (0, 0)
    linears = [layer for layer in in_int8.networks.modules() if isinstance(layer, Int8Linear)]
    codes = sum(layer.matrix.codes.numel() for layer in linears)
    scales = sum(layer.matrix.scales.nbytes for layer in linears)
    saved = sum(now.before.values()) - sum(now.weights.values())
    assert saved == 3 * codes - scales
    assert now.weights["hift"] == now.before["hift"]


def test_one_component_alone():
    now = quantised(estimator="int8").footprint()
    assert now.weights["flow_encoder"] == now.before["flow_encoder"]
    assert now.weights["estimator"] < now.before["estimator"]


@torch.inference_mode()
def test_a_row_in_int8_does_not_depend_on_its_batch():
    linear = torch.nn.Linear(64, 32)
    (layer,) = [torch.nn.Sequential(linear)]
    weights.quantize_linears(layer, "int8", Int8Linear)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    loud = torch.cat([100 * x[:2], x])
    assert torch.equal(layer(loud)[2:], layer(x))
    assert torch.equal(layer(x[None, :, None])[0, :, 0], layer(x))
    assert torch.equal(layer(torch.zeros(2, 64)), linear.bias.expand(2, -1))


@pytest.mark.parametrize("name", ["flow_encoder", "estimator"])
def test_a_cpu_cannot_have_bitsandbytes(name):
    with pytest.raises(ConfigurationError, match="bnb-4bit on cpu; use one of none, int8") as caught:
        Blueprint(Path("s3gen.safetensors"), **{name: "bnb-4bit"})
    assert caught.value.param == name
    assert Blueprint(Path("s3gen.safetensors"), "cuda:1", estimator="bnb-4bit").estimator == "bnb-4bit"


def test_a_blueprint_quantises(demo):
    networks = Blueprint(demo.s3gen, estimator="int8", max_frames=300).read()
    assert isinstance(networks.flow.estimator.mid_blocks[0][1][0].ff.net["2"], Int8Linear)
    assert isinstance(networks.flow.encoder.encoders[0].feed_forward.w_1, torch.nn.Linear)
    assert Blueprint(demo.s3gen, max_frames=300).build(networks).max_frames == 300


def test_old_cards_get_the_plain_networks(monkeypatch, caplog):
    """Triton does not know their tensor cores."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not stage._suits_triton(torch.device("cuda"))
    assert "compute capability 8.0, cuda has 7.5" in caplog.text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert stage._suits_triton(torch.device("cuda"))


def test_a_pool_knows_its_workers_memory(in_int8):
    async def main() -> None:
        pool = VocoderPool([ThreadHost(At(in_int8))])
        assert pool.footprints == []
        pool.start()
        try:
            await pool.ready()
            assert pool.footprints == [in_int8.footprint()]
            await pool.submit(Chunk(in_int8.open(voice(5), seed=0), speech(5), final=True))
            assert pool.footprints == [in_int8.footprint()]
        finally:
            await pool.close()

    asyncio.run(main())


@torch.inference_mode()
def test_hift_in_pieces_gives_the_same_samples():
    """Rows that run together, one that runs alone and one that is cut; as of a stream that has begun."""
    frames = [20, 30, 70, 200]
    generator = torch.Generator().manual_seed(0)
    hift, most = vocoder().networks.mel2wav, 80
    stretch = Stretch(
        mel=torch.randn(4, 200, 80, generator=generator).cumsum(1) * 0.2 - 4.0,
        frames=frames,
        anchor=torch.tensor([0, 7, 20, 5]),
        cycles=100 * torch.rand(4, hift.m_source.waves, dtype=torch.float64, generator=generator),
        offsets=torch.rand(4, hift.m_source.waves, generator=generator),
        keys=torch.arange(4),
        first=torch.tensor([0, 4800, 960, 480]),
    )
    sizes: list[list[int]] = []

    def run(part: Stretch) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(part.frames)
        return hift(part)

    expected, turned = hift(stretch)
    samples, cycles = in_pieces(run, stretch, most)
    assert sizes[:2] == [[20, 30], [70]]
    assert all(size + GAP <= most for (size,) in sizes[1:])
    for row, count in enumerate(frames):
        assert samples[row].shape == (480 * count,)
        assert samples[row].std() > 0.01
        assert (samples[row] - expected[row, : 480 * count]).abs().max() < 4e-3
        assert (cycles[row] - turned[row, :, : count + 1]).abs().max() < 1e-3


def test_a_low_number_of_frames_bounds_hift(monkeypatch):
    monkeypatch.setattr(stage, "FEWEST_IN_PIECES", 80)
    sizes: list[int] = []
    hift = backend.TorchBackend.hift

    def counted(self, stretch):
        sizes.append(sum(stretch.frames))
        return hift(self, stretch)

    monkeypatch.setattr(backend.TorchBackend, "hift", counted)
    for most in (None, 240):
        samples = vocoder(max_frames=most).synthesize(speech(60), voice(), seed=1)
        assert len(samples) == 960 * 60
    assert sizes[0] == 120
    assert max(sizes[1:]) <= 80
