"""One request's state in the vocoder, and what a new chunk lets it say.

Streaming cannot be exact in the flow: its attention sees both ways, so the past moves a little with every token. Hence
a frame of mel is *committed* once, and later runs only add frames after it. Counted from the end of what the tokens
give so far:

    |  released  |                     REACH (20 frames)                     |  LOOKAHEAD_TOKENS (6)  |
    |  committed                    DECODER_REACH (15)  |  PITCH_REACH (5)   |  not computed          |

The last tokens lack the look-ahead of the encoder and give no frames yet. The frames before them still move most: they
are a margin that only lends its neighbours' pitch a context. Samples are released where everything HiFT sees is
committed, so they are what HiFT makes of the whole committed mel. The final chunk holds nothing back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from chatterbox_vllm.types import VoiceFeatures
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN, LOOKAHEAD_TOKENS
from chatterbox_vllm.vocoder.hift import DECODER_REACH, REACH
from chatterbox_vllm.vocoder.prompts import check_tokens, usable_tokens
from chatterbox_vllm.vocoder.source import PITCH_REACH


@dataclass(eq=False)
class Utterance:
    """One request: made by ``Vocoder.open``, changed by ``Vocoder.advance`` alone, freed by dropping it.

    Args:
        voice: whose voice.
        seed: of all its noise.
        diffusion_steps: Euler steps of its flow.
        tokens: (n,) int64 speech tokens received so far.
        mel: (committed, 80) float32 log-mel on the vocoder's device.
        cycles: (waves,) float64 there, how far the source's waves had turned before frame ``cycles_frame``.
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
        return max(0, self.released - REACH)

    @property
    def is_silent(self) -> bool:
        """Nothing was heard of it yet: its next sound is what somebody waits for."""
        return self.released == 0


@dataclass(frozen=True, eq=False)
class Chunk:
    """New tokens of one utterance.

    Args:
        utterance: whose.
        tokens: (n,) int64 on the CPU, those that follow what was handed over before; may be empty.
        final: no more will come.

    Raises:
        InvalidRequest: see ``check_tokens``; ``param`` is ``tokens``.
    """

    utterance: Utterance
    tokens: Tensor
    final: bool

    def __post_init__(self) -> None:
        check_tokens(self.tokens)

    @property
    def flow_frames(self) -> int:
        """Frames that the flow has to work on for it, the recording's among them."""
        utterance = self.utterance
        return FRAMES_PER_TOKEN * (usable_tokens(utterance.voice) + len(utterance.tokens) + len(self.tokens))


@dataclass(frozen=True, eq=False)
class Step:
    """What one chunk makes the vocoder do. Counts are frames of speech from the utterance's start.

    Args:
        tokens: (n,) int64, all of the utterance's.
        frames: those the flow computes.
        committed: those that are final afterwards.
        released: those whose samples are out afterwards.
    """

    utterance: Utterance
    tokens: Tensor
    frames: int
    committed: int
    released: int
    final: bool

    @property
    def is_idle(self) -> bool:
        """Nothing new can be said, so the flow need not run."""
        return self.released <= self.utterance.released

    def joined(self, mel: Tensor) -> Tensor:
        """(frames, 80): what is committed, then what the flow has just made of the frames after it."""
        committed = self.utterance.mel
        return mel.clone() if committed is None else torch.cat([committed, mel[len(committed) :]])

    def take(self) -> None:
        """Notes that the chunk's tokens are in."""
        self.utterance.tokens = self.tokens
        self.utterance.finished = self.final

    def settle(self, mel: Tensor, cycles: Tensor) -> None:
        """Notes what was said.

        Args:
            mel: see ``joined``.
            cycles: (waves, F + 1) float64, for the frames from ``utterance.left`` on.
        """
        utterance, before = self.utterance, self.utterance.left
        utterance.mel = mel[: self.committed]
        utterance.released = self.released
        # Where a stretch is cut, its first frames lack the context that their pitch needs.
        utterance.cycles_frame = utterance.left + PITCH_REACH if utterance.left else 0
        utterance.cycles = cycles[:, utterance.cycles_frame - before].clone()


def plan(chunk: Chunk) -> Step:
    """Decides what ``chunk`` lets its utterance say.

    Raises:
        ValueError: the utterance was finished before.
    """
    utterance = chunk.utterance
    if utterance.finished:
        raise ValueError("a chunk came after the utterance's final one")
    tokens = torch.cat([utterance.tokens, chunk.tokens])
    if chunk.final:
        frames = FRAMES_PER_TOKEN * len(tokens)
        return Step(utterance, tokens, frames, frames, frames, final=True)
    frames = FRAMES_PER_TOKEN * (len(tokens) - LOOKAHEAD_TOKENS)
    released = max(utterance.released, frames - REACH)
    return Step(utterance, tokens, frames, released + DECODER_REACH, released, final=False)
