"""What the vocoder's tests share: upstream's own networks, small, with random weights, and ours with the same."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributions.uniform import Uniform

from chatterbox_vllm.demo_checkpoint import networks
from chatterbox_vllm.types import SPOKEN_TOKENS, VoiceFeatures
from chatterbox_vllm.vocoder import noise, weights
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.footprint import VocoderFootprint
from chatterbox_vllm.vocoder.noise import Stream
from chatterbox_vllm.vocoder.sounding import Sounding
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.utterance import Chunk, Due, Said, Step, Utterance, open_utterance
from chatterbox_vllm.vocoder.worker import VocoderPool

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
    return Vocoder(weights.build(tensors(), Path("s3gen.safetensors")), **{"exact": True, **options})


@dataclass(frozen=True)
class At(Blueprint):
    """Gives a worker in this process the vocoder at hand, or the error."""

    path: Any = None

    def read(self) -> Any:
        if isinstance(self.path, Exception):
            raise self.path
        return self.path

    def build(self, networks: Any) -> Any:
        return networks


class Order(IntEnum):
    """What the first token of a chunk has the vocoder of ``Scripted`` do."""

    COUNT = 0
    HOLD = 1
    LOSE_DEVICE = 2
    CRASH = 3
    TELL_PID = 4
    LOG = 5
    TELL_KEPT = 6


@dataclass(frozen=True)
class Scripted(Blueprint):
    """Gives a process a vocoder that does as it is told; with a ``path``, other chunks are really spoken.

    Args:
        folder: where two pipes are: "running" is opened when a batch is held, which ends when "gate" is opened.
        starts: starts that succeed; further ones crash.
    """

    path: Any = None
    folder: Path = Path()
    starts: int = 1000

    def read(self) -> Any:
        return self.path and super().read()

    def build(self, networks: Any) -> Any:
        with (self.folder / "starts").open("a+") as file:
            file.write("x")
            if file.tell() > self.starts:
                os._exit(7)
        return _Obedient(self.folder, networks and super().build(networks))


class _Obedient:
    max_frames = 1

    def __init__(self, folder: Path, real: Vocoder | None) -> None:
        self.folder, self.real, self.spoken = folder, real, 0

    def footprint(self) -> VocoderFootprint:
        return VocoderFootprint({"hift": 1}, {"hift": 1}, allocated=2, peak=3 + self.spoken)

    def launch(self, steps: Sequence[Step]) -> Here | Sounding:
        value, order = float(self.spoken), steps[0].tokens[0].item()
        self.spoken += 1
        if order == Order.HOLD:
            (self.folder / "running").open("w").close()
            (self.folder / "gate").open().close()
        elif order == Order.LOSE_DEVICE:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        elif order == Order.CRASH:
            os._exit(3)
        elif order == Order.TELL_PID:
            value = float(os.getpid())
        elif order == Order.TELL_KEPT:
            value = float(gc.get_freeze_count())
        elif order == Order.LOG:
            logging.getLogger("chatterbox_vllm.test").info("%d steps", len(steps))
        elif self.real is not None:
            return self.real.launch(steps)
        return Here([said(step, value) for step in steps])


@dataclass
class Here:
    """A ``Sounding`` that nobody has to wait for."""

    said: list[Said]
    is_here = True

    def wait_for_flow(self) -> None:
        pass

    def arrive(self) -> list[Said]:
        return self.said


class Stub:
    """A vocoder that says how many tokens it got, when it is let."""

    max_frames = 10_000

    def __init__(self) -> None:
        self.batches: list[list[Step]] = []
        self.gate = threading.Event()
        self.fail: set[Utterance] = set()
        self.nonsense: set[Utterance] = set()
        self.error: Exception = torch.OutOfMemoryError("no memory")
        self.running = threading.Event()

    @property
    def sizes(self) -> list[list[int]]:
        return [[len(step.tokens) for step in batch] for batch in self.batches]

    def footprint(self) -> VocoderFootprint:
        return VocoderFootprint({}, {}, peak=len(self.batches))

    def launch(self, steps: Sequence[Step]) -> Here:
        self.batches.append(list(steps))
        self.running.set()
        assert self.gate.wait(10)
        if self.fail & {step.utterance for step in steps}:
            raise self.error
        nonsense = float("nan")
        return Here([said(step, nonsense if step.utterance in self.nonsense else len(step.tokens)) for step in steps])


def told(order: Order, *, due: float = 0.0) -> Chunk:
    """A chunk for a vocoder of ``Scripted``."""
    return Chunk(open_utterance(voice(5), seed=0), torch.tensor([order, 0, 0]), final=True, due=Due(due))


async def held(pool: VocoderPool, folder: Path) -> asyncio.Task[Tensor]:
    """A chunk that a vocoder of ``Scripted`` speaks until the gate is opened."""
    task = asyncio.create_task(pool.submit(told(Order.HOLD)))
    await asyncio.to_thread((folder / "running").read_bytes)
    while pool.waiting:  # noqa: ASYNC110  # what began it is told soon
        await asyncio.sleep(0)
    return task


def said(step: Step, value: float) -> Said:
    """A sound of the right length, all of it ``value``."""
    samples = torch.full((480 * (step.released - step.utterance.released),), value)
    return Said(samples, torch.zeros(step.committed - step.known, 80), torch.zeros(9, dtype=torch.float64))


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


def utterance(steps: int = 10) -> Utterance:
    return Utterance(voice(5), seed=0, diffusion_steps=steps)


def chunk(of: Utterance | None = None, count: int = 5, *, final: bool = True, due: float = 0.0) -> Chunk:
    return Chunk(of or utterance(), speech(count), final=final, due=Due(due))


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
