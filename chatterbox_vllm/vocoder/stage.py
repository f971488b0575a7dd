"""The vocoder stage: speech tokens, a voice and a seed become samples, in batches, whole or chunk by chunk.

Does the work of ``chatterbox.models.s3gen.S3Token2Wav.inference``. An utterance's sound depends on its tokens, voice,
seed and steps, and, as far as the flow cannot be exact in a stream (see ``utterance``), on where its chunks end; never
on what else is in the batch.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.types import SAMPLE_RATE, SpeechOptions, VoiceFeatures
from chatterbox_vllm.vocoder import noise
from chatterbox_vllm.vocoder.batching import is_ragged, packed, padded, row_mask
from chatterbox_vllm.vocoder.edges import Edges
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.hift import Stretch
from chatterbox_vllm.vocoder.noise import Stream
from chatterbox_vllm.vocoder.prompts import MELS, Prompts, check_voice
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES
from chatterbox_vllm.vocoder.utterance import Chunk, Step, Utterance, plan
from chatterbox_vllm.vocoder.weights import Networks, load

MAX_FRAMES: Final = 16_384
"""The most mel frames in one batch on a GPU; about 8 GB of activations at the real sizes."""
FEWEST_FRAMES: Final = 2_048
"""What a GPU without memory to spare is asked for all the same; a batch that does not fit is split."""
FRAME_BYTES: Final = 2**19
"""Of activations for one mel frame, at the real sizes."""
_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Said:
    """What a step gives: the samples it releases, on the CPU, and what ``Step.settle`` takes."""

    samples: Tensor
    mel: Tensor
    cycles: Tensor


class Vocoder:
    """S3Gen without its enrolment parts.

    ``open`` may be called from any thread; ``advance`` and ``synthesize`` belong to one thread at a time.

    Args:
        networks: see ``weights.load``; they move to ``device``.
        device: where they run. It must know float64, in which phases are summed.
        dtype: of the estimator; everything else stays float32.
        max_frames: the most mel frames, recordings and padding included, that run at once; bounds the memory. A single
            utterance always runs. None is what half of a GPU's free memory holds, ``MAX_FRAMES`` at most; but on a CPU,
            where a batch is hardly faster, each utterance alone: matrix kernels round differently for different shapes,
            and so every sound has upstream's very bits.
    """

    sample_rate: Final = SAMPLE_RATE

    def __init__(
        self,
        networks: Networks,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_frames: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.flow = networks.flow.to(self.device)
        self.flow.decoder.to(dtype)
        self.hift = networks.mel2wav.to(self.device)
        self._fade = fade_in().to(self.device)
        self._prompts = Prompts(self.flow, self.device)
        self.max_frames = max_frames or frames_at_once(self.device)  # now that the weights have their memory

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_frames: int | None = None,
    ) -> Vocoder:
        """Loads s3gen.safetensors or s3gen.pt, of any size.

        Raises:
            CheckpointError: a key is missing, unknown or misshapen.
        """
        return cls(load(path), device=device, dtype=dtype, max_frames=max_frames)

    def open(self, voice: VoiceFeatures, *, seed: int, diffusion_steps: int = 10) -> Utterance:
        """Starts an utterance. It holds nothing that would need closing.

        Raises:
            InvalidRequest: ``voice`` does not fit, or ``diffusion_steps`` is out of range; ``param`` says which.
        """
        check_voice(voice)
        SpeechOptions(seed=seed, diffusion_steps=diffusion_steps)  # knows their ranges
        return Utterance(voice, seed, diffusion_steps)

    def synthesize(self, tokens: Tensor, voice: VoiceFeatures, *, seed: int, diffusion_steps: int = 10) -> Tensor:
        """A whole utterance: (n,) int64 tokens to (960 n,) float32 samples on the CPU.

        Raises:
            InvalidRequest: an argument does not fit; ``param`` says which.
        """
        utterance = self.open(voice, seed=seed, diffusion_steps=diffusion_steps)
        return self.advance([Chunk(utterance, tokens, final=True)])[0]

    def advance(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Takes chunks of different utterances and says what can be said.

        A batch for which the memory does not suffice is split, down to single utterances.

        Returns:
            For each chunk the (n,) float32 samples on the CPU that follow those returned before; n is 0 where too few
            tokens are in to settle anything. A final chunk brings the total to 960 samples a token.

        Raises:
            ValueError: two chunks are of one utterance, or one came after its final chunk.
            torch.OutOfMemoryError: for one utterance alone. As after every error, no utterance has changed.
        """
        if len({chunk.utterance for chunk in chunks}) < len(chunks):
            raise ValueError("a batch holds two chunks of one utterance")
        steps = [plan(chunk) for chunk in chunks]
        said: dict[Step, _Said] = {}
        with torch.inference_mode():
            for batch in self._batches(steps):
                said.update(zip(batch, self._speak_within_memory(batch), strict=True))
            for step, each in said.items():
                step.settle(each.mel, each.cycles)
        for step in steps:
            step.take()
        # Copied, so that each owns its memory and may be changed outside of inference mode.
        return [said[step].samples.clone() if step in said else torch.empty(0) for step in steps]

    def _batches(self, steps: list[Step]) -> list[list[Step]]:
        """Steps that can run together: as many diffusion steps, and no more frames than fit."""
        alike: defaultdict[int, list[Step]] = defaultdict(list)
        for step in steps:
            if not step.is_idle:
                alike[step.utterance.diffusion_steps].append(step)
        return [batch for group in alike.values() for batch in packed(group, self._flow_frames, self.max_frames)]

    def _flow_frames(self, step: Step) -> int:
        return len(self._prompts[step.utterance.voice].mel) + FRAMES_PER_TOKEN * len(step.tokens)

    def _speak_within_memory(self, batch: list[Step]) -> list[_Said]:
        try:
            return self._speak(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            _log.warning("no memory for a batch of %d utterances; trying its halves", len(batch))
        # Past the except clause, whose error kept the failed attempt's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._speak_within_memory(batch[:half]) + self._speak_within_memory(batch[half:])

    def _speak(self, batch: list[Step]) -> list[_Said]:
        mels = [step.joined(mel) for step, mel in zip(batch, self._flow(batch), strict=True)]
        samples, cycles = self.hift(self._stretch(batch, mels))
        news = [self._released(step, row) for step, row in zip(batch, samples, strict=True)]
        sounds = torch.cat(news).cpu().split([len(new) for new in news])
        return [_Said(*each) for each in zip(sounds, mels, cycles, strict=True)]

    def _flow(self, batch: list[Step]) -> list[Tensor]:
        """(frames, 80) mel for each step, from everything said so far."""
        prompts = [self._prompts[step.utterance.voice] for step in batch]
        tokens = [torch.cat([prompt.tokens, step.tokens]) for prompt, step in zip(prompts, batch, strict=True)]
        starts = [len(prompt.mel) for prompt in prompts]
        ends = [start + step.frames for start, step in zip(starts, batch, strict=True)]
        mu = self.flow.mu(padded(tokens).to(self.device), row_mask([len(row) for row in tokens], self.device))
        cond = torch.zeros(len(batch), max(ends), MELS, device=self.device)
        for row, prompt in zip(cond, prompts, strict=True):
            row[: len(prompt.mel)] = prompt.mel
        mel = self.flow.solve(
            self._normals(batch, Stream.MEL, [0] * len(batch), max(ends), MELS).transpose(1, 2),
            mu[:, : max(ends)],
            torch.stack([prompt.speaker for prompt in prompts]),
            cond,
            row_mask(ends, self.device),
            batch[0].utterance.diffusion_steps,
        )
        return [row[start:end] for row, start, end in zip(mel, starts, ends, strict=True)]

    def _stretch(self, batch: list[Step], mels: list[Tensor]) -> Stretch:
        """What HiFT needs to go on from where each utterance is."""
        utterances = [step.utterance for step in batch]
        rows = [mel[utterance.left :] for mel, utterance in zip(mels, utterances, strict=True)]
        lengths, waves = [len(row) for row in rows], self.hift.m_source.waves
        firsts = [FRAME_SAMPLES * utterance.left for utterance in utterances]
        turned = torch.zeros(waves, dtype=torch.float64, device=self.device)
        return Stretch(
            mel=padded(rows),
            edges=Edges(self._integers(lengths), ragged=is_ragged(lengths)),
            anchor=self._integers([utterance.cycles_frame - utterance.left for utterance in utterances]),
            cycles=torch.stack([turned if each.cycles is None else each.cycles for each in utterances]),
            offsets=noise.phases(self._keys(batch, Stream.PHASE), waves - 1),
            noise=self._normals(batch, Stream.SOURCE, firsts, FRAME_SAMPLES * max(lengths), waves),
        )

    def _released(self, step: Step, samples: Tensor) -> Tensor:
        """What is new in a row of HiFT's samples; the utterance's start is faded in."""
        start = FRAME_SAMPLES * step.utterance.released
        skipped = start - FRAME_SAMPLES * step.utterance.left
        new = samples[skipped : skipped + FRAME_SAMPLES * step.released - start]
        fade = self._fade[start : start + len(new)]
        return torch.cat([new[: len(fade)] * fade, new[len(fade) :]])

    def _keys(self, batch: list[Step], stream: Stream) -> Tensor:
        return self._integers([noise.key(step.utterance.seed, stream) for step in batch])

    def _normals(self, batch: list[Step], stream: Stream, firsts: list[int], count: int, channels: int) -> Tensor:
        return noise.normals(self._keys(batch, stream), self._integers(firsts), count, channels)

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device)


def frames_at_once(device: torch.device) -> int:
    """The default of ``max_frames``: see ``Vocoder``."""
    if device.type == "cpu":
        return 1
    if device.type != "cuda":
        return MAX_FRAMES
    free, _ = torch.cuda.mem_get_info(device)
    return max(FEWEST_FRAMES, min(MAX_FRAMES, free // 2 // FRAME_BYTES))


def fade_in() -> Tensor:
    """Mirrors ``S3Token2Wav.trim_fade``: 20 ms of silence, then a cosine over 20 ms, against the recording's echo."""
    rise = (torch.cos(torch.linspace(math.pi, 0, FRAME_SAMPLES)) + 1) / 2
    return torch.cat([torch.zeros(FRAME_SAMPLES), rise])
