"""A: "BNB Quantization for Chatterbox TTS", use_bnb_quantization."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chatterbox_vllm import checkpoint
from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.errors import MissingDependency
from chatterbox_vllm.quantization import matrices
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import Policy
from chatterbox_vllm.t3.conversion import encoded, linear_layers
from chatterbox_vllm.t3.folder import infer_config
from tests.memory_support import Headers
from tests.promises.support import ROOT, Started, at_64, corrected, example, policy, weights, without_gpu


def test_a_use_bnb_quantization_is_t3_in_8_bits() -> None:
    assert policy(use_bnb_quantization=True) == Policy(t3="bnb-8bit")
    assert not policy(use_bnb_quantization=False).is_quantized


def test_a_every_linear_layer_of_t3_and_nothing_else(demo: Checkpoint) -> None:
    """The Llama's linear layers become rows of 8 bits; every other tensor, biases among them, stays as it was."""
    tensors, sizes = load_file(demo.t3), infer_config(demo.t3)
    made = encoded(tensors.items(), Stored("bnb-8bit"), sizes)
    stems = {name.removesuffix(".weight_packed") for name in made if name.endswith(".weight_packed")}
    assert stems == linear_layers(sizes).keys()
    assert len(stems) == 7 * sizes.num_hidden_layers
    for stem in stems:
        assert made[f"{stem}.weight_packed"].nbytes == tensors[f"{stem}.weight"].numel()
    kept = tensors.keys() - {f"{stem}.weight" for stem in stems}
    assert all(torch.equal(made[name], tensors[name]) for name in kept)
    assert any(name.endswith("bias") for name in kept)


@without_gpu
@pytest.mark.parametrize(
    ("kind", "weights"), [("ChatterboxTTS", "demo"), ("ChatterboxMultilingualTTS", "multilingual_demo")]
)
def test_a_use_bnb_quantization_is_cuda_only(
    kind: str, weights: str, started: Started, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is said before anything is downloaded."""
    import chatterbox_vllm

    monkeypatch.setattr(checkpoint, "download", lambda *_, **__: pytest.fail("the weights were downloaded"))

    made, folder = getattr(chatterbox_vllm, kind), request.getfixturevalue(weights).folder
    with pytest.raises(ValueError, match="CUDA"):
        made.from_pretrained(device="cuda", use_bnb_quantization=True)
    for device in ("cpu", None):
        with pytest.raises(ValueError, match=r"NVIDIA GPU.*int8"):
            made.from_pretrained(device=device, use_bnb_quantization=True)
        with pytest.raises(ValueError, match=r"NVIDIA GPU.*int8"):
            made.from_local(folder, device, use_bnb_quantization=True)
    with pytest.raises(ValueError, match="mps"):
        made.from_local(folder, "mps", use_bnb_quantization=True)
    assert started.attempts == []


def test_a_without_bitsandbytes_the_command_is_named(demo: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    from chatterbox_vllm.t3 import methods

    monkeypatch.setattr(methods, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(methods, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install 'vllm-bnb-plugin"):
        methods.method_arguments("bnb-4bit", infer_config(demo.t3), {})
    assert methods.method_arguments("bnb-8bit", infer_config(demo.t3), {}) == {}, "needs neither"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install 'bitsandbytes"):
        matrices.quantized(torch.ones(64, 64), "bnb-4bit")


def test_a_inference_only(demo: Checkpoint) -> None:
    from chatterbox_vllm.vocoder.weights import load, quantize

    networks = load(demo.s3gen)
    quantize(networks, {"flow_encoder": "bnb-8bit", "estimator": "bnb-8bit"})
    assert not any(parameter.requires_grad for parameter in networks.parameters())


def test_a_the_example_speaks_with_both_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks for 8 bits, which need no package of bitsandbytes'; what keeps it from having them is its last word."""
    assert "pip install" not in (ROOT / "examples" / "example_tts_quantized.py").read_text(encoding="utf-8")
    from chatterbox_vllm.tts import ChatterboxTTS

    def from_local(name: str, **options: Any) -> Any:
        assert options == {"use_bnb_quantization": True}
        raise MissingDependency("bitsandbytes", purpose="for this", command="pip install it")

    monkeypatch.setattr(ChatterboxTTS, "from_local", from_local)
    with pytest.raises(SystemExit, match="install it with: pip install it"):
        example("example_tts_quantized")(["-o", str(tmp_path)])


def test_a_the_sizes_of_t3(full: Headers) -> None:
    """The guide says 2.4 GB and 1.2 GB."""
    from chatterbox_vllm.quantization_config import QuantizationMemoryEstimator

    assert full.t3.stat().st_size / 1e9 == pytest.approx(2.13, abs=0.005)
    estimate = QuantizationMemoryEstimator(full).estimate(policy(use_bnb_quantization=True))
    assert estimate["t3"].before == 2 * 30 * (4 * 1024**2 + 3 * 1024 * 4096)
    assert estimate["t3"].after / estimate["t3"].before == pytest.approx(0.5, abs=0.002)
    told = corrected("T3 takes 2.4 GB")
    assert f"{weights(full, 'none').at('t3') / 1e9:.2f} GB in 16 bits" in told
    assert f"{estimate.at('t3') / 1e9:.2f} GB in `bnb-8bit`" in told


def test_a_how_much_slower_is_measured() -> None:
    """The guide says 2 to 5%. Of T3's tokens with 64 requests, those of one host."""
    kept = at_64("bnb-8bit", "On host H", 6) / at_64("none", "On host H", 6)
    assert f"`bnb-8bit` keeps {kept:.2f} of the tokens" in corrected("8 bits are 2 to 5% slower")
