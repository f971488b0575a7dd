"""From s3gen's tensors, of any size, to the two networks that speak.

Mirrors the loading of ``chatterbox.models.s3gen.S3Gen``. Every size is read off the tensors' shapes, so a small
checkpoint loads like a real one, and every key must be one that is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from chatterbox_vllm.checkpoint import load_strict, load_tensors
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.quantization.matrices import QuantizedLinear, quantize_linears
from chatterbox_vllm.vocoder.encoder import EncoderSizes
from chatterbox_vllm.vocoder.estimator import HEAD_DIM, EstimatorSizes
from chatterbox_vllm.vocoder.flow import Flow, FlowSizes
from chatterbox_vllm.vocoder.hift import UPSAMPLING, Hift, HiftSizes

_ENROLMENT: Final = ("tokenizer.", "speaker_encoder.")
"""Parts of the file that belong to voice enrolment."""
_NORM: Final = ".parametrizations.weight.original0"
_DIRECTION: Final = ".parametrizations.weight.original1"


class Networks(nn.Module):
    """The parts of S3Gen that make sound, under upstream's names."""

    def __init__(self, flow: FlowSizes, hift: HiftSizes) -> None:
        super().__init__()
        self.flow = Flow(flow)
        self.mel2wav = Hift(hift)


def load(path: Path) -> Networks:
    """Reads s3gen.safetensors or s3gen.pt; the networks are float32 on the CPU.

    Raises:
        CheckpointError: a key is missing, unknown or has a shape that does not fit the others.
    """
    return build(load_tensors(path), path)


def build(tensors: Mapping[str, Tensor], file: Path) -> Networks:
    """``load`` with the file's content at hand; ``file`` is named in errors."""
    own = {key: tensor for key, tensor in tensors.items() if not key.startswith(_ENROLMENT)}
    folded = fold_weight_norm(own)
    shapes = _Shapes(folded, file)
    with torch.device("meta"):
        networks = Networks(_flow_sizes(shapes), _hift_sizes(shapes))
    load_strict(networks, folded, file=file)
    return networks.eval().requires_grad_(False)


def quantizable(networks: Networks) -> dict[str, list[nn.Module]]:
    """Component to the parts whose linear layers can be quantised: conformer and transformer blocks."""
    flow = networks.flow
    return {
        "flow_encoder": [flow.encoder.encoders, flow.encoder.up_encoders],
        "estimator": [stage[1] for stage in flow.estimator.stages],
    }


def quantize(networks: Networks, methods: Mapping[str, str], layer: type[QuantizedLinear] = QuantizedLinear) -> None:
    """Quantises components in place.

    Args:
        networks: float32 on the CPU.
        methods: component to ``none``, ``bnb-4bit``, ``bnb-8bit`` or ``int8``.
        layer: what takes a linear layer's place.

    Raises:
        ConfigurationError, MissingDependency: see ``quantization.matrices.quantized``.
    """
    for name, parts in quantizable(networks).items():
        for part in parts:
            quantize_linears(part, methods[name], layer)


def fold_weight_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiplies norms and directions out, as ``torch.nn.utils.parametrizations.weight_norm`` does in every call.

    Returns:
        All tensors as float32, with ``<layer>.weight`` in place of the parametrised pairs. They are copies: a tensor of
        a file mapped into memory lies at any address, and matrix kernels round differently where it is not aligned.
    """
    plain = {key: tensor.to(torch.float32, copy=True) for key, tensor in tensors.items()}
    for key in [key for key in plain if key.endswith(_DIRECTION)]:
        layer = key.removesuffix(_DIRECTION)
        if layer + _NORM in plain:
            plain[f"{layer}.weight"] = torch._weight_norm(plain.pop(key), plain.pop(layer + _NORM), 0)
    return plain


class _Shapes:
    """Looks shapes up by key, and says which key is missing."""

    def __init__(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        self.tensors = tensors
        self.file = file

    def __call__(self, key: str, rank: int) -> tuple[int, ...]:
        if key not in self.tensors:
            raise CheckpointError(f"{self.file} has no tensor {key}; is it S3Gen's?")
        shape = tuple(self.tensors[key].shape)
        if len(shape) != rank:
            raise CheckpointError(f"{self.file}: {key} has shape {shape}, not {rank} dimensions")
        return shape

    def count(self, prefix: str) -> int:
        """How many different names follow ``prefix``: the length of a list of layers."""
        return len({key[len(prefix) :].partition(".")[0] for key in self.tensors if key.startswith(prefix)})


def _flow_sizes(shapes: _Shapes) -> FlowSizes:
    vocabulary, _ = shapes("flow.input_embedding.weight", 2)
    mels, x_vector = shapes("flow.spk_embed_affine_layer.weight", 2)
    return FlowSizes(vocabulary, x_vector, mels, _encoder_sizes(shapes), _estimator_sizes(shapes))


def _encoder_sizes(shapes: _Shapes) -> EncoderSizes:
    at = "flow.encoder"
    width, inputs = shapes(f"{at}.embed.out.0.weight", 2)
    return EncoderSizes(
        inputs=inputs,
        width=width,
        heads=shapes(f"{at}.encoders.0.self_attn.pos_bias_u", 2)[0],
        feed_forward=shapes(f"{at}.encoders.0.feed_forward.w_1.weight", 2)[0],
        blocks=shapes.count(f"{at}.encoders."),
        up_blocks=shapes.count(f"{at}.up_encoders."),
    )


def _estimator_sizes(shapes: _Shapes) -> EstimatorSizes:
    at = "flow.decoder.estimator"
    outputs, width, _ = shapes(f"{at}.final_proj.weight", 3)
    return EstimatorSizes(
        inputs=shapes(f"{at}.time_mlp.linear_1.weight", 2)[1],
        outputs=outputs,
        width=width,
        heads=shapes(f"{at}.down_blocks.0.1.0.attn1.to_q.weight", 2)[0] // HEAD_DIM,
        feed_forward=shapes(f"{at}.down_blocks.0.1.0.ff.net.0.proj.weight", 2)[0],
        blocks=shapes.count(f"{at}.down_blocks.0.1."),
        mid_stages=shapes.count(f"{at}.mid_blocks."),
    )


def _hift_sizes(shapes: _Shapes) -> HiftSizes:
    at, stages = "mel2wav", range(len(UPSAMPLING))
    width, mels, _ = shapes(f"{at}.conv_pre.weight", 3)
    kernels = shapes.count(f"{at}.resblocks.") // len(UPSAMPLING)
    return HiftSizes(
        mels=mels,
        width=width,
        pitch_width=shapes(f"{at}.f0_predictor.classifier.weight", 2)[1],
        harmonics=shapes(f"{at}.m_source.l_linear.weight", 2)[1] - 1,
        up_kernels=tuple(shapes(f"{at}.ups.{stage}.weight", 3)[2] for stage in stages),
        kernels=tuple(shapes(f"{at}.resblocks.{kernel}.convs1.0.weight", 3)[2] for kernel in range(kernels)),
        source_kernels=tuple(shapes(f"{at}.source_resblocks.{stage}.convs1.0.weight", 3)[2] for stage in stages),
    )
