"""A budget of GPU memory: what is chosen to fit into it, before anything is loaded.

``costs`` tells what everything takes. How many tokens and frames are in work at once can be chosen, and which processes
there are. ``plan`` begins with the least that works and spends what is left on speed (``_Sum.upgrades``). Where not
even the least fits, it refuses, with every item of the sum and with what would fit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from chatterbox_vllm import costs
from chatterbox_vllm.costs import BLOCK, MIB, Choice, Demand, Item, cache_bytes, longest_frames
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.estimate import Estimate, QuantizationMemoryEstimator
from chatterbox_vllm.quantization.policy import NONE, STRATEGIES, Policy, QuantizationStrategy
from chatterbox_vllm.t3.graph_sizes import LARGEST_BATCH, USUAL_PROMPT, graph_sizes, step_graph_sizes
from chatterbox_vllm.types import MAX_MODEL_LEN
from chatterbox_vllm.vocoder.stage import MAX_FRAMES

_COUNTED: Final = 8
"""Utterances for which ``choose_strategy`` leaves room."""
SHORTEST: Final = 128
"""Least ``max_model_len`` that the settings allow."""
_FEWEST_TOKENS: Final = 256
_MOST_TOKENS: Final = 2_048
"""Of T3 in one step; vLLM's default."""
_BATCHES: Final = tuple(2**power for power in range(8, -1, -1))
"""What ``max_batch_size`` may be when it is left open."""


@dataclass(frozen=True)
class Plan:
    """What will be loaded, and the memory for it.

    Args:
        budget: bytes of the card for everything together.
        items: what they are spent on.
        policy: how the networks are quantised.
        max_batch_size: utterances that T3 speaks at once.
        max_model_len: positions of one of them.
        t3_arguments: for ``t3.launch.launch``, of ``vllm.AsyncEngineArgs``.
        vocoder_max_frames: the most mel frames that the vocoder has in work at once, by which it also sizes its graphs;
            None where it has another device.
        vocoder_process: whether the vocoder has a process of its own, and so a CUDA context; None where it has another
            device, and nobody asked.
        enrolment_device: ``cpu`` or ``cuda``.
    """

    budget: int
    items: tuple[Item, ...]
    policy: Policy
    max_batch_size: int
    max_model_len: int
    t3_arguments: Mapping[str, Any]
    vocoder_max_frames: int | None
    vocoder_process: bool | None
    enrolment_device: str

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return _total(self.items)

    def table(self) -> str:
        """The sum, a line for each item."""
        return "\n".join(_lines(self.items, self.budget))


def plan(budget: int, demand: Demand, policy: Policy = NONE) -> Plan:
    """The fastest that fits.

    Args:
        budget: bytes of the card for everything together.
        demand: what is to be loaded.
        policy: of the strategy ``auto``, the one that quantises least of those that fit is taken.

    Raises:
        ConfigurationError: nothing fits; lists what would be needed for what, and what would fit.
        CheckpointError: a file cannot be read.
    """
    auto = policy.strategy == QuantizationStrategy.AUTO
    estimator = demand.estimator
    sums = [_Sum(demand, each, estimator) for each in (STRATEGIES.values() if auto else [policy])]
    for each in sums:
        if (made := each.plan(budget)) is not None:
            return made
    raise _refusal(budget, sums[-1], "auto" if auto else None)


def choose_strategy(free: int, demand: Demand) -> Policy:
    """The strategy ``auto`` without a budget: the one that quantises least of those that fit into free memory.

    Args:
        free: bytes of the card that nobody uses.
        demand: its ``max_batch_size`` counts up to 8, or as many as there is room for: without a budget, T3's cache
            takes what there is.

    Raises:
        ConfigurationError: not even one utterance does.
        CheckpointError: a file cannot be read.
    """
    batch = min(demand.max_batch_size or _COUNTED, _COUNTED)
    while True:
        try:
            return plan(free, replace(demand, max_batch_size=batch), Policy(strategy=QuantizationStrategy.AUTO)).policy
        except ConfigurationError as error:
            if batch == 1:
                raise ConfigurationError(
                    f"quantization_strategy=auto goes by the {_shown(free)} of the card that are free. As a budget: "
                    f"{error}",
                    param="quantization_strategy",
                ) from error
            batch //= 2


def compare(budget: int, demand: Demand) -> dict[str, Plan | ConfigurationError]:
    """Each strategy's ``plan`` by its name, or why there is none."""
    plans: dict[str, Plan | ConfigurationError] = {}
    for name, policy in STRATEGIES.items():
        try:
            plans[name] = plan(budget, demand, policy)
        except ConfigurationError as error:
            plans[name] = error
    return plans


