"""What a device was asked to speak: on its way, then here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from chatterbox_vllm.vocoder.prompts import MELS
from chatterbox_vllm.vocoder.transfer import Moment, Transfer
from chatterbox_vllm.vocoder.utterance import Said, Step


@dataclass(frozen=True, eq=False)
class Part:
    """What one batch says, in one copy to the CPU.

    Args:
        steps: the batch.
        flowed: when the flow was done and only HiFT was left, the smaller part of the work.
        numbers: on the way: cycles, then mels, then samples.
        lengths: of those, for each step a mel and its samples.
    """

    steps: Sequence[Step]
    flowed: Moment
    numbers: Transfer
    lengths: list[int]

    @classmethod
    def sent(
        cls, steps: Sequence[Step], flowed: Moment, cycles: Tensor, mels: list[Tensor], samples: list[Tensor]
    ) -> Part:
        """Sends (B, waves) float64 and B rows each of mel and samples to the CPU."""
        numbers = cycles.view(torch.float32).flatten()  # first, because a float64 must lie at a multiple of its size
        parts = [numbers, *(mel.flatten() for mel in mels), *samples]
        return cls(steps, flowed, Transfer.of(torch.cat(parts)), [len(part) for part in parts])

    def arrive(self) -> list[Said]:
        """Waits for it. The tensors own their memory and may be changed outside of inference mode."""
        numbers, *rows = self.numbers.arrive().split(self.lengths)
        count = len(self.steps)
        turned = numbers.view(torch.float64).view(count, -1)
        mels, samples = [row.view(-1, MELS) for row in rows[:count]], rows[count:]
        return [Said(*(each.clone() for each in said)) for said in zip(samples, mels, turned, strict=True)]


@dataclass(frozen=True, eq=False)
class Sounding:
    """What some steps say.

    Args:
        steps: in the order in which they were asked for.
        parts: in the order in which the device works on them; each step is in one of them.
    """

    steps: Sequence[Step]
    parts: Sequence[Part]

    @property
    def is_here(self) -> bool:
        """Nobody would wait for it."""
        return all(part.numbers.moment.is_past for part in self.parts)

    def wait_for_flow(self) -> None:
        """Until the device has so little left to do that it is time to launch what comes next."""
        for part in self.parts:
            part.flowed.wait()

    def arrive(self) -> list[Said]:
        """Waits for all of it: for each step, what it says."""
        said = {step: each for part in self.parts for step, each in zip(part.steps, part.arrive(), strict=True)}
        return [said[step] for step in self.steps]
