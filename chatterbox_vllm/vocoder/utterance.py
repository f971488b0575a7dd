"""One request's state in the vocoder, and what a new chunk lets it say.

Streaming cannot be exact in the flow: its attention sees both ways, so the past moves a little with every token. Hence
a frame of mel is *committed* once, and later runs only add frames after it. Counted from the end of what the tokens
give so far:

    |  released  |                     REACH (20 frames)                     |  LOOKAHEAD_TOKENS (6)  |
    |  committed                    DECODER_REACH (15)  |  PITCH_REACH (5)   |  not computed          |

The last tokens lack the look-ahead of the encoder and give no frames yet. The frames before them still move most: they
are a margin that only lends its neighbours' pitch a context. Samples are released where everything HiFT sees is
committed, so they are what HiFT makes of the whole committed mel. The final chunk holds nothing back.

The state lies on the CPU, with whoever asked: a vocoder keeps nothing of an utterance. A chunk becomes a ``Step``, with
all that a vocoder needs, and the ``Said`` that comes back is all that the next step needs. So any vocoder can speak any
step, and one that dies takes no utterance with it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

import numpy as np
import torch
from torch import Tensor

from chatterbox_vllm.errors import EngineError
from chatterbox_vllm.types import SpeechOptions, VoiceFeatures
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN, LOOKAHEAD_TOKENS
from chatterbox_vllm.vocoder.hift import DECODER_REACH, REACH
from chatterbox_vllm.vocoder.prompts import MELS, check_tokens, check_voice, usable_tokens
from chatterbox_vllm.vocoder.source import PITCH_REACH

BESIDE_STEPS: Final = 2
"""Steps of the flow that take as long as all the rest: on an H200, encoder and HiFT are 14% of ten steps."""


@dataclass(eq=False)
class Utterance:
    """One request: made by ``open_utterance``, changed by ``Step.settle`` alone, freed by dropping it.

    All tensors are on the CPU.

    Args:
        voice: whose voice.
        seed: of all its noise.
        diffusion_steps: Euler steps of its flow.
        tokens: (n,) int64 speech tokens received so far.
        mel: (committed, 80) float32 log-mel; None before the first sound.
        cycles: (waves,) float64, how far the source's waves had turned before frame ``cycles_frame``.
        cycles_frame: see ``cycles``.
        released: frames whose samples were returned.
        finished: the final chunk was taken.
    """

    voice: VoiceFeatures
    seed: int
    diffusion_steps: int
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    mel: Tensor | None = None
    cycles: Tensor | None = None
    cycles_frame: int = 0
    released: int = 0
    finished: bool = False

    @property
    def left(self) -> int:
        """The first frame that HiFT needs to go on."""
        return _left(self.released)


def open_utterance(voice: VoiceFeatures, *, seed: int, diffusion_steps: int = 10) -> Utterance:
    """Starts an utterance. It holds nothing that would need closing.

    Raises:
        InvalidRequest: ``voice`` does not fit, or ``diffusion_steps`` is out of range; ``param`` says which.
    """
    check_voice(voice)
    SpeechOptions(seed=seed, diffusion_steps=diffusion_steps)  # knows their ranges
    return Utterance(voice, seed, diffusion_steps)


class Listener(IntEnum):
    """Who waits for a chunk; what is late goes first for whom comes first here."""

    HEARING = 0
    """Hears what is there, and falls silent when the chunk is late."""
    HELD = 1
    """Hears nothing yet, because what is there would not last."""
    WAITING = 2
    """Of a stream, for its first sound."""
    ABSENT = 3
    """A whole file is asked for."""


@dataclass(frozen=True)
class Due:
    """When a chunk's sound is wanted, and for whom.

    Args:
        at: in ``time.monotonic``'s seconds.
        listener: whose.
    """

    at: float = field(default_factory=time.monotonic)
    listener: Listener = Listener.ABSENT

    @property
    def is_streamed(self) -> bool:
        """It is a part of a sound that somebody listens to, or will before the rest is there."""
        return self.listener != Listener.ABSENT


@dataclass(frozen=True, eq=False)
class Chunk:
    """New tokens of one utterance.

    Args:
        utterance: whose.
        tokens: (n,) int64 on the CPU, those that follow what was handed over before; may be empty.
        final: no more will come.
        due: when its sound is wanted, by which what waits is put in order.

    Raises:
        InvalidRequest: see ``check_tokens``; ``param`` is ``tokens``.
    """

    utterance: Utterance
    tokens: Tensor
    final: bool
    due: Due = field(default_factory=Due)

    def __post_init__(self) -> None:
        check_tokens(self.tokens)


@dataclass(frozen=True, eq=False)
class Said:
    """What a step gives, on the CPU.

    Args:
        samples: (480 n,) float32, those of the n frames that it releases.
        mel: (m, 80) float32, the frames that it commits.
        cycles: (waves,) float64, before the step's ``cycles_frame``.
    """

    samples: Tensor
    mel: Tensor
    cycles: Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What one chunk makes the vocoder do. Counts are frames of speech from the utterance's start.

    Args:
        utterance: as it is before; of its tensors, a vocoder reads the voice and ``cycles``.
        tokens: (n,) int64, all of the utterance's.
        context: (c, 80) float32, what is committed from ``utterance.left`` on.
        frames: those the flow computes.
        committed: those that are final afterwards.
        released: those whose samples are out afterwards.
        final: no more tokens will come.
    """

    utterance: Utterance
    tokens: Tensor
    context: Tensor
    frames: int
    committed: int
    released: int
    final: bool

    @property
    def is_idle(self) -> bool:
        """Nothing new can be said, so the flow need not run."""
        return self.released <= self.utterance.released

    @property
    def flow_frames(self) -> int:
        """Frames that the flow has to work on for it, the recording's among them."""
        return FRAMES_PER_TOKEN * (usable_tokens(self.utterance.voice) + len(self.tokens))

    @property
    def work(self) -> int:
        """What it takes, in steps of the flow over one frame."""
        return self.flow_frames * (self.utterance.diffusion_steps + BESIDE_STEPS)

    @property
    def known(self) -> int:
        """Frames that were committed before."""
        return self.utterance.left + len(self.context)

    @property
    def cycles_frame(self) -> int:
        """Where the next step's waves go on; where a stretch is cut, its first frames lack their pitch's context."""
        left = _left(self.released)
        return left + PITCH_REACH if left else 0

    def take(self) -> None:
        """Notes that the chunk's tokens are in."""
        self.utterance.tokens = self.tokens
        self.utterance.finished = self.final

    def settle(self, said: Said) -> None:
        """Notes what was said, and takes the tokens.

        Raises:
            EngineError: it is no sound; the utterance has not changed.
        """
        # NumPy's, here and below: torch would share out so much among all the threads that it has, and this is an event
        # loop's, which waits until the last of them has had its turn on a busy machine.
        if not np.isfinite(said.samples.numpy()).all():
            raise EngineError("the vocoder computed samples that are not numbers; this request's voice may be damaged")
        utterance = self.utterance
        if utterance.mel is not None:
            utterance.mel = torch.from_numpy(np.concatenate([utterance.mel.numpy(), said.mel.numpy()]))
        else:
            utterance.mel = said.mel
        utterance.released = self.released
        utterance.cycles, utterance.cycles_frame = said.cycles, self.cycles_frame
        self.take()


def plan(chunk: Chunk) -> Step:
    """Decides what ``chunk`` lets its utterance say.

    Raises:
        ValueError: the utterance was finished before.
    """
    utterance = chunk.utterance
    if utterance.finished:
        raise ValueError("a chunk came after the utterance's final one")
    tokens = torch.cat([utterance.tokens, chunk.tokens])
    context = torch.empty(0, MELS) if utterance.mel is None else utterance.mel[utterance.left :]
    if chunk.final:
        frames = FRAMES_PER_TOKEN * len(tokens)
        return Step(utterance, tokens, context, frames, frames, frames, final=True)
    frames = FRAMES_PER_TOKEN * (len(tokens) - LOOKAHEAD_TOKENS)
    released = max(utterance.released, frames - REACH)
    return Step(utterance, tokens, context, frames, released + DECODER_REACH, released, final=False)


def _left(released: int) -> int:
    return max(0, released - REACH)