@dataclass(frozen=True)
class _Sum:
    """The arithmetic of one policy."""

    demand: Demand
    policy: Policy
    estimator: QuantizationMemoryEstimator

    @cached_property
    def weights(self) -> Estimate:
        return self.estimator.estimate(self.policy)

    def plan(self, budget: int) -> Plan | None:
        """The fastest that fits, or None."""
        choice = next((each for each in self.beginnings() if self.needs(each) <= budget), None)
        if choice is None:
            return None
        for upgrade in self.upgrades():
            while (better := upgrade(choice)) != choice and self.needs(better) <= budget:
                choice = better
        return self._made(budget, choice)

    def needs(self, choice: Choice) -> int:
        """Bytes."""
        return _total(self.items(choice))

    def beginnings(self) -> Iterator[Choice]:
        """The least, with the batch that was asked for; an open one is as large as it can be beside two utterances."""
        if self.demand.max_batch_size is not None:
            yield self.least(self.demand.max_batch_size)
            return
        for batch in _BATCHES:
            choice = self.least(batch)
            yield replace(choice, frames=2 * choice.frames)
        yield self.least(1)

    def least(self, batch: int) -> Choice:
        """The least that works: graphs for batches that double, one utterance at a time in the vocoder."""
        largest = min(batch, LARGEST_BATCH)
        return Choice(
            batch=batch,
            tokens=max(_FEWEST_TOKENS, batch),
            graphs=tuple(sorted({largest, *(2**power for power in range(largest.bit_length()))})),
            frames=longest_frames(self.demand.max_model_len),
            own_process=self.demand.vocoder_on_card and self.demand.needs_own_process,
        )

    def upgrades(self) -> Iterator[Callable[[Choice], Choice]]:
        """What memory is spent on, the most useful first; each is done again until it changes nothing."""
        if self.demand.vocoder_on_card:
            yield _more_frames(longest_frames(self.demand.max_model_len))
        yield from (_more_tokens, _more_graphs)
        if self.demand.vocoder_on_card and self.demand.vocoder_process is None:
            yield _with_own_process
        if self.demand.step_graphs:
            yield _with_step_graphs
        yield _with_enrolment

    def items(self, choice: Choice) -> tuple[Item, ...]:
        """What everything takes."""
        return costs.items(self.demand, choice, self.weights, self.estimator.t3_sizes)

    def _made(self, budget: int, choice: Choice) -> Plan:
        demand = self.demand
        return Plan(
            budget=budget,
            items=self.items(choice),
            policy=self.policy,
            max_batch_size=choice.batch,
            max_model_len=demand.max_model_len,
            t3_arguments={
                "kv_cache_memory_bytes": cache_bytes(
                    self.estimator.t3_sizes, demand.max_model_len, choice.batch, demand.itemsize
                ),
                "block_size": BLOCK,
                "max_num_seqs": choice.batch,
                "max_model_len": demand.max_model_len,
                "max_num_batched_tokens": choice.tokens,
                "cudagraph_capture_sizes": sorted({*choice.graphs, *choice.step_graphs}),
                "compilation_config": {"cudagraph_mode": "FULL" if choice.step_graphs else "FULL_DECODE_ONLY"},
            },
            vocoder_max_frames=choice.frames if demand.vocoder_on_card else None,
            vocoder_process=choice.own_process if demand.vocoder_on_card else demand.vocoder_process,
            enrolment_device="cuda" if choice.enrolment_on_card else "cpu",
        )


def _more_frames(longest: int) -> Callable[[Choice], Choice]:
    """As many as a whole batch brings, at most."""

    def more(choice: Choice) -> Choice:
        return replace(choice, frames=max(choice.frames, min(choice.frames + 512, choice.batch * longest, MAX_FRAMES)))

    return more


def _more_tokens(choice: Choice) -> Choice:
    most = min(USUAL_PROMPT * choice.batch, _MOST_TOKENS)
    return replace(choice, tokens=max(choice.tokens, min(2 * choice.tokens, most)))


def _more_graphs(choice: Choice) -> Choice:
    """vLLM's own sizes, so that batches are padded less."""
    return replace(choice, graphs=tuple(sorted({*choice.graphs, *graph_sizes(choice.batch)})))


def _with_own_process(choice: Choice) -> Choice:
    """A fault in the vocoder then leaves T3 alone."""
    return replace(choice, own_process=True)


