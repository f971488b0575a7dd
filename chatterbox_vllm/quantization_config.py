"""The names under which another project's users know quantisation; all of it is ``chatterbox_vllm.quantization``'s."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from chatterbox_vllm.checkpoint import resolve
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization import spellings
from chatterbox_vllm.quantization.estimate import Estimate, Files
from chatterbox_vllm.quantization.estimate import QuantizationMemoryEstimator as Estimator
from chatterbox_vllm.quantization.policy import Policy, QuantizationStrategy

__all__ = ["ChatterboxQuantizationConfig", "QuantizationMemoryEstimator", "QuantizationStrategy"]


class ChatterboxQuantizationConfig(Policy):
    """A policy by a strategy's name, by its methods, or both.

    Args:
        strategy: whose methods those are that are not given.
        methods: component to method; see ``Policy``.

    Raises:
        ConfigurationError: there is no such strategy, or a component cannot have its method.
    """

    def __init__(self, strategy: str | None = None, **methods: str) -> None:
        given = {} if strategy is None else {"quantization_strategy": spellings.Given(strategy, "strategy")}
        named = spellings.resolve(given)
        components = {**named.methods, **methods}
        keeps_name = components == named.methods or named.strategy == QuantizationStrategy.AUTO
        super().__init__(**components, strategy=named.strategy if keeps_name else None)


class _OfClass:
    """A method that can be called on its class, too: of an instance without arguments."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __get__(self, instance: object | None, owner: type) -> Callable[..., Any]:
        return partial(self._method, owner() if instance is None else instance)


class QuantizationMemoryEstimator(Estimator):
    """Weighs one checkpoint.

    Args:
        checkpoint: a name, a folder, or a hub repository, as for ``checkpoint.resolve``; or its files.
        sizes: ``itemsize`` and ``vocoder_itemsize``: bytes of a number, 2 unless they are given.

    Raises:
        CheckpointError: there is no such checkpoint, or a file cannot be read.
    """

    def __init__(self, checkpoint: str | Path | Files = "english", **sizes: int) -> None:
        super().__init__(resolve(checkpoint) if isinstance(checkpoint, str | Path) else checkpoint, **sizes)

    def estimate(self, policy: Policy | str) -> Estimate:
        """What the engine will keep under ``policy``, or the strategy of that name.

        Raises:
            ConfigurationError: there is no such strategy, or it is auto, which a card decides.
        """
        if not isinstance(policy, Policy):
            policy = spellings.resolve({"quantization_strategy": spellings.Given(policy, "policy")})
        if policy.strategy == QuantizationStrategy.AUTO:
            raise ConfigurationError("auto goes by a card's free memory; name a strategy", param="policy")
        return super().estimate(policy)

    compare_strategies = _OfClass(Estimator.compare_strategies)
