"""What everything takes of a GPU's memory, told before anything is loaded.

    total = contexts + T3 (weights, cache, activations, graphs) + vocoder (weights, room, activations, graphs)

Weights and cache are counted exactly, from the checkpoint's headers. The rest follows from how many tokens and frames
are in work at once, and from the constants below. ``items`` is the sum, line by line, of what is asked for (``Demand``)
and what is chosen (``Choice``); ``budget`` chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from chatterbox_vllm.quantization.estimate import Estimate, Files, QuantizationMemoryEstimator, T3Sizes
from chatterbox_vllm.quantization.policy import Method, Policy
from chatterbox_vllm.t3.positions import OVERHEAD
from chatterbox_vllm.types import MAX_SPEECH_TOKENS
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.stage import FEWEST_IN_PIECES

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
SOLVER_GRAPH_BYTES: Final = 2 * MIB
"""One CUDA graph of the vocoder's solver, outside of torch. Assumed: 0 to 12 MiB were measured for graphs of ten steps,
of which these, of one step, have a tenth of the kernels."""
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
RECORDING_FRAMES: Final = 500
"""Mel frames of a voice's recording, at most."""
_SMALLEST_ROOM: Final = 1_024
"""Frames of the solver's second graph; there is one for fewer, and each further one is for twice as many."""
_CAPTURED: Final = (640, 768)
"""Tokens of the encoder's and frames of HiFT's largest graphs."""
_LOGIT_BYTES: Final = 32
"""For each request and id: logits in half and full precision, what sampling sorts, and counts for the penalty."""


@dataclass(frozen=True)
class Item:
    """A line of the sum; ``exact`` where it is counted in the checkpoint's headers, not estimated."""

    name: str
    bytes: int
    exact: bool = False


@dataclass(frozen=True)
class Demand:
    """What is to be loaded, as far as it is settled.

    Args:
        checkpoint: its files.
        max_batch_size: utterances that T3 speaks at once; None for as many as fit.
        max_model_len: positions of one of them.
        vocoder_process: False has the vocoder run in T3's process; None for a process of its own where there is room.
        vocoder_on_card: False where the vocoder's device is another one than T3's.
        vocoder_workers: of all devices; several cannot share T3's process.
        itemsize, vocoder_itemsize: bytes of a number of the stages' dtypes.
        multiprocessors: of the card; a CUDA context grows with them. An H200 has 132.
        step_graphs: whether a step of T3 that reads prompts can be one graph on the card (``launch.has_step_graphs``).
    """

    checkpoint: Files
    max_batch_size: int | None = None
    max_model_len: int = 2048
    vocoder_process: bool | None = None
    vocoder_on_card: bool = True
    vocoder_workers: int = 1
    itemsize: int = 2
    vocoder_itemsize: int = 2
    multiprocessors: int = 132
    step_graphs: bool = False

    @property
    def needs_own_process(self) -> bool:
        """Whether the vocoder must not be in T3's process."""
        return self.vocoder_process is True or self.vocoder_workers > 1

    @property
    def estimator(self) -> QuantizationMemoryEstimator:
        """Of its checkpoint.

        Raises:
            CheckpointError: a file cannot be read.
        """
        return QuantizationMemoryEstimator(
            self.checkpoint, itemsize=self.itemsize, vocoder_itemsize=self.vocoder_itemsize
        )


@dataclass(frozen=True)
class Choice:
    """What can be chosen; the smaller, the less memory and the slower.

    Args:
        batch: utterances at once.
        tokens: of T3 in one step.
        graphs: batch sizes for which T3 has a CUDA graph.
        step_graphs: positions of a step that may read prompts for which it has one, too.
        frames: the most mel frames that the vocoder has in work at once.
        own_process: whether the vocoder has a process of its own, and so a CUDA context.
        enrolment_on_card: whether new voices are enrolled on the card, in the server's process.
    """

    batch: int
    tokens: int
    graphs: tuple[int, ...]
    frames: int
    own_process: bool
    step_graphs: tuple[int, ...] = ()
    enrolment_on_card: bool = False

    @property
    def t3_graphs(self) -> int:
        """How many T3 has. What reads prompts has all sizes, and decoding those, too, up to a whole batch."""
        sizes = {*self.graphs, *self.step_graphs}
        return len(sizes) + len({min(size, self.batch) for size in sizes}) if self.step_graphs else len(self.graphs)


def items(demand: Demand, choice: Choice, weights: Estimate, sizes: T3Sizes) -> tuple[Item, ...]:
    """What everything takes.

    Args:
        demand: what is to be loaded.
        choice: with what in work at once.
        weights: of all networks, under the policy that is meant.
        sizes: of T3, from the same checkpoint.
    """
    cache = cache_bytes(sizes, demand.max_model_len, choice.batch, demand.itemsize)
    contexts = 1 + choice.own_process + choice.enrolment_on_card
    libraries = T3_LIBRARY_BYTES + VOCODER_LIBRARY_BYTES * (demand.vocoder_on_card + choice.enrolment_on_card)
    libraries += AGAIN_BYTES * choice.own_process
    stages = 1 + demand.vocoder_on_card + choice.enrolment_on_card
    activations = _t3_activations(sizes, weights.policy, choice)
    lines = [
        Item(f"CUDA contexts, {contexts}", contexts * context_bytes(demand.multiprocessors)),
        Item("libraries and kernels", libraries),
        Item("libraries' workspaces", stages * WORKSPACE_BYTES),
        Item(f"T3's linear layers ({weights.policy.t3})", weights["t3"].after, exact=True),
        Item("T3's embeddings, head, norms, angles", weights["t3_embeddings"].after, exact=True),
        Item(f"T3's cache, {choice.batch} x {demand.max_model_len} positions", cache, exact=True),
        Item(f"T3's activations, {choice.tokens} tokens", activations),
        Item(f"T3's graphs, {choice.t3_graphs} of them", choice.t3_graphs * T3_GRAPH_BYTES),
    ]
    if demand.vocoder_on_card:
        # In one process, each stage uses what the other one leaves in torch's pieces of memory. Measured.
        shared = 0 if choice.own_process else activations
        lines += _vocoder_items(weights, choice, longest_frames(demand.max_model_len), shared)
    if choice.enrolment_on_card:
        lines.append(Item("enrolment", weights.at("enrolment") + ENROLMENT_BYTES))
    return tuple(lines)


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
    return RECORDING_FRAMES + FRAMES_PER_TOKEN * min(MAX_SPEECH_TOKENS, max_model_len - OVERHEAD)


def _t3_activations(sizes: T3Sizes, policy: Policy, choice: Choice) -> int:
    """Of a full step, of its logits, and a matrix that bitsandbytes decodes."""
    of_width, of_feed_forward = T3_ROW_BYTES
    rows = 2 * choice.tokens * (of_width * sizes.width + of_feed_forward * sizes.feed_forward)
    decoded = 4 * sizes.width * sizes.feed_forward if policy.t3 == Method.BNB_4BIT else 0
    return rows + choice.batch * sizes.vocabulary * _LOGIT_BYTES + decoded


def _vocoder_items(weights: Estimate, choice: Choice, longest: int, shared: int) -> list[Item]:
    """With so many bytes of its activations shared."""
    frames, room, graphs = choice.frames, _SMALLEST_ROOM, 2
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
