"""How a request's position, token kind and guidance weight travel in three rows of M-RoPE positions.

A forward pass sees tokens, not requests. vLLM lets a model choose the positions of a prompt freely, in three rows, and
then counts on from them: a decoded token at index p gets ``p + delta`` in all rows. So, with ``bos`` the index of the
second BOS:

    row 0   weight * POSITIONS + ORIGIN + (p - bos)     guidance weight, and the RoPE position (RoPE is relative)
    row 1   0                                           a vector of the voice prefix
            1 + text position                           a text token
            ORIGIN + speech position                    a BOS
    decode  weight * POSITIONS + ORIGIN + (p - bos)     in all rows: p - bos is the learned speech position, too

Everything fits an int32, which the V2 model runner stores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatterbox_vllm.types import START_SPEECH

if TYPE_CHECKING:
    from torch import Tensor

POSITIONS = 16_384
"""RoPE positions, and the modulus of the packing."""
ORIGIN = 4_096
"""The second BOS's position: over any prompt's length, so that nothing is negative."""
WEIGHT_STEPS = 10_000
"""Guidance weights are kept in steps of 1/10,000."""
VOICE_LENGTH = 34
"""Vectors of the voice prefix: speaker, 32 of the perceiver, exaggeration."""
OVERHEAD = VOICE_LENGTH + 4
"""Positions of a prompt beside its text: voice, start, stop, and upstream's two BOS."""


def weight_steps(cfg_weight: float) -> int:
    """``cfg_weight`` in steps; 0..13.1 fit."""
    return round(cfg_weight * WEIGHT_STEPS)


def second_bos(tokens: list[int], start_of_speech: int = START_SPEECH) -> int:
    """Index of the second BOS. After preemption ``tokens`` may go on with generated ids, so search from the front."""
    return tokens.index(start_of_speech) + 1


def prompt_positions(tokens: list[int], steps: int) -> tuple[Tensor, int]:
    """Positions of a prompt and the delta of what follows it.

    Args:
        tokens: vLLM's ids of the prompt, possibly followed by generated ones.
        steps: the guidance weight, from ``weight_steps``.

    Returns:
        (3, len(tokens)) int64 and delta, as ``SupportsMRoPE.get_mrope_input_positions`` wants them.
    """
    import torch

    bos = second_bos(tokens)
    delta = steps * POSITIONS + ORIGIN - bos
    index = torch.arange(len(tokens))
    kind = ORIGIN + (index - bos)
    kind[bos - 1] = ORIGIN  # upstream embeds BOS twice, both times with speech position 0
    kind[:VOICE_LENGTH] = 0
    kind[VOICE_LENGTH : bos - 1] = torch.arange(1, bos - VOICE_LENGTH)
    rope = index + delta
    return torch.stack([rope, kind, rope]), delta


def unpack(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse, inside the compiled graph.

    Args:
        positions: (3, N) int64.

    Returns:
        rope: (N,) int64 RoPE positions.
        kind: (N,) int64, row 1 as described above.
        weight: (N,) float32 guidance weights.
    """
    rope = positions[0] % POSITIONS
    kind = positions[1] % POSITIONS
    weight = (positions[0] // POSITIONS).float() / WEIGHT_STEPS
    return rope, kind, weight