def _with_step_graphs(choice: Choice) -> Choice:
    """The first tokens of many requests at once come twice as early."""
    return replace(choice, step_graphs=tuple(step_graph_sizes(choice.batch, choice.tokens)))


def _with_enrolment(choice: Choice) -> Choice:
    return replace(choice, enrolment_on_card=True)


def _refusal(budget: int, needed: _Sum, strategy: str | None) -> ConfigurationError:
    batch, length = needed.demand.max_batch_size or 1, needed.demand.max_model_len
    items = needed.items(needed.least(batch))
    missing = _total(items) - budget
    policy = needed.weights.policy  # in which T3's method is its file's, if that is quantised
    name = strategy or (policy.strategy if policy == needed.policy else None) or policy.method
    first = (
        f"vram_budget={_shown(budget)} is {missing:,} bytes ({_shown(missing)}) too small for max_batch_size={batch}, "
        f"max_model_len={length} and quantisation {name}; nothing was loaded. It would take"
    )
    remedies = ["what would fit:", *(f"  {remedy}" for remedy in _remedies(budget, needed, batch))]
    return ConfigurationError("\n".join([first, *_lines(items, budget), *remedies]), param="vram_budget")


def _remedies(budget: int, needed: _Sum, batch: int) -> Iterator[str]:
    """One change, or all of them at once where none is enough; and a larger budget."""
    single = list(_single_remedies(budget, needed, batch))
    yield from single or _combined_remedy(budget, needed)
    yield f"vram_budget={math.ceil(needed.needs(needed.least(batch)) / MIB)}MiB"


def _single_remedies(budget: int, needed: _Sum, batch: int) -> Iterator[str]:
    """One thing changed, the rest as it was asked for."""

    def takes(policy: Policy = needed.policy, **changed: Any) -> int:
        other = _Sum(replace(needed.demand, **{"max_batch_size": batch, **changed}), policy, needed.estimator)
        return other.needs(other.least(other.demand.max_batch_size or 1))

    fewer = range(1, batch)
    if most := bisect_right(fewer, budget, key=lambda each: takes(max_batch_size=each)):
        yield f"max_batch_size={fewer[most - 1]}"
    shorter = range(SHORTEST, min(needed.demand.max_model_len, MAX_MODEL_LEN + 1), BLOCK)
    if most := bisect_right(shorter, budget, key=lambda each: takes(max_model_len=each)):
        yield f"max_model_len={shorter[most - 1]}"
    if weakest := next((name for name, each in STRATEGIES.items() if takes(each) <= budget), None):
        yield f"quantization_strategy={weakest}"
    if needed.demand.vocoder_process and takes(vocoder_process=False, vocoder_workers=1) <= budget:
        yield "vocoder_process=false" + (", one vocoder_device" if needed.demand.vocoder_workers > 1 else "")
    elif needed.demand.vocoder_workers > 1 and takes(vocoder_workers=1) <= budget:
        yield "one vocoder_device"
    if needed.demand.vocoder_on_card and takes(vocoder_on_card=False) <= budget:
        yield "vocoder_device=cpu, which is slower"


def _combined_remedy(budget: int, needed: _Sum) -> Iterator[str]:
    """The least of everything, and the longest utterance that it leaves room for."""
    name, policy = list(STRATEGIES.items())[-1]
    changes = ["max_batch_size=1", f"quantization_strategy={name}"]

    def takes(length: int) -> int:
        other = _Sum(replace(needed.demand, max_batch_size=1, max_model_len=length), policy, needed.estimator)
        return other.needs(other.least(1))

    lengths = range(SHORTEST, min(needed.demand.max_model_len, MAX_MODEL_LEN) + 1, BLOCK)
    if most := bisect_right(lengths, budget, key=takes):
        yield ", ".join([*changes, f"max_model_len={lengths[most - 1]}"])


def _total(items: Sequence[Item]) -> int:
    return sum(item.bytes for item in items)


def _lines(items: Sequence[Item], budget: int) -> Iterator[str]:
    for item in items:
        yield f"  {item.name:<50}{item.bytes / MIB:>10,.1f} MiB{'' if item.exact else ', about'}"
    yield f"  {'together':<50}{_total(items) / MIB:>10,.1f} MiB"
    yield f"  {'budget':<50}{budget / MIB:>10,.1f} MiB"


def _shown(amount: int) -> str:
    return f"{amount / 2**30:.2f}GiB" if amount >= 2**30 else f"{math.ceil(amount / MIB)}MiB"
