"""A budget of GPU memory: what everything will take, told before anything is loaded, and what is chosen to fit.

    total = contexts + T3 (weights, cache, activations, graphs) + vocoder (weights, room, activations, graphs)

Weights and cache are counted exactly, from the checkpoint's headers. The rest follows from how many tokens and frames
are in work at once, which is what can be chosen, and from the constants below.

``plan`` begins with the least that works and spends what is left on speed (``_Sum.upgrades``). Where not even the least
fits, it refuses, with every item of the sum and with what would fit.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Final

from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.quantization.estimate import Estimate, Files, QuantizationMemoryEstimator, T3Sizes
from chatterbox_vllm.quantization.policy import NONE, STRATEGIES, Method, Policy, QuantizationStrategy
from chatterbox_vllm.types import MAX_SPEECH_TOKENS
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.stage import FEWEST_IN_PIECES, MAX_FRAMES

MIB: Final = 2**20

# What no file tells. "Measured" is on one H200 (132 multiprocessors, CUDA 13.0, driver 580): docs/VRAM_OPTIMIZATION.md.
# "Counted" follows from the code at the real sizes. A card loses what torch reserves, not what it has in use at the
# worst moment, so these are about reserved memory.
CONTEXT_BYTES: Final = (64 * MIB, 4_404_019)
"""A CUDA context, and for each multiprocessor: 4.2 MiB. Measured is the sum, 618.8 MiB; how it divides is assumed."""
T3_LIBRARY_BYTES: Final = 68 * MIB
"""T3's kernels and cuBLAS, outside of torch. Measured: what its process had beyond a context and the vocoder."""
VOCODER_LIBRARY_BYTES: Final = 166 * MIB
"""cuDNN, cuBLAS and Triton's kernels, outside of torch; assumed for enrolment, too. Measured: 178 with two graphs."""
AGAIN_BYTES: Final = 39 * MIB
"""Of libraries, what T3's process and a vocoder's own both load. Measured."""
WORKSPACE_BYTES: Final = 16 * MIB
"""cuBLAS' workspaces of a stage, inside of torch. Measured is that there are two; 8 MiB each is what we ask for."""
T3_ROW_BYTES: Final = (16, 8)
"""T3's activations: so many times its width, and its feed-forward's, for each of two rows a token. Counted; with the
graphs, measured at 1,024 tokens and four graphs."""
T3_GRAPH_BYTES: Final = 4 * MIB
"""One CUDA graph of T3. Measured with the activations, see there."""
SOLVER_GRAPH_BYTES: Final = 6 * MIB
"""One CUDA graph of the vocoder's solver, outside of torch. Measured: 0 to 12 MiB."""
POOL_BYTES: Final = (2, 55 * MIB)
"""The pools of the vocoder's graphs: so many times the largest graph's tensors, and so much besides. Measured at 1,704,
4,096 and 8,192 frames."""
ROW_BYTES: Final = 8_100
"""The solver's room for one row, two rows a frame: ``PackedEstimator.room``, its inputs and the mel. Counted."""
TABLES_BYTES: Final = 12 * MIB
"""The encoder's table of distances, and the graphs' own inputs. Measured: 8 to 14 MiB."""
SCRATCH_BYTES: Final = 9 * MIB
"""Where a quantised vocoder decodes its matrices: four blocks of the estimator. Measured."""
ENCODER_BYTES: Final = (32, 30_000)
"""The encoder's activations for a frame: so much times the frames of its utterance, and so much besides. Counted;
measured for one utterance of 1,704 frames."""
HIFT_BYTES: Final = 250_000
"""HiFT's activations for a frame: eight tensors of 64 channels, 120 rows a frame. Counted."""
ENROLMENT_BYTES: Final = 256 * MIB
"""Activations for a recording of 10 s, when it is enrolled on the card. Assumed."""

