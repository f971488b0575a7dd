"""The vocoder with a method's weights: as it will run on a GPU, in plain torch on a CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from chatterbox_vllm.bench.vocoder import Job, speak_in_chunks
from chatterbox_vllm.evaluate.methods import quantize
from chatterbox_vllm.quantization.policy import Policy
from chatterbox_vllm.types import SpeechOptions, VoiceFeatures
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.weights import load, quantizable


def quantized_vocoder(path: Path, policy: Policy, device: str = "cpu") -> Vocoder:
    """The vocoder of ``policy``.

    On a CPU everything but a method's rounding is in float32; on a GPU the vocoder is the one that serves, with its
    half precision.

    Raises:
        CheckpointError: the file is not S3Gen's.
    """
    if torch.device(device).type == "cuda":
        blueprint = Blueprint(path, device, flow_encoder=policy.flow_encoder, estimator=policy.estimator)
        return blueprint.build(blueprint.read())
    networks = load(path)
    for component, parts in quantizable(networks).items():
        for part in parts:
            quantize(part, policy.methods[component])
    return Vocoder(networks, exact=True)


def vocode(vocoder: Vocoder, tokens: Tensor, voice: VoiceFeatures, options: SpeechOptions) -> tuple[Tensor, Tensor]:
    """(n,) int64 speech tokens to (960 n,) float32 samples and their (2n, 80) float32 mel."""
    return speak_in_chunks(vocoder, Job(tokens, voice, options.seed or 0, options.diffusion_steps, final=True))
