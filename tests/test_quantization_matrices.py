"""Matrices in few bits are bitsandbytes' own."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from chatterbox_vllm.errors import ConfigurationError, MissingDependency
from chatterbox_vllm.quantization.matrices import QuantizedLinear, matrices_of, quantize_linears, quantized

# Importing bitsandbytes imports parts of torch that warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def weight(outputs: int = 96, inputs: int = 256) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@needs_bitsandbytes
def test_four_bits_are_bitsandbytes_own():
    from bitsandbytes import functional

    given = weight()
    matrix = quantized(given, "bnb-4bit")
    codes, state = functional.quantize_4bit(given, blocksize=64, quant_type="nf4", compress_statistics=True)
    assert torch.equal(matrix.codes, codes.flatten())
    assert torch.equal(matrix.dequantize(torch.float32), functional.dequantize_4bit(codes, state))
    assert 8 * matrix.nbytes / given.numel() < 4.14
    assert 0.08 < error(matrix.dequantize(torch.float32), given) < 0.1


@needs_bitsandbytes
def test_four_bits_of_any_multiple_of_a_block():
    """bitsandbytes' decoding on a CPU takes other rows' scales where a row is no whole number of blocks."""
    given = weight(256, 80)
    assert error(quantized(given, "bnb-4bit").dequantize(torch.float32), given) < 0.1


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["bnb-8bit", "int8"])
def test_eight_bits_are_bitsandbytes_own(method):
    from bitsandbytes import functional

    given = weight()
    given[3] = 0.0
    matrix = quantized(given, method)
    codes, scales, _ = functional.int8_vectorwise_quant(given.clone())
    assert torch.equal(matrix.codes, codes)
    assert torch.equal(matrix.scales, scales)
    assert torch.equal(matrix.dequantize(torch.float32), functional.int8_vectorwise_dequant(codes, scales))
    assert matrix.nbytes == given.numel() + 4 * len(given)
    assert error(matrix.dequantize(torch.float32), given) < 0.01


def test_four_bits_without_bitsandbytes_name_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependency, match=r"pip install 'bitsandbytes"):
        quantized(weight(), "bnb-4bit")


def test_an_unknown_method_is_refused():
    with pytest.raises(ConfigurationError, match=r"'awq'.*bnb-4bit, bnb-8bit or int8"):
        quantized(weight(), "awq")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ModuleDict({"0": nn.Linear(128, 64, bias=False)}))


def test_every_linear_layer_is_replaced():
    module = network()
    quantize_linears(module, "int8")
    assert sum(matrix.nbytes for matrix in matrices_of(module)) == 2 * 64 * 128 + 4 * (128 + 64)
    assert not [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    quantize_linears(untouched := network(), "none")
    assert not list(matrices_of(untouched))


def test_a_failure_changes_nothing():
    module = network()
    with pytest.raises(ConfigurationError):
        quantize_linears(module, "fp8")
    assert not list(matrices_of(module))


def test_a_layer_keeps_its_scales_when_its_module_changes_dtype():
    plain = nn.Linear(64, 128)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = plain(x)
        layer = QuantizedLinear(quantized(plain.weight, "int8"), plain.bias).to(torch.bfloat16)
        assert error(layer(x.to(torch.bfloat16)).float(), expected) < 0.02
    assert (layer.matrix.scales.dtype, layer.bias.dtype) == (torch.float32, torch.bfloat16)
    assert layer.to("meta").matrix.codes.is_meta