BLOCK: Final = 16
"""Positions in a block of T3's KV cache."""
PROMPT_POSITIONS: Final = 38
"""Of the voice and the control tokens."""
RECORDING_FRAMES: Final = 500
"""Mel frames of a voice's recording, at most."""
_SMALLEST_ROOM: Final = 1_024
"""Frames of the solver's smallest graph; each further one is for twice as many."""
_CAPTURED: Final = (640, 768)
"""Tokens of the encoder's and frames of HiFT's largest graphs."""
_COUNTED: Final = 8
"""Utterances for which ``choose_strategy`` leaves room."""
_SHORTEST: Final = 128
"""Least ``max_model_len`` that the settings allow."""
_LOGIT_BYTES: Final = 32
"""For each request and id: logits in half and full precision, what sampling sorts, and counts for the penalty."""
_FEWEST_TOKENS: Final = 256
_MOST_TOKENS: Final = 2_048
"""Of T3 in one step; vLLM's default."""
_PROMPT_TOKENS: Final = 128
"""Of a usual prompt: a step need not hold more of them than there are requests."""
_LARGEST_GRAPH: Final = 512
_BATCHES: Final = tuple(2**power for power in range(8, -1, -1))
"""What ``max_batch_size`` may be when it is left open."""
_UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    | {"kib": 2**10, "mib": 2**20, "gib": 2**30}
)


def parse_bytes(value: str | int, *, param: str = "vram_budget") -> int:
    """``2GiB``, ``2048MiB``, ``2g`` and 2147483648 are the same; ``2GB`` is 2,000,000,000.

    Raises:
        ConfigurationError: it is no amount of memory above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    factor = _UNITS.get(match[2]) if match else None
    amount = int(float(match[1]) * factor) if match and factor else 0
    if isinstance(value, bool) or amount <= 0:
        raise ConfigurationError(f"{param}={value} is no amount of memory; write 2GiB, 2048MiB or bytes", param=param)
    return amount


@dataclass(frozen=True)
class Item:
    """A line of the sum; ``exact`` where it is counted in the checkpoint's headers, not estimated."""

    name: str
    bytes: int
    exact: bool = False


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
        vocoder_process: whether the vocoder has a process of its own, and so a CUDA context.
        enrolment_device: ``cpu`` or ``cuda``.
    """

    budget: int
    items: tuple[Item, ...]
    policy: Policy
    max_batch_size: int
    max_model_len: int
    t3_arguments: Mapping[str, Any]
    vocoder_max_frames: int | None
    vocoder_process: bool
    enrolment_device: str

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return _total(self.items)

    def table(self) -> str:
        """The sum, a line for each item."""
        return "\n".join(_lines(self.items, self.budget))


@dataclass(frozen=True)
class Demand:
    """What is to be loaded, as far as it is settled.

    Args:
        checkpoint: its files.
        max_batch_size: utterances that T3 speaks at once; None for as many as fit.
        max_model_len: positions of one of them.
        vocoder_process: False has the vocoder run in T3's process; None for a process of its own where there is room.
        vocoder_on_card: False where the vocoder's device is another one than T3's.
        itemsize, vocoder_itemsize: bytes of a number of the stages' dtypes.
        multiprocessors: of the card; a CUDA context grows with them. An H200 has 132.
    """

    checkpoint: Files
    max_batch_size: int | None = None
    max_model_len: int = 2048
    vocoder_process: bool | None = None
    vocoder_on_card: bool = True
    itemsize: int = 2
    vocoder_itemsize: int = 2
    multiprocessors: int = 132

    @property
    def estimator(self) -> QuantizationMemoryEstimator:
        """Of its checkpoint.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return QuantizationMemoryEstimator(
            self.checkpoint, itemsize=self.itemsize, vocoder_itemsize=self.vocoder_itemsize
        )


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
        demand: its ``max_batch_size`` counts up to 8: without a budget, T3's cache takes what there is.

    Raises:
        ConfigurationError, CheckpointError: see ``plan``.
    """
    few = replace(demand, max_batch_size=min(demand.max_batch_size or _COUNTED, _COUNTED))
    return plan(free, few, Policy(strategy=QuantizationStrategy.AUTO)).policy


def compare(budget: int, demand: Demand) -> dict[str, Plan | ConfigurationError]:
    """Each strategy's ``plan`` by its name, or why there is none."""
    plans: dict[str, Plan | ConfigurationError] = {}
    for name, policy in STRATEGIES.items():
        try:
            plans[name] = plan(budget, demand, policy)
        except ConfigurationError as error:
            plans[name] = error
    return plans


