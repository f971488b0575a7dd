"""What the estimator says of networks of the real sizes, and of small ones that can be weighed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.quantization.estimate import COSTS, QuantizationMemoryEstimator, read_shapes, table
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import STRATEGIES, Method, Policy
from chatterbox_vllm.vocoder.footprint import bytes_of
from chatterbox_vllm.vocoder.weights import load, quantize
from tests.memory_support import Headers, full_headers

NOT_LOADED = ("tfmr.embed_tokens.", "text_head.", "cond_enc.")
ANGLES = 4 * 16_384 * 128


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> QuantizationMemoryEstimator:
    return QuantizationMemoryEstimator(full_headers(tmp_path_factory.mktemp("full")))


def test_real_sizes(full: QuantizationMemoryEstimator) -> None:
    """Against counts made by hand: 30 x (4 x 1024^2 + 3 x 1024 x 4096) weights in T3, 56 blocks of 2^20 in the flow."""
    weights = 30 * (4 * 2**20 + 12 * 2**20)
    rows = 30 * (4 * 1024 + 2 * 4096 + 1024)
    plain = full.estimate(Policy())
    assert plain["t3"].after == plain["t3"].before == 2 * weights
    matrices, convolutions = 2 * 56 * 2**20, 2 * 112 * 256**2
    assert plain["estimator"].after == pytest.approx(matrices + convolutions, rel=0.01)
    assert plain["hift"].after == pytest.approx(83.2e6, rel=0.01)
    assert plain["enrolment"].after == pytest.approx(523e6, rel=0.01)

    four, eight = full.estimate(STRATEGIES["aggressive"]), full.estimate(STRATEGIES["conservative"])
    assert four["t3"].after == weights // 2 + weights // 64 * 4
    assert eight["t3"].after == weights + 4 * rows
    assert matrices - (plain["estimator"].after - four["estimator"].after) == pytest.approx(30.29e6, rel=0.001)
    assert [four[name].layers for name in ("t3", "flow_encoder", "estimator", "voice_encoder")] == [210, 70, 336, 1]
    assert plain.saved == 0
    assert four.card < eight.card < plain.card
    assert (full.t3_sizes.layers, full.t3_sizes.width, full.t3_sizes.feed_forward) == (30, 1024, 4096)


def test_compare_strategies(full: QuantizationMemoryEstimator) -> None:
    estimates = full.compare_strategies()
    assert list(estimates) == ["none", "conservative", "mixed", "aggressive"]
    cards = [each.card for each in estimates.values()]
    assert cards == sorted(cards, reverse=True)
    assert len({each.at("host") for each in estimates.values()}) == 1
    lines = table(estimates.values()).splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(estimates)
    assert "bnb-4bit" in estimates["mixed"].table()


def test_every_method_of_a_stage_has_a_cost(full: QuantizationMemoryEstimator) -> None:
    for method in Method:
        if method != Method.NONE:
            assert ("t3", method) in COSTS
            assert full.estimate(Policy(t3=method))["t3"].after < full.estimate(Policy())["t3"].after
    unknown = full.estimate(Policy(t3="experts_int8"))["t3"]
    assert unknown.after == unknown.before  # nothing is promised that nobody has counted


@pytest.mark.parametrize("method", [Method.NONE, Method.INT8, Method.BNB_4BIT])
def test_the_vocoder_weighs_what_is_estimated(demo: Checkpoint, method: Method) -> None:
    """On a CPU, where everything else is float32, to the byte; but for what bitsandbytes pads."""
    loaded = load(demo.s3gen)
    quantize(loaded, {"flow_encoder": method, "estimator": method})
    estimated = QuantizationMemoryEstimator(demo, itemsize=4, vocoder_itemsize=4).estimate(
        Policy(flow_encoder=method, estimator=method)
    )
    time = estimated["estimator_time"].after
    assert estimated.at("vocoder") + time == pytest.approx(bytes_of({"all": loaded})["all"], rel=0.005)


def test_t3_weighs_what_is_estimated(demo: Checkpoint) -> None:
    used = {name: tensor for name, tensor in load_file(demo.t3).items() if not name.startswith(NOT_LOADED)}
    estimated = QuantizationMemoryEstimator(demo, itemsize=4).estimate(Policy())
    assert estimated.at("t3") == sum(tensor.nbytes for tensor in used.values()) + ANGLES


@pytest.mark.parametrize("stored", [Stored(Method.AWQ, 32), Stored(Method.BNB_8BIT)])
def test_a_quantised_file_weighs_what_it_weighs(demo: Checkpoint, tmp_path: Path, stored: Stored) -> None:
    """Whatever the policy says; the scales, float32 in the file, are loaded in half precision."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(demo.t3).items():
        quantised = "_proj.weight" in name
        tensors |= stored.encode(name.removesuffix(".weight"), tensor) if quantised else {name: tensor}
    path = tmp_path / "t3.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=stored.metadata())
    files = Headers(path, demo.s3gen, demo.voice_encoder)
    part = QuantizationMemoryEstimator(files).estimate(Policy())["t3"]
    packed = [tensor for name, tensor in tensors.items() if name.endswith((".weight_packed", ".weight_zero_point"))]
    scales = [tensor for name, tensor in tensors.items() if name.endswith(".weight_scale")]
    assert part.method == stored.method
    assert part.after == sum(each.nbytes for each in packed) + sum(each.nbytes for each in scales) // 2
    assert part.before == QuantizationMemoryEstimator(demo).estimate(Policy())["t3"].before


def test_torch_files_are_read_without_their_weights(demo: Checkpoint, multilingual_demo: Checkpoint) -> None:
    assert multilingual_demo.s3gen.suffix == ".pt"
    assert read_shapes(multilingual_demo.s3gen) == read_shapes(demo.s3gen)
    english, multilingual = (QuantizationMemoryEstimator(each).estimate(Policy()) for each in (demo, multilingual_demo))
    assert english.at("vocoder") == multilingual.at("vocoder")
    more_text = (2454 - 704) * 128 * 2
    assert multilingual["t3_embeddings"].after - english["t3_embeddings"].after == more_text


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_what_is_no_file_of_weights_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match=f"broken{suffix}"):
        read_shapes(path)
    if suffix == ".pt":
        torch.save({"a": 1}, path)
        with pytest.raises(CheckpointError, match="other than named tensors"):
            read_shapes(path)


def test_a_file_without_t3_is_named(demo: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match="not a T3 checkpoint"):
        QuantizationMemoryEstimator(Headers(demo.s3gen, demo.s3gen, demo.voice_encoder))


def test_nested_scales_cost_an_eighth_of_a_bit() -> None:
    shape = (256, 1024)
    weights = math.prod(shape)
    assert 8 * COSTS["vocoder", Method.BNB_4BIT].of(shape) / weights == pytest.approx(4.127, abs=0.001)
    assert 8 * COSTS["t3", Method.BNB_4BIT].of(shape) / weights == 4.5
