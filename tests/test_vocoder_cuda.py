"""The networks for CUDA cards against those that they replace.

Without a card, ``test_kernels`` runs the kernels on the CPU, in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from chatterbox_vllm.quantization.matrices import QuantizedLinear, matrices_of, quantized
from chatterbox_vllm.vocoder import noise, weights
from chatterbox_vllm.vocoder.batching import padded, row_mask
from chatterbox_vllm.vocoder.cuda import encoder
from chatterbox_vllm.vocoder.cuda.encoder import ALIGNMENT, HalfEncoder
from chatterbox_vllm.vocoder.cuda.tiling import Tile, Tiling
from chatterbox_vllm.vocoder.estimator import Estimator, EstimatorSizes
from chatterbox_vllm.vocoder.hift import Stretch
from chatterbox_vllm.vocoder.noise import Stream
from tests.kernel_support import DEVICE, ON_CARD, needs_triton
from tests.vocoder_support import tensors


def built() -> weights.Networks:
    return weights.build(tensors(), Path("s3gen.safetensors"))


@pytest.fixture(scope="module")
def networks() -> weights.Networks:
    return built().to(DEVICE)


class Called:
    """``Captured`` without a card."""

    def __init__(self, function: Callable, examples: tuple[torch.Tensor, ...], pool: object = None) -> None:
        self.function, self.inputs = function, examples

    def __call__(self, *inputs: torch.Tensor) -> object:
        for own, given in zip(self.inputs, inputs, strict=True):
            own[: len(given)] = given
        return self.function(*self.inputs)


@torch.inference_mode()
def test_the_encoder_agrees_for_rows_of_any_length(networks, monkeypatch):
    lengths = [3 * ALIGNMENT, 30, 7]
    tokens = padded([torch.randint(0, 6561, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths])
    x, mask = networks.flow.input_embedding(tokens.to(DEVICE)), row_mask(lengths, DEVICE)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = networks.flow.encoder(x, mask)
    actual = HalfEncoder(networks.flow.encoder, torch.float32, DEVICE)(x, mask)
    rough = HalfEncoder(networks.flow.encoder, torch.bfloat16, DEVICE)(x, mask)
    monkeypatch.setattr(encoder, "LONGEST", 32)  # of longer ones, distances are computed anew
    longer = HalfEncoder(networks.flow.encoder, torch.float32, DEVICE)(x, mask)
    real = mask.repeat_interleave(2, dim=1)
    assert expected[real].std() > 0.1
    assert (actual - expected)[real].abs().max() < 1e-4
    assert torch.equal(longer, actual)
    assert (rough - expected)[real].abs().mean() < 0.02 * expected[real].abs().mean()


@needs_triton
@torch.inference_mode()
def test_the_estimator_agrees_for_packed_rows(networks, monkeypatch):
    from chatterbox_vllm.vocoder.cuda import graphs
    from chatterbox_vllm.vocoder.cuda.estimator import PackedEstimator

    steps = 2

    if not ON_CARD:
        without_card(monkeypatch)
    lengths = [60, 17, 41]
    noisy, mu, cond = torch.randn(3, 3, 60, 80, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    speaker = torch.randn(3, 80, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected = networks.flow.solve(noisy, mu, speaker, cond, row_mask(lengths, DEVICE), steps)
    estimator = PackedEstimator(built().flow.estimator, dtype=torch.float16, device=DEVICE)
    solver = graphs.GraphSolver(estimator, frames=128)
    for _ in range(2):  # what a batch leaves behind does not matter to the next
        actual = solver.solve(noisy, mu, speaker, cond, lengths, steps)
        assert [tuple(row.shape) for row in actual] == [(length, 80) for length in lengths]
        for row, whole, length in zip(actual, expected, lengths, strict=True):
            assert whole[:length].std() > 0.5
            assert (row - whole[:length]).abs().max() < 0.02
            assert (row - whole[:length]).abs().mean() < 0.002
        (alone,) = solver.solve(noisy[1:2], mu[1:2], speaker[1:2], cond[1:2], lengths[1:2], steps)
        assert (alone - actual[1]).abs().max() < 0.01


@needs_triton
@torch.inference_mode()
@pytest.mark.parametrize("frames", [640, 1024, 2048, 4096])
@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024])
def test_every_tiling_computes_the_real_widths(frames, shared_memory, monkeypatch):
    """Of upstream's stages the first and the last, a block each, as wide as there; few of a graph's rows are in use."""
    from chatterbox_vllm.vocoder.cuda import graphs
    from chatterbox_vllm.vocoder.cuda.estimator import PackedEstimator

    if not ON_CARD:
        without_card(monkeypatch)
    monkeypatch.setattr(graphs, "SMALLEST", frames)
    torch.manual_seed(0)
    sizes = EstimatorSizes(inputs=320, outputs=80, width=256, heads=8, feed_forward=1024, blocks=1, mid_stages=0)
    flow, lengths = built().flow, [130, 3]
    flow.decoder["estimator"] = Estimator(sizes)
    noisy, mu, cond = torch.randn(3, 2, 130, 80).to(DEVICE)
    given = (noisy, mu, torch.randn(2, 80).to(DEVICE), cond)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = flow.to(DEVICE).solve(*given, row_mask(lengths, DEVICE), 1)
    estimator = PackedEstimator(flow.cpu().estimator, dtype=torch.float16, device=DEVICE)
    solver = graphs.GraphSolver(estimator, frames=frames)
    solver._shared_memory = shared_memory
    for row, start, end in zip(solver.solve(*given, lengths, 1), noisy, expected, strict=True):
        assert (end - start).std() > 0.1
        assert (row - end[: len(row)]).abs().max() < 0.01


@needs_triton
@torch.inference_mode()
def test_room_that_was_not_to_be_had_is_made_later(monkeypatch):
    from chatterbox_vllm.vocoder.cuda import graphs
    from chatterbox_vllm.vocoder.cuda.estimator import PackedEstimator

    if not ON_CARD:
        without_card(monkeypatch)
    estimator = PackedEstimator(built().flow.estimator, dtype=torch.float16, device=DEVICE)
    solver = graphs.GraphSolver(estimator, frames=128)

    def solved(frames: int) -> torch.Tensor:
        given, speaker = torch.zeros(1, frames, 80, device=DEVICE), torch.zeros(1, 80, device=DEVICE)
        (row,) = solver.solve(given, given, speaker, given, [frames], 1)
        return row

    with monkeypatch.context() as short:
        short.setattr(estimator, "room", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            solved(700)
    assert solved(40).isfinite().all()


def out_of_memory(rows: int) -> None:
    raise torch.OutOfMemoryError("no room")


@needs_triton
def test_a_graph_serves_every_batch_that_it_has_room_for():
    from chatterbox_vllm.vocoder.cuda.graphs import _size_for

    sizes = {_size_for(frames, utterances=1) for frames in range(1, 8193)}
    assert sizes == {640, 1024, 2048, 4096, 8192}
    assert all(rows % 128 == 0 for rows in sizes)  # the largest tile's
    assert [_size_for(*batch) for batch in ((640, 1), (641, 1), (100, 66), (100, 67))] == [640, 1024, 640, 1024]


@needs_triton
def test_the_gelu_is_the_exact_one():
    from chatterbox_vllm.vocoder.cuda import kernels

    x = (torch.arange(-512, 512).view(16, 64) / 64).to(DEVICE)  # tensor cores' products of these with 1 are exact
    out, used = torch.empty_like(x), torch.tensor([16], dtype=torch.int32, device=DEVICE)
    sizes = {"INPUTS": 16, "OUTPUTS": 64, "ROWS": 16, "COLUMNS": 64, "DEPTH": 16}
    eye, bias = torch.eye(16, device=DEVICE), torch.zeros(64, device=DEVICE)
    kernels.matmul[(1, 1)](eye, x, bias, out, used, GELU=True, OVERLAP=False, **sizes)
    assert (out - torch.nn.functional.gelu(x)).abs().max() < 4e-6


def without_card(monkeypatch):
    """Has what is needed of a card computed by the interpreter."""
    from chatterbox_vllm.vocoder.cuda import backend, graphs

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=99 * 1024)
    )
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    for module in (backend, graphs):
        monkeypatch.setattr(module, "to_device", lambda tensor, _: tensor)
    monkeypatch.setattr(backend, "pinned", lambda tensor, _: tensor)
    monkeypatch.setattr(backend, "Captured", Called)
    monkeypatch.setattr(graphs.GraphSolver, "_captured", played)
    monkeypatch.setattr(graphs, "SMALLEST", 128)


def played(solver, size):
    """A graph without a card: computes when it is replayed."""
    return SimpleNamespace(replay=lambda: solver._launch(size))


@needs_triton
@pytest.mark.parametrize("method", ["bnb-4bit", "bnb-8bit"])
@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_decoded_to_the_bit(method, transposed):
    """Among them one with scales that are not a whole number of outer blocks, and some side by side."""
    from chatterbox_vllm.vocoder.cuda.dequantize import Scratch

    generator = torch.Generator().manual_seed(0)
    sizes = [[(64, 128), (128, 128)], [(192, 64)], [(64, 320)]]
    weights = [[torch.randn(size, generator=generator) for size in place] for place in sizes]
    places = [[quantized(weight, method) for weight in place] for place in weights]
    # The interpreter cuts bfloat16's lower half off.
    for dtype in (torch.float16, torch.bfloat16 if ON_CARD else torch.float32):
        scratch = Scratch(60_000, dtype=dtype, device=DEVICE)
        scratch.memory.fill_(torch.nan)
        group = scratch.group(places, transposed=transposed)
        group.decode(overlap=False)
        for place, actual in zip(places, group.matrices, strict=True):
            expected = torch.cat([matrix.to(DEVICE).dequantize(dtype) for matrix in place])
            assert torch.equal(actual, expected.T if transposed else expected)


@needs_triton
@torch.inference_mode()
@pytest.mark.parametrize("method", ["bnb-4bit", "int8"])
def test_a_quantised_flow_is_one_with_the_decoded_weights(method, monkeypatch):
    from chatterbox_vllm.vocoder.cuda import backend

    if not ON_CARD:
        without_card(monkeypatch)
    packed = built()
    weights.quantize(packed, {"flow_encoder": method, "estimator": method})
    plain = built()
    for of_packed, of_plain in zip(packed.modules(), plain.modules(), strict=True):
        if isinstance(of_packed, QuantizedLinear):
            of_plain.weight.copy_(of_packed.matrix.dequantize(torch.float32))
    assert backend.PackedEstimator.fits(packed.flow.estimator)
    assert backend.Scratch.fits(list(matrices_of(packed.flow)))
    options = {"device": DEVICE, "dtype": torch.float16, "frames": 128, "frugal": False}
    quantised, reference = backend.CudaBackend(packed, **options), backend.CudaBackend(plain, **options)
    tokens = [torch.arange(20), torch.arange(9)]
    mu = reference.mu(tokens)
    assert torch.equal(quantised.mu(tokens), mu)
    lengths, shape = [40, 18], (2, 40, 80)
    noisy, cond = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    given = (noisy, mu[:, :40], cond[:, 0], cond, lengths, 1)
    for actual, expected in zip(quantised.solve(*given), reference.solve(*given), strict=True):
        assert torch.equal(actual, expected)
    now, before = quantised.footprint, reference.footprint
    for name in ("flow_encoder", "estimator"):
        assert now.before[name] == pytest.approx(before.weights[name], rel=0.005)
        assert now.weights[name] < before.weights[name]
    assert now.weights["scratch"] > before.weights["scratch"] == 0


@needs_triton
@torch.inference_mode()
def test_batches_go_through_the_encoder_in_the_sizes_of_its_graphs(networks, monkeypatch):
    """Rows and tokens that only fill a graph's size change nothing, and few sizes serve all batches."""
    from chatterbox_vllm.vocoder.cuda import backend

    if not ON_CARD:
        without_card(monkeypatch)
    options = {"device": DEVICE, "dtype": torch.float16, "frames": 512}
    captured = backend.CudaBackend(built(), frugal=False, **options)
    launched = backend.CudaBackend(built(), frugal=True, **options)
    for lengths in ([60, 9, 33], [40, 64, 1, 12], [64] * 6):
        tokens = [torch.randint(0, 6561, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
        for mu, expected, length in zip(captured.mu(tokens), launched.mu(tokens), lengths, strict=True):
            assert (mu[: 2 * length] - expected[: 2 * length]).abs().mean() < 0.01 * expected[: 2 * length].abs().mean()
    assert set(captured._captured) == {(4, 64)}  # six rows would be eight, for which there is no room
    assert not launched._captured


def stretch(lengths: list[int], waves: int) -> Stretch:
    generator = torch.Generator().manual_seed(2)
    count, longest = len(lengths), max(lengths)
    return Stretch(
        mel=(torch.randn(count, longest, 80, generator=generator).cumsum(1) * 0.2 - 4.0).to(DEVICE),
        frames=lengths,
        anchor=torch.tensor([0, 5, 2][:count], device=DEVICE),
        cycles=100 * torch.rand(count, waves, dtype=torch.float64, generator=generator).to(DEVICE),
        offsets=torch.rand(count, waves, generator=generator).to(DEVICE),
        keys=torch.tensor([noise.key(seed, Stream.SOURCE) for seed in range(count)], device=DEVICE),
        first=torch.tensor([0, 4800, 960][:count], device=DEVICE),
    )


@needs_triton
@torch.inference_mode()
def test_hift_agrees_for_packed_utterances(networks, monkeypatch):
    from chatterbox_vllm.vocoder.cuda import hift

    if not ON_CARD:
        monkeypatch.setattr(hift, "Captured", Called)
    network = networks.mel2wav
    fused = hift.FusedHift(built().mel2wav, device=DEVICE, pool=None)
    for lengths in ([9, 17, 12], [6, 11]):  # what a batch leaves behind does not matter to the next
        given = stretch(lengths, network.m_source.waves)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            expected, turned = network(given)
        samples, cycles = fused(given)
        for row, length in enumerate(lengths):
            assert samples[row].shape == (480 * length,)
            assert expected[row, : 480 * length].std() > 0.01
            assert (samples[row] - expected[row, : 480 * length]).abs().max() < 2e-3
            assert (cycles[row] - turned[row, :, : length + 1]).abs().max() < 1e-2


@needs_triton
@torch.inference_mode()
def test_an_utterance_that_is_damaged_keeps_it_to_itself(networks, monkeypatch):
    """Some of its frames or all are no numbers, or so large that their sums are none."""
    from chatterbox_vllm.vocoder.cuda import hift

    if not ON_CARD:
        monkeypatch.setattr(hift, "Captured", Called)
    fused = hift.FusedHift(built().mel2wav, device=DEVICE, pool=None)
    given = stretch([9, 17, 12], networks.mel2wav.m_source.waves)
    expected = [samples.clone() for samples in fused(given)[0]]
    whole = given.mel[1].clone()
    for frames, value in ((slice(4, 5), torch.nan), (slice(0, 17), torch.nan), (slice(0, 17), 1e30)):
        given.mel[1] = whole
        given.mel[1, frames] = value
        first, damaged, last = (samples.clone() for samples in fused(given)[0])
        assert damaged.isnan().any() or value == 1e30
        for actual, sound in ((first, expected[0]), (last, expected[2])):
            assert (actual - sound).abs().max() < 1e-5


@needs_triton
@torch.inference_mode()
def test_noise_is_the_same_on_a_card(networks, monkeypatch):
    from chatterbox_vllm.vocoder.cuda import hift_kernels

    keys = torch.tensor([noise.key(seed, Stream.MEL) for seed in (3, 4)], device=DEVICE)
    first = torch.tensor([0, 1000], device=DEVICE)
    out = torch.empty(2, 21, 9, device=DEVICE)
    hift_kernels.normals[(2, 2)](keys, first, out, 21, LANES=5, CHANNELS=9, PADDED=8, ROWS=16)
    assert (out - noise.normals(keys, first, 21, 9).transpose(1, 2)).abs().max() < 1e-5


def test_tiles_fit_a_multiprocessor():
    large = Tile(rows=128, columns=128, depth=64, warps=8, stages=3)
    assert large.within(227 * 1024) == large
    assert large.within(99 * 1024).stages == 2
    assert large.fitting(columns=320, depth=80) == Tile(rows=128, columns=64, depth=16, warps=8, stages=3)
    for rows in (1024, 2048, 4096, 65_536):
        for memory in (64 * 1024, 99 * 1024, 227 * 1024):
            products = vars(Tiling.of(rows, width=256, shared_memory=memory))
            queries = products.pop("attention")
            assert 2 * queries.depth * (queries.rows + 2 * queries.stages * queries.columns) <= memory
            for tile in products.values():
                assert 2 * tile.stages * (tile.rows + tile.columns) * tile.depth <= memory