def cache_bytes(sizes: T3Sizes, positions: int, requests: int, itemsize: int = 2) -> int:
    """T3's KV cache for ``requests`` of so many positions each, in whole blocks, and the one that vLLM never uses."""
    blocks = -(-positions // BLOCK) * requests + 1
    return blocks * BLOCK * position_bytes(sizes, itemsize)


def position_bytes(sizes: T3Sizes, itemsize: int = 2) -> int:
    """Of T3's KV cache: keys and values of both halves of the guidance. ``t3.launch.cache_bytes_per_position``."""
    return sizes.layers * 2 * 2 * sizes.width * itemsize


def context_bytes(multiprocessors: int) -> int:
    """Of one CUDA context on a card of so many; for other cards than an H200, assumed to grow in proportion."""
    least, each = CONTEXT_BYTES
    return least + each * multiprocessors


def longest_frames(max_model_len: int) -> int:
    """Mel frames of the longest utterance, its voice's recording included: what the vocoder must have room for."""
    return RECORDING_FRAMES + FRAMES_PER_TOKEN * min(MAX_SPEECH_TOKENS, max_model_len - PROMPT_POSITIONS)


@dataclass(frozen=True)
class _Choice:
    """What can be chosen; the smaller, the less memory and the slower.

    Args:
        batch: utterances at once.
        tokens: of T3 in one step.
        graphs: batch sizes for which T3 has a CUDA graph.
        frames: see ``Plan.vocoder_max_frames``.
        own_process: see ``Plan.vocoder_process``.
    """

    batch: int
    tokens: int
    graphs: tuple[int, ...]
    frames: int
    own_process: bool
    enrolment_on_card: bool = False


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

    def needs(self, choice: _Choice) -> int:
        """Bytes."""
        return _total(self.items(choice))

    def beginnings(self) -> Iterator[_Choice]:
        """The least, with the batch that was asked for; an open one is as large as it can be beside two utterances."""
        if self.demand.max_batch_size is not None:
            yield self.least(self.demand.max_batch_size)
            return
        for batch in _BATCHES:
            choice = self.least(batch)
            yield replace(choice, frames=2 * choice.frames)
        yield self.least(1)

    def least(self, batch: int) -> _Choice:
        """The least that works: graphs for batches that double, one utterance at a time in the vocoder."""
        largest = min(batch, _LARGEST_GRAPH)
        return _Choice(
            batch=batch,
            tokens=max(_FEWEST_TOKENS, batch),
            graphs=tuple(sorted({largest, *(2**power for power in range(largest.bit_length()))})),
            frames=longest_frames(self.demand.max_model_len),
            own_process=self.demand.vocoder_on_card and self.demand.vocoder_process is True,
        )

    def upgrades(self) -> Iterator[Callable[[_Choice], _Choice]]:
        """What memory is spent on, the most useful first; each is done again until it changes nothing."""
        if self.demand.vocoder_on_card:
            yield _more_frames(longest_frames(self.demand.max_model_len))
        yield from (_more_tokens, _more_graphs)
        if self.demand.vocoder_on_card and self.demand.vocoder_process is None:
            yield _with_own_process
        yield _with_enrolment

    def items(self, choice: _Choice) -> tuple[Item, ...]:
        """What everything takes."""
        demand, weights, sizes = self.demand, self.weights, self.estimator.t3_sizes
        cache = cache_bytes(sizes, demand.max_model_len, choice.batch, demand.itemsize)
        contexts = 1 + choice.own_process + choice.enrolment_on_card
        libraries = T3_LIBRARY_BYTES + VOCODER_LIBRARY_BYTES * (demand.vocoder_on_card + choice.enrolment_on_card)
        libraries += AGAIN_BYTES * choice.own_process
        stages = 1 + demand.vocoder_on_card + choice.enrolment_on_card
        activations = _t3_activations(sizes, weights.policy, choice)
        items = [
            Item(f"CUDA contexts, {contexts}", contexts * context_bytes(demand.multiprocessors)),
            Item("libraries and kernels", libraries),
            Item("libraries' workspaces", stages * WORKSPACE_BYTES),
            Item(f"T3's linear layers ({weights.policy.t3})", weights["t3"].after, exact=True),
            Item("T3's embeddings, head, norms, angles", weights["t3_embeddings"].after, exact=True),
            Item(f"T3's cache, {choice.batch} x {demand.max_model_len} positions", cache, exact=True),
            Item(f"T3's activations, {choice.tokens} tokens", activations),
            Item(f"T3's graphs, {len(choice.graphs)} sizes", len(choice.graphs) * T3_GRAPH_BYTES),
        ]
        if demand.vocoder_on_card:
            # In one process, each stage uses what the other one leaves in torch's pieces of memory. Measured.
            shared = 0 if choice.own_process else activations
            items += _vocoder_items(weights, choice, longest_frames(demand.max_model_len), shared)
        if choice.enrolment_on_card:
            items.append(Item("enrolment", weights.at("enrolment") + ENROLMENT_BYTES))
        return tuple(items)

    def _made(self, budget: int, choice: _Choice) -> Plan:
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
                "cudagraph_capture_sizes": list(choice.graphs),
                "compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"},
            },
            vocoder_max_frames=choice.frames if demand.vocoder_on_card else None,
            vocoder_process=choice.own_process if demand.vocoder_on_card else demand.vocoder_process is not False,
            enrolment_device="cuda" if choice.enrolment_on_card else "cpu",
        )


