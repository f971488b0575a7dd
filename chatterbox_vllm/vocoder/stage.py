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
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.types import SAMPLE_RATE, SPOKEN_TOKENS, VoiceFeatures
from chatterbox_vllm.vocoder import noise
from chatterbox_vllm.vocoder.backend import Backend, TorchBackend
from chatterbox_vllm.vocoder.batching import packed, padded
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.flow import LONGEST
from chatterbox_vllm.vocoder.footprint import VocoderFootprint, bytes_of, measured
from chatterbox_vllm.vocoder.hift import Stretch
from chatterbox_vllm.vocoder.noise import Stream
from chatterbox_vllm.vocoder.pieces import in_pieces
from chatterbox_vllm.vocoder.prompts import MELS, X_VECTOR, Prompts
from chatterbox_vllm.vocoder.sounding import Part, Sounding
from chatterbox_vllm.vocoder.source import FRAME_SAMPLES
from chatterbox_vllm.vocoder.transfer import Moment, to_device
from chatterbox_vllm.vocoder.utterance import Chunk, Said, Step, Utterance, open_utterance, plan
from chatterbox_vllm.vocoder.weights import Networks, load

MAX_FRAMES: Final = 8_192
"""The most mel frames in one batch on a GPU; about 4 GB of activations at the real sizes. An H200 speaks no faster with
more at once, and who comes next would wait longer."""
FEWEST_FRAMES: Final = 2_048
"""What a GPU without memory to spare is asked for all the same; a batch that does not fit is split."""
FEWEST_IN_PIECES: Final = 256
"""Frames that HiFT takes at once where ``max_frames`` is set low."""
FRAME_BYTES: Final = 2**19
"""Of activations for one mel frame, at the real sizes."""
_WARM_TOKENS: Final = 250
"""Of a recording, as long as one gets."""
_TRITON: Final = (8, 0)
_log: Final = logging.getLogger(__name__)


