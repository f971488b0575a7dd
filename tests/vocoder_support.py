"""What the vocoder's tests share: upstream's own networks, small, with random weights, and ours with the same."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributions.uniform import Uniform

from chatterbox_vllm.demo_checkpoint import networks
from chatterbox_vllm.types import SPOKEN_TOKENS, VoiceFeatures
from chatterbox_vllm.vocoder import noise, weights
from chatterbox_vllm.vocoder.noise import Stream
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk, Utterance

OWN = ("flow.", "mel2wav.")


@cache
def upstream() -> nn.Module:
    """Upstream's S3Gen, every weight far from what an initialisation would leave it at."""
    network = networks.s3gen("tiny")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if name.startswith(OWN):
            parameter.data.copy_(_draw(name, parameter.shape, generator))
    return network


def tensors() -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in upstream().state_dict().items() if key.startswith(OWN)}


def vocoder(**options) -> Vocoder:
    return Vocoder(weights.build(tensors(), Path("s3gen.safetensors")), **options)


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Activations of about unit variance, an audible waveform, and a pitch that crosses the voicing threshold."""
    values = torch.randn(shape, generator=generator)
    if name.endswith("original0"):
        loud = {"conv_pre": 0.2, "condnet.0.": 0.2, "conv_post": 0.5}
        return (1 + 0.05 * values).abs() * next((gain for part, gain in loud.items() if part in name), 1.0)
    if name.endswith("alpha"):
        return 0.5 + values.abs()
    if "conv_post.bias" in name:
        return 0.1 * values - torch.cat([torch.full((9,), 2.5), torch.zeros(9)])
    if "classifier" in name:
        return torch.full(shape, 100.0) if name.endswith("bias") else values * (400 / math.sqrt(shape[1]))
    if "input_embedding" in name:
        return values
    if len(shape) == 1:
        return 0.05 * values + name.endswith("weight") - 4.0 * name.endswith("final_proj.bias")
    return values / math.sqrt(shape[1:].numel())


def voice(tokens: int = 25, *, seed: int = 0, odd_frame: bool = False) -> VoiceFeatures:
    generator = torch.Generator().manual_seed(seed)
    return VoiceFeatures(
        speaker_embedding=torch.zeros(256),
        t3_prompt_tokens=torch.zeros(0, dtype=torch.int64),
        prompt_tokens=torch.randint(0, SPOKEN_TOKENS, (tokens,), generator=generator),
        prompt_mel=torch.randn(2 * tokens + odd_frame, 80, generator=generator).cumsum(0) * 0.2 - 4.0,
        x_vector=torch.randn(192, generator=generator),
    )


def speech(count: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, SPOKEN_TOKENS, (count,), generator=torch.Generator().manual_seed(1000 + seed))


def whole(own: Vocoder, tokens: Tensor, of: VoiceFeatures, *, seed: int, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Our mel (2n, 80) and samples (960 n,)."""
    utterance = own.open(of, seed=seed, diffusion_steps=steps)
    samples = own.advance([Chunk(utterance, tokens, final=True)])[0]
    assert utterance.mel is not None
    return utterance.mel, samples


def streamed(own: Vocoder, utterance: Utterance, tokens: Tensor, sizes: list[int]) -> list[Tensor]:
    """What each chunk of a stream gives; what ``sizes`` leave over is the final one."""
    *chunks, last = tokens.split([*sizes, len(tokens) - sum(sizes)])
    sounds = [own.advance([Chunk(utterance, chunk, final=False)])[0] for chunk in chunks]
    return [*sounds, own.advance([Chunk(utterance, last, final=True)])[0]]


@torch.inference_mode()
def upstream_whole(tokens: Tensor, of: VoiceFeatures, *, seed: int, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Upstream's mel and samples, with the noise that ours has for ``seed``."""
    reference = {
        "prompt_token": of.prompt_tokens[None],
        "prompt_token_len": torch.tensor([len(of.prompt_tokens)]),
        "prompt_feat": of.prompt_mel[None],
        "prompt_feat_len": None,
        "embedding": of.x_vector[None],
    }
    with our_noise(seed):
        mel = upstream().flow_inference(tokens[None], ref_dict=reference, finalize=True, n_cfm_timesteps=steps)
    with our_noise(seed):
        samples, _ = upstream().hift_inference(mel, None)
    samples[:, :960] *= upstream().trim_fade
    return mel[0].T, samples[0]


@contextmanager
def our_noise(seed: int) -> Iterator[None]:
    """Has upstream's draws answered with the noise of one of our requests."""

    def keys(stream: Stream) -> Tensor:
        return torch.tensor([noise.key(seed, stream)])

    def randn_like(like: Tensor) -> Tensor:
        if like.shape[1] == 1:
            return torch.zeros_like(like)  # drawn by upstream, and not used
        stream = Stream.MEL if like.shape[1] == 80 else Stream.SOURCE
        return noise.normals(keys(stream), torch.zeros(1, dtype=torch.int64), like.shape[2], like.shape[1])

    def sample(_: Uniform, sample_shape: tuple[int, ...]) -> Tensor:
        return noise.phases(keys(Stream.PHASE), sample_shape[1] - 1)[..., None]

    with patch.object(torch, "randn_like", randn_like), patch.object(Uniform, "sample", sample):
        yield