def _more_frames(longest: int) -> Callable[[_Choice], _Choice]:
    """As many as a whole batch brings, at most."""

    def more(choice: _Choice) -> _Choice:
        return replace(choice, frames=max(choice.frames, min(choice.frames + 512, choice.batch * longest, MAX_FRAMES)))

    return more


def _more_tokens(choice: _Choice) -> _Choice:
    most = min(_PROMPT_TOKENS * choice.batch, _MOST_TOKENS)
    return replace(choice, tokens=max(choice.tokens, min(2 * choice.tokens, most)))


def _more_graphs(choice: _Choice) -> _Choice:
    """vLLM's own sizes, so that batches are padded less."""
    sizes = {*range(8, 257, 8), *range(256, _LARGEST_GRAPH + 1, 16)}
    return replace(choice, graphs=tuple(sorted({*choice.graphs, *(size for size in sizes if size <= choice.batch)})))


def _with_own_process(choice: _Choice) -> _Choice:
    """A fault in the vocoder then leaves T3 alone."""
    return replace(choice, own_process=True)


def _with_enrolment(choice: _Choice) -> _Choice:
    return replace(choice, enrolment_on_card=True)


def _t3_activations(sizes: T3Sizes, policy: Policy, choice: _Choice) -> int:
    """Of a full step, of its logits, and a matrix that bitsandbytes decodes."""
    of_width, of_feed_forward = T3_ROW_BYTES
    rows = 2 * choice.tokens * (of_width * sizes.width + of_feed_forward * sizes.feed_forward)
    decoded = 4 * sizes.width * sizes.feed_forward if policy.t3 == Method.BNB_4BIT else 0
    return rows + choice.batch * sizes.vocabulary * _LOGIT_BYTES + decoded


def _vocoder_items(weights: Estimate, choice: _Choice, longest: int, shared: int) -> list[Item]:
    """With so many bytes of its activations shared."""
    frames, room, graphs = choice.frames, _SMALLEST_ROOM, 1
    while room < frames:
        room, graphs = 2 * room, graphs + 1
    methods = (weights.policy.flow_encoder, weights.policy.estimator)
    scratch = 0 if set(methods) == {Method.NONE} else SCRATCH_BYTES
    times, besides = POOL_BYTES
    pools = times * _in_graphs(frames) + besides
    activations = _vocoder_activations(frames, longest)
    # Batches differ in shape, and what one leaves does not fit the next: of all but the longest utterance, as much
    # again. Measured; an utterance alone leaves nothing.
    left_over = activations - _vocoder_activations(longest, longest)
    return [
        Item(f"vocoder's weights ({', '.join(dict.fromkeys(methods))})", weights.at("vocoder"), exact=True),
        Item("vocoder's room and tables", 2 * room * ROW_BYTES + TABLES_BYTES + scratch),
        Item(f"vocoder's activations, {frames} frames", max(0, activations - shared)),
        Item(f"vocoder's graphs, {graphs} sizes of the solver", graphs * SOLVER_GRAPH_BYTES + pools),
        Item("left over in torch's pieces of memory", left_over),
    ]


