"""The names under which another project's users know quantisation; all of it is ``chatterbox_vllm.quantization``'s."""

from __future__ import annotations

from chatterbox_vllm.quantization.estimate import QuantizationMemoryEstimator
from chatterbox_vllm.quantization.policy import Policy as ChatterboxQuantizationConfig
from chatterbox_vllm.quantization.policy import QuantizationStrategy

__all__ = ["ChatterboxQuantizationConfig", "QuantizationMemoryEstimator", "QuantizationStrategy"]