class Vocoder:
    """S3Gen without its enrolment parts. It keeps nothing of an utterance. It belongs to one thread at a time.

    Args:
        networks: see ``weights.load``, quantised or not; they move to ``device``.
        device: where they run. It must know float64, in which phases are summed.
        dtype: of the flow's products. float32 gives what upstream gives. Half precision is for CUDA cards, where it
            brings the fast networks of ``cuda``; elsewhere it is the estimator's alone.
        max_frames: the most mel frames, recordings and padding included, that run at once; bounds the memory. A single
            utterance always runs. A number given here also bounds HiFT, which then takes a quarter of as many frames at
            once. None is what half of a GPU's free memory holds, ``MAX_FRAMES`` at most; but on a CPU, where a batch is
            hardly faster, each utterance alone: matrix kernels round differently for different shapes, and so every
            sound is the same in any company.
        exact: have upstream's very bits in a CPU's float32 products, too. They take a sixth more time; without, samples
            differ by some ten-thousandths (see ``packed``). Elsewhere it changes nothing.
    """

    sample_rate: Final = SAMPLE_RATE

    def __init__(
        self,
        networks: Networks,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_frames: int | None = None,
        exact: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.networks = networks
        self._waves = networks.mel2wav.m_source.waves
        self._fade = fade_in().to(self.device)
        self.max_frames = max_frames or frames_at_once(self.device, weights=bytes_of({"all": networks})["all"])
        self._hift_frames = None if max_frames is None else max(FEWEST_IN_PIECES, max_frames // 4)
        frames, frugal = max_frames or max(self.max_frames, LONGEST), max_frames is not None
        self.backend = _backend(networks, self.device, dtype, frames, frugal=frugal, exact=exact)
        self._prompts = Prompts(networks.flow, self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_frames: int | None = None,
        exact: bool = False,
    ) -> Vocoder:
        """Loads s3gen.safetensors or s3gen.pt, of any size.

        Raises:
            CheckpointError: a key is missing, unknown or misshapen.
        """
        return cls(load(path), device=device, dtype=dtype, max_frames=max_frames, exact=exact)

    def footprint(self) -> VocoderFootprint:
        """The memory that it takes now."""
        return measured(self.backend.footprint, self.device)

    def warm_up(self) -> None:
        """Has kernels compiled, graphs captured and libraries loaded, so that no request waits for it."""
        self.backend.warm_up(self.max_frames, self._hift_frames or self.max_frames)
        generator = torch.Generator().manual_seed(0)
        voice = VoiceFeatures(
            speaker_embedding=torch.empty(0),
            t3_prompt_tokens=torch.empty(0, dtype=torch.int64),
            prompt_tokens=torch.randint(0, SPOKEN_TOKENS, (_WARM_TOKENS,), generator=generator),
            prompt_mel=torch.randn(FRAMES_PER_TOKEN * _WARM_TOKENS, MELS, generator=generator),
            x_vector=torch.randn(X_VECTOR, generator=generator),
        )
        tokens = voice.prompt_tokens[:25]
        for count, final in ((1, False), (1, True), (4, False)):
            self.advance([Chunk(self.open(voice, seed=seed), tokens, final=final) for seed in range(count)])

    def open(self, voice: VoiceFeatures, *, seed: int, diffusion_steps: int = 10) -> Utterance:
        """As ``open_utterance``, for those who have a vocoder at hand."""
        return open_utterance(voice, seed=seed, diffusion_steps=diffusion_steps)

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
            EngineError: an utterance's sound is none; those before it in ``chunks`` have changed.
        """
        if len({chunk.utterance for chunk in chunks}) < len(chunks):
            raise ValueError("a batch holds two chunks of one utterance")
        steps = [plan(chunk) for chunk in chunks]
        active = [step for step in steps if not step.is_idle]
        said = dict(zip(active, self.speak(active), strict=True))
        for step in steps:
            if step in said:
                step.settle(said[step])
            else:
                step.take()
        return [said[step].samples if step in said else torch.empty(0) for step in steps]

    def speak(self, steps: Sequence[Step]) -> list[Said]:
        """What ``steps``, none of them idle, say; they do not change.

        Raises:
            torch.OutOfMemoryError: as ``advance``.
        """
        return self.launch(steps).arrive()

    @torch.inference_mode()
    def launch(self, steps: Sequence[Step]) -> Sounding:
        """As ``speak``, without waiting for the device; each batch is launched while the one before it runs."""
        parts = [part for batch in self._batches(steps) for part in self._launch_within_memory(batch)]
        return Sounding(steps, parts)

    def _batches(self, steps: Sequence[Step]) -> list[list[Step]]:
        """Steps that can run together: as many diffusion steps, and no more frames than fit."""
        alike: defaultdict[int, list[Step]] = defaultdict(list)
        for step in steps:
            alike[step.utterance.diffusion_steps].append(step)
        return [
            batch for group in alike.values() for batch in packed(group, lambda step: step.flow_frames, self.max_frames)
        ]

    def _launch_within_memory(self, batch: list[Step]) -> list[Part]:
        try:
            return [self._launch(batch)]
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            _log.warning("no memory for a batch of %d utterances; trying its halves", len(batch))
        # Past the except clause, whose error kept the failed attempt's tensors alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(batch) // 2
        return self._launch_within_memory(batch[:half]) + self._launch_within_memory(batch[half:])

    def _launch(self, batch: list[Step]) -> Part:
        mels = self._continued(batch, self._flow(batch))
        flowed = Moment.now(self.device)
        samples, cycles = self._sounds(self._stretch(batch, mels))
        return Part.sent(
            batch,
            flowed,
            torch.stack([self._carried(step, row) for step, row in zip(batch, cycles, strict=True)]),
            [self._committed(step, mel) for step, mel in zip(batch, mels, strict=True)],
            [self._released(step, row) for step, row in zip(batch, samples, strict=True)],
        )

    def _flow(self, batch: list[Step]) -> list[Tensor]:
        """(frames, 80) mel for each step, from everything said so far."""
        prompts = [self._prompts[step.utterance.voice] for step in batch]
        tokens = [torch.cat([prompt.tokens, step.tokens]) for prompt, step in zip(prompts, batch, strict=True)]
        starts = [len(prompt.mel) for prompt in prompts]
        ends = [start + step.frames for start, step in zip(starts, batch, strict=True)]
        mu = self.backend.mu(tokens)
        cond = torch.zeros(len(batch), max(ends), MELS, device=self.device)
        for row, prompt in zip(cond, prompts, strict=True):
            row[: len(prompt.mel)] = prompt.mel
        mel = self.backend.solve(
            self.backend.normals(self._keys(batch, Stream.MEL), self._integers([0] * len(batch)), max(ends), MELS),
            mu[:, : max(ends)],
            torch.stack([prompt.speaker for prompt in prompts]),
            cond,
            ends,
            batch[0].utterance.diffusion_steps,
        )
        return [row[start:] for row, start in zip(mel, starts, strict=True)]

    def _continued(self, batch: list[Step], mels: list[Tensor]) -> list[Tensor]:
        """(frames - left, 80) for each step: what is committed, then what the flow has made of the frames after it."""
        contexts = to_device(torch.cat([step.context for step in batch]), self.device)
        rows = zip(batch, contexts.split([len(step.context) for step in batch]), mels, strict=True)
        return [torch.cat([context, mel[step.known :]]) for step, context, mel in rows]

    def _stretch(self, batch: list[Step], mels: list[Tensor]) -> Stretch:
        """What HiFT needs to go on from where each utterance is; ``mels`` begin there."""
        utterances = [step.utterance for step in batch]
        lengths, waves = [len(mel) for mel in mels], self._waves
        firsts = [FRAME_SAMPLES * utterance.left for utterance in utterances]
        turned = torch.zeros(waves, dtype=torch.float64)
        cycles = torch.stack([turned if each.cycles is None else each.cycles for each in utterances])
        return Stretch(
            mel=padded(mels),
            frames=lengths,
            anchor=self._integers([utterance.cycles_frame - utterance.left for utterance in utterances]),
            cycles=to_device(cycles, self.device),
            offsets=noise.phases(self._keys(batch, Stream.PHASE), waves - 1),
            keys=self._keys(batch, Stream.SOURCE),
            first=self._integers(firsts),
        )

    def _sounds(self, stretch: Stretch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        if self._hift_frames is None:
            return self.backend.hift(stretch)
        return in_pieces(self.backend.hift, stretch, self._hift_frames)

    def _carried(self, step: Step, cycles: Tensor) -> Tensor:
        """(waves,): of a row of HiFT's cycles, those from which the utterance's next step goes on."""
        return cycles[:, step.cycles_frame - step.utterance.left]

    def _committed(self, step: Step, mel: Tensor) -> Tensor:
        """(m, 80): of a mel that begins where HiFT's row does, the frames that are final now and were not before."""
        return mel[step.known - step.utterance.left : step.committed - step.utterance.left]

    def _released(self, step: Step, samples: Tensor) -> Tensor:
        """What is new in a row of HiFT's samples; the utterance's start is faded in."""
        start = FRAME_SAMPLES * step.utterance.released
        skipped = start - FRAME_SAMPLES * step.utterance.left
        new = samples[skipped : skipped + FRAME_SAMPLES * step.released - start]
        fade = self._fade[start : start + len(new)]
        return torch.cat([new[: len(fade)] * fade, new[len(fade) :]])

    def _keys(self, batch: list[Step], stream: Stream) -> Tensor:
        return self._integers([noise.key(step.utterance.seed, stream) for step in batch])

    def _integers(self, values: list[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self.device)


def _backend(
    networks: Networks, device: torch.device, dtype: torch.dtype, frames: int, *, frugal: bool, exact: bool
) -> Backend:
    if device.type == "cuda" and dtype != torch.float32 and _suits_triton(device):
        from chatterbox_vllm.vocoder.cuda.backend import CudaBackend  # Triton is not installed without CUDA

        if CudaBackend.fits(networks):
            return CudaBackend(networks, device=device, dtype=dtype, frames=frames, frugal=frugal)
        _log.warning("the networks' sizes do not suit the fast kernels; using the plain ones")
    networks.to(device)
    networks.flow.decoder.to(dtype)
    return TorchBackend(networks, exact=exact)


def _suits_triton(device: torch.device) -> bool:
    """Whether Triton compiles for the card's tensor cores: for older ones it gives up on them, and on registers."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= _TRITON:
        return True
    _log.warning("the fast kernels need compute capability 8.0, %s has %d.%d: using plain ones", device, *capability)
    return False


def frames_at_once(device: torch.device, *, weights: int) -> int:
    """The default of ``max_frames``, for networks of so many bytes: see ``Vocoder``."""
    if device.type == "cpu":
        return 1
    if device.type != "cuda":
        return MAX_FRAMES
    free, _ = torch.cuda.mem_get_info(device)
    return max(FEWEST_FRAMES, min(MAX_FRAMES, (free - weights) // 2 // FRAME_BYTES))


def fade_in() -> Tensor:
    """Mirrors ``S3Token2Wav.trim_fade``: 20 ms of silence, then a cosine over 20 ms, against the recording's echo."""
    rise = (torch.cos(torch.linspace(math.pi, 0, FRAME_SAMPLES)) + 1) / 2
    return torch.cat([torch.zeros(FRAME_SAMPLES), rise])
