"""What T3's linear layers read while it speaks: AWQ scales for that.

The rows are those of a served request: the voice's prefix, the text, and sampled speech tokens, each with and without
the text, as guidance has it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from chatterbox_vllm.evaluate.t3 import PlainT3
from chatterbox_vllm.quantization.awq import READERS
from chatterbox_vllm.types import SpeechOptions, VoiceFeatures

ROWS: Final = 512
"""Activations kept of each linear layer."""
_OF_PROMPT: Final = 64
"""Rows kept of a prompt, which would else outnumber the speech."""
Activations = list[dict[str, Tensor]]
"""Of each layer: module's name to (rows, inputs) float32."""


def record(t3: PlainT3, texts: Sequence[Sequence[int]], voice: VoiceFeatures, tokens: int) -> Activations:
    """Speaks each text with upstream's default options and tells what ``awq.READERS`` read.

    Args:
        texts: ids of each, without start and stop.
        tokens: speech tokens of each text; none ends earlier.

    Returns:
        At most ``ROWS`` rows of each module, on T3's device.
    """
    with _listening(t3.llama) as heard:
        for seed, text in enumerate(texts):
            t3.speak(text, voice, SpeechOptions(seed=seed, max_tokens=tokens), can_end=False)
    return [
        {name: _thinned(torch.cat(positions), ROWS).flatten(0, 1) for name, positions in layer.items()}
        for layer in heard
    ]


@contextmanager
def _listening(llama: nn.Module) -> Iterator[list[dict[str, list[Tensor]]]]:
    layers: Any = llama.layers
    heard: list[dict[str, list[Tensor]]] = [defaultdict(list) for _ in layers]
    hooks = [
        layer.get_submodule(name).register_forward_pre_hook(partial(_keep, heard[index][name]))
        for index, layer in enumerate(layers)
        for name in READERS
    ]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _keep(positions: list[Tensor], _module: nn.Module, inputs: tuple[Tensor]) -> None:
    positions.append(_thinned(inputs[0].transpose(0, 1), _OF_PROMPT).clone())


def _thinned(positions: Tensor, most: int) -> Tensor:
    """(positions, halves, inputs) -> at most ``most`` rows, evenly spread and as many of each half of the guidance."""
    return positions[:: -(-positions[..., 0].numel() // most)]
