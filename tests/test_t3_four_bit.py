"""T3's 4-bit layers on Hopper cards.

The kernels run on a card as they are; without one, in Triton's interpreter, which lacks bfloat16: see ``test_kernels``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MacheteLinearKernel, MPLinearLayerConfig
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from chatterbox_vllm.quantization.packing import Stored, round_groups
from chatterbox_vllm.t3 import four_bit
from chatterbox_vllm.t3.four_bit import FEW, TILES, FourBitLinear, Tile
from tests.kernel_support import DEVICE, ON_CARD, needs_triton

DTYPES = [torch.float16, *([torch.bfloat16] if ON_CARD else [])]
MULTIPROCESSORS = 132
MATRICES = {"qkv": (3072, 1024), "o": (1024, 1024), "gate_up": (8192, 1024), "down": (1024, 4096)}


def config(inputs: int, outputs: int, dtype: torch.dtype, group_size: int = 128, **more: Any) -> MPLinearLayerConfig:
    kinds = {"weight_type": scalar_types.uint4, "zero_points": True} | more
    return MPLinearLayerConfig((inputs, outputs), (inputs, outputs), act_type=dtype, group_size=group_size, **kinds)


class Layer(nn.Module):
    """A checkpoint's matrix as vLLM loads it, and what it stands for."""

    def __init__(self, outputs: int, inputs: int, group_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(outputs + inputs)
        weight = torch.randn(outputs, inputs, generator=draw) / inputs**0.5
        weight += torch.randn(outputs, 1, generator=draw) / inputs**0.5  # or most codes that mean 0 are near the middle
        rounded = round_groups(weight, group_size)
        scale = rounded.scale.to(dtype)
        self.whole = rounded._replace(scale=scale.float()).decoded().to(dtype)
        stored = Stored("awq", group_size).encode("", weight)

        tensors = {"weight_packed": stored[".weight_packed"], "weight_scale": scale}
        tensors["weight_zero_point"] = stored[".weight_zero_point"]
        packed = {"weight_packed": {"packed_dim": 1}, "weight_zero_point": {"packed_dim": 0}}
        for name, tensor in tensors.items():
            parameter = nn.Parameter(tensor.to(DEVICE), requires_grad=False)
            for dimension, value in {"input_dim": 1, "output_dim": 0, **packed.get(name, {})}.items():
                setattr(parameter, dimension, value)
            self.register_parameter(name, parameter)
        self.kernel = FourBitLinear(config(inputs, outputs, dtype, group_size), *tensors)
        self.kernel.process_weights_after_loading(self)

    def wanted(self, x: Tensor) -> Tensor:
        return x.double() @ self.whole.to(x.device).double().T


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [128, 64, 32])
@pytest.mark.parametrize("rows", [1, 2, 17, 33, 200, FEW + 1])
def test_a_product(dtype: torch.dtype, group_size: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "num_compute_units", lambda: 4)
    layer = Layer(128, 512, group_size, dtype)
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
    product = layer.kernel.apply_weights(layer, x)
    assert product.dtype == dtype
    torch.testing.assert_close(product.double(), layer.wanted(x), atol=2e-3, rtol=8e-3)
    bias = torch.arange(128.0).to(DEVICE, dtype)
    assert torch.equal(layer.kernel.apply_weights(layer, x, bias), product + bias)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 64, 150])
def test_a_product_whose_sums_are_shared_out(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(four_bit, "num_compute_units", lambda: MULTIPROCESSORS)
    assert Tile.of(rows, 64, 2048, MULTIPROCESSORS).splits == 2
    layer = Layer(64, 2048, 128, dtype)
    x = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
    product = layer.kernel.apply_weights(layer, x[None])
    assert product.shape == (1, rows, 64)
    torch.testing.assert_close(product[0].double(), layer.wanted(x), atol=2e-3, rtol=8e-3)
    assert torch.equal(layer.kernel.apply_weights(layer, x[None]), product), "a sum has one order"


@needs_triton
def test_a_weight_is_the_checkpoints_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once, as what it stands for; also where it is widened first."""
    monkeypatch.setattr(four_bit, "num_compute_units", lambda: 4)
    for dtype in DTYPES:
        layer = Layer(64, 256, 64, dtype)
        for rows in (256, 512):
            identity = torch.eye(rows, 256).to(DEVICE, dtype)
            assert torch.equal(layer.kernel.apply_weights(layer, identity)[:256].T.cpu(), layer.whole)


def test_a_layer_keeps_nothing_twice() -> None:
    layer = Layer(128, 512, 128, torch.bfloat16)
    held = {name: (tuple(each.shape), each.dtype) for name, each in layer.named_parameters()}
    assert held == {"weight_packed": ((128, 128), torch.int16), "weight_scale": ((4, 128), torch.int32)}


def test_every_step_is_cut_into_programs_that_busy_the_card() -> None:
    """And as measured on an H200: the fastest for 128 rows."""
    fastest = {"qkv": (64, 64, 1), "o": (64, 16, 1), "gate_up": (128, 64, 1), "down": (64, 64, 4)}
    for name, (outputs, inputs) in MATRICES.items():
        assert Tile.of(128, outputs, inputs, MULTIPROCESSORS) == (*fastest[name], 3)
        for rows in range(1, FEW + 1):
            tile = Tile.of(rows, outputs, inputs, MULTIPROCESSORS)
            programs = outputs // tile.outputs * -(-rows // tile.rows) * tile.splits
            assert programs >= four_bit.BUSY * MULTIPROCESSORS or (tile.outputs, tile.rows) == TILES[-1]
            assert rows > tile.rows // 2 or tile.rows == TILES[-1][1], "no more rows idle than busy"
            assert inputs % (256 * tile.splits) == 0
    assert Tile.of(2, 64 * 3, 1024, 1).outputs == 64, "192 are not a multiple of 128"
    assert Tile.of(2, 64, 3 * 1024, MULTIPROCESSORS).splits == 1, "no share would be left out"


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (config(1024, 3072, torch.bfloat16), None),
        (config(1024, 3072, torch.float16, 32), None),
        (config(1024, 3072, torch.float32), "bfloat16 and float16"),
        (config(1024, 3072, torch.bfloat16, -1), "in groups of 32, 64 or 128"),
        (config(1024, 3072, torch.bfloat16, zero_points=False), "zero points"),
        (config(1024, 3072, torch.bfloat16, weight_type=scalar_types.uint8), "4 bits"),
        (config(128, 3072, torch.bfloat16), "cannot cut a matrix of 3072 x 128"),
        (config(1024, 96, torch.bfloat16), "cannot cut a matrix of 96 x 1024"),
    ],
)
def test_layers_that_are_left_to_vllm(layer: MPLinearLayerConfig, why: str | None) -> None:
    can, reason = FourBitLinear.can_implement(layer)
    assert can == (why is None)
    assert why is None or (reason is not None and why in reason)


@pytest.mark.parametrize(("card", "is_first"), [(90, True), (89, False), (100, False), (None, False)])
def test_vllm_tries_it_first_on_hopper(card: int | None, is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def platform(name: str, answer: Callable[..., bool]) -> None:
        monkeypatch.setattr(four_bit.current_platform, name, answer)

    kernels: list[type] = [MacheteLinearKernel]
    monkeypatch.setitem(linear._POSSIBLE_KERNELS, PlatformEnum.CUDA, kernels)
    platform("is_cuda", lambda: card is not None)
    platform("is_device_capability", lambda capability: capability == card)
    for _ in range(2):  # models of one process
        four_bit.offer()
    assert kernels == ([FourBitLinear, MacheteLinearKernel] if is_first else [MacheteLinearKernel])
