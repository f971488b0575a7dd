"""The names under which another project's users know quantisation; all of it is ``chatterbox_vllm.quantization``'s."""

from __future__ import annotations

from pathlib import Path

from chatterbox_vllm.checkpoint import resolve
from chatterbox_vllm.quantization import estimate
from chatterbox_vllm.quantization.policy import Policy as ChatterboxQuantizationConfig
from chatterbox_vllm.quantization.policy import QuantizationStrategy

__all__ = ["ChatterboxQuantizationConfig", "QuantizationMemoryEstimator", "QuantizationStrategy"]


class QuantizationMemoryEstimator(estimate.QuantizationMemoryEstimator):
    """Weighs one checkpoint.

    Args:
        checkpoint: a name, a folder, or a hub repository, as for ``checkpoint.resolve``; or its files.
        sizes: ``itemsize`` and ``vocoder_itemsize``: bytes of a number, 2 unless they are given.

    Raises:
        CheckpointError: there is no such checkpoint, or a file cannot be read.
    """

    def __init__(self, checkpoint: str | Path | estimate.Files, **sizes: int) -> None:
        super().__init__(resolve(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint, **sizes)