def _vocoder_activations(frames: int, longest: int) -> int:
    """The encoder and HiFT run one after the other, the latter on a quarter of the frames at once."""
    of_length, of_frame = ENCODER_BYTES
    return max(frames * (of_length * min(longest, frames) + of_frame), _hift_frames(frames) * HIFT_BYTES)


def _in_graphs(frames: int) -> int:
    """Tensors in the largest graph of encoder and HiFT."""
    (tokens, most), (of_length, of_frame) = _CAPTURED, ENCODER_BYTES
    captured = FRAMES_PER_TOKEN * min(tokens, frames // 4)
    return max(captured * (of_length * captured + of_frame), min(most, _hift_frames(frames)) * HIFT_BYTES)


def _hift_frames(frames: int) -> int:
    """That HiFT takes at once, a quarter of so many: the next of 256, 384, 512, 768, ..."""
    wanted = max(FEWEST_IN_PIECES, frames // 4)
    power = 1 << (wanted - 1).bit_length()
    return power * 3 // 4 if wanted <= power * 3 // 4 else power


def _refusal(budget: int, needed: _Sum, strategy: str | None) -> ConfigurationError:
    batch, length = needed.demand.max_batch_size or 1, needed.demand.max_model_len
    items = needed.items(needed.least(batch))
    missing = _total(items) - budget
    name = strategy or needed.policy.strategy or needed.policy.method
    first = (
        f"vram_budget={_shown(budget)} is {missing:,} bytes ({_shown(missing)}) too small for max_batch_size={batch}, "
        f"max_model_len={length} and quantisation {name}; nothing was loaded. It would take"
    )
    remedies = ["what would fit:", *(f"  {remedy}" for remedy in _remedies(budget, needed, batch))]
    return ConfigurationError("\n".join([first, *_lines(items, budget), *remedies]), param="vram_budget")


def _remedies(budget: int, needed: _Sum, batch: int) -> Iterator[str]:
    """One thing changed, the rest as it was asked for."""

    def takes(policy: Policy = needed.policy, **changed: Any) -> int:
        other = _Sum(replace(needed.demand, **{"max_batch_size": batch, **changed}), policy, needed.estimator)
        return other.needs(other.least(other.demand.max_batch_size or 1))

    fewer = range(1, batch)
    if most := bisect_right(fewer, budget, key=lambda each: takes(max_batch_size=each)):
        yield f"max_batch_size={fewer[most - 1]}"
    shorter = range(_SHORTEST, needed.demand.max_model_len, BLOCK)
    if most := bisect_right(shorter, budget, key=lambda each: takes(max_model_len=each)):
        yield f"max_model_len={shorter[most - 1]}"
    if weakest := next((name for name, each in STRATEGIES.items() if takes(each) <= budget), None):
        yield f"quantization_strategy={weakest}"
    if needed.demand.vocoder_process and takes(vocoder_process=False) <= budget:
        yield "vocoder_process=false"
    if needed.demand.vocoder_on_card and takes(vocoder_on_card=False) <= budget:
        yield "vocoder_device=cpu, which is slower"
    yield f"vram_budget={math.ceil(needed.needs(needed.least(batch)) / MIB)}MiB"


def _total(items: Sequence[Item]) -> int:
    return sum(item.bytes for item in items)


def _lines(items: Sequence[Item], budget: int) -> Iterator[str]:
    for item in items:
        yield f"  {item.name:<50}{item.bytes / MIB:>10,.1f} MiB{'' if item.exact else ', about'}"
    yield f"  {'together':<50}{_total(items) / MIB:>10,.1f} MiB"
    yield f"  {'budget':<50}{budget / MIB:>10,.1f} MiB"


def _shown(amount: int) -> str:
    return f"{amount / 2**30:.2f}GiB" if amount >= 2**30 else f"{math.ceil(amount / MIB)}MiB"
