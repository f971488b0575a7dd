"""What a checkpoint's networks weigh in memory under a policy, told from the files' headers alone.

A tensor's name decides which component it belongs to and in which form the engine keeps it (``_RULES``); the method
decides how many bytes a matrix then takes (``COSTS``). No weight is read, and no GPU is needed.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, Protocol

from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.quantization.packing import PACKED, WORD, Stored
from chatterbox_vllm.quantization.policy import STRATEGIES, Method, Policy

COMPONENTS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "t3": ("t3", "T3's linear layers"),
        "t3_embeddings": ("t3", "T3's embeddings, head, norms and angles"),
        "t3_conditioning": ("host", "T3's conditioning, on the CPU"),
        "flow_encoder": ("vocoder", "the flow's encoder"),
        "estimator": ("vocoder", "the flow's estimator"),
        "estimator_time": ("host", "the estimator's time embedding, on the CPU"),
        "hift": ("vocoder", "HiFT"),
        "vocoder_other": ("vocoder", "the flow's embedding and projections"),
        "voice_encoder": ("enrolment", "the voice encoder"),
        "enrolment": ("enrolment", "speech tokenizer and speaker encoder"),
    }
)
"""Component to where it is kept, and what it is. ``host`` is never on the card, ``enrolment`` where enrolment runs."""


class Cost(NamedTuple):
    """What a quantised matrix of (outputs, inputs) takes.

    Args:
        bits: of one weight.
        row: bytes for an output, such as a scale.
        block: inputs that share a scale; 0 for none.
        scale: bytes for a block.
    """

    bits: int
    row: int = 0
    block: int = 0
    scale: float = 0.0

    def of(self, shape: Shape) -> int:
        """Bytes of a matrix."""
        weights = math.prod(shape)
        blocks = -(-weights // self.block) if self.block else 0
        return -(-weights * self.bits // 8) + self.row * shape[0] + math.ceil(self.scale * blocks)


_NESTED: Final = 1 + 4 / 256
"""Bytes of a doubly quantised scale: 8 bits, and one float32 for 256 of them."""
COSTS: Final[Mapping[tuple[str, str], Cost]] = MappingProxyType(
    {
        # vllm-bnb-plugin quantises the scales, too, but turns them back to float32 while it loads.
        ("t3", Method.BNB_4BIT): Cost(4, block=64, scale=4),
        ("t3", Method.BNB_8BIT): Cost(8, row=2),
        # A group has a 16-bit scale and a 4-bit zero point; of 128 weights, unless the file says otherwise.
        ("t3", Method.AWQ): Cost(4, block=128, scale=2.5),
        ("t3", Method.INT8): Cost(8, row=4),
        # One scale for a matrix: nothing beside the weights.
        ("t3", Method.FP8): Cost(8),
        ("vocoder", Method.BNB_4BIT): Cost(4, block=64, scale=_NESTED),
        ("vocoder", Method.BNB_8BIT): Cost(8, row=4),
        ("vocoder", Method.INT8): Cost(8, row=4),
        ("enrolment", Method.BNB_4BIT): Cost(4, block=64, scale=_NESTED),
        ("enrolment", Method.BNB_8BIT): Cost(8, row=4),
        ("enrolment", Method.INT8): Cost(8, row=4),
    }
)
"""(Where, method) to what it costs. A method of vLLM's own that is not here is taken to save nothing."""


class _Kept(Enum):
    """In which form the engine has a tensor."""

    LINEAR = auto()  # as the policy says
    HALF = auto()  # in the stage's dtype
    FULL = auto()  # in float32
    NOT = auto()


Shape = tuple[int, ...]
_Rule = tuple[str, str, _Kept]
_T3: Final[list[_Rule]] = [
    (r"^(tfmr\.embed_tokens|text_head)\.", "", _Kept.NOT),
    (r"^cond_enc\.", "t3_conditioning", _Kept.FULL),
    (r"^tfmr\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight(_packed)?$", "t3", _Kept.LINEAR),
    (r"norm\.weight$", "t3_embeddings", _Kept.FULL),
    (r"^tfmr\.layers\.", "", _Kept.NOT),  # scales of a quantised file: they are in ``COSTS``
    (r"", "t3_embeddings", _Kept.HALF),
]
_S3GEN: Final[list[_Rule]] = [
    (r"^(tokenizer|speaker_encoder)\.", "enrolment", _Kept.FULL),
    (r"\.parametrizations\.weight\.original0$", "", _Kept.NOT),  # multiplied into original1
    (r"^mel2wav\.", "hift", _Kept.FULL),
    (r"coders\.\d+\.(self_attn\.linear_\w+|feed_forward\.w_\d)\.weight$", "flow_encoder", _Kept.LINEAR),
    (r"^flow\.encoder\.", "flow_encoder", _Kept.FULL),
    (r"^flow\.decoder\.estimator\.(time_mlp|\w+_blocks\.\d+\.0\.mlp)\.", "estimator_time", _Kept.FULL),
    (r"^flow\.decoder\.estimator\..*\.(to_[qkv]|to_out\.0|proj|net\.2)\.weight$", "estimator", _Kept.LINEAR),
    (r"^flow\.decoder\.estimator\..*weight$", "estimator", _Kept.HALF),
    (r"^flow\.decoder\.", "estimator", _Kept.FULL),
    (r"", "vocoder_other", _Kept.FULL),
]
_VOICE_ENCODER: Final[list[_Rule]] = [
    (r"^proj\.weight$", "voice_encoder", _Kept.LINEAR),
    (r"", "voice_encoder", _Kept.FULL),
]
_COPIED: Final = ("speech_emb.weight", "speech_pos_emb.emb.weight")
"""Tensors of which the conditioning has a copy in float32."""
_ANGLES: Final = (16_384, 128)
"""T3's rotary table, float32, which no file has."""


class Files(Protocol):
    """What is asked of a ``checkpoint.Checkpoint``."""

    @property
    def t3(self) -> Path: ...
    @property
    def s3gen(self) -> Path: ...
    @property
    def voice_encoder(self) -> Path: ...


@dataclass(frozen=True)
class Part:
    """One component.

    Args:
        component: a key of ``COMPONENTS``.
        method: of its linear layers; "none" where there are none to quantise.
        layers: how many linear layers are quantised.
        before: bytes without quantisation.
        after: bytes with it.
    """

    component: str
    method: str
    layers: int
    before: int
    after: int

    @property
    def place(self) -> str:
        """``t3``, ``vocoder``, ``enrolment`` or ``host``."""
        return COMPONENTS[self.component][0]


@dataclass(frozen=True)
class Estimate:
    """What all components weigh under ``policy``."""

    policy: Policy
    parts: tuple[Part, ...]

    def at(self, *places: str) -> int:
        """Bytes that are kept at ``places`` (see ``Part.place``)."""
        return sum(part.after for part in self.parts if part.place in places)

    @property
    def card(self) -> int:
        """Bytes of T3 and the vocoder, which are always on the card."""
        return self.at("t3", "vocoder")

    @property
    def saved(self) -> int:
        """Bytes less than without quantisation, wherever they are."""
        return sum(part.before - part.after for part in self.parts)

    def __getitem__(self, component: str) -> Part:
        return next(part for part in self.parts if part.component == component)

    def table(self) -> str:
        """A line for each component."""
        lines = [f"{'':<44} {'method':>10} {'layers':>7} {'before':>10} {'after':>10}  MiB"]
        for part in self.parts:
            text = COMPONENTS[part.component][1]
            sizes = f"{part.before / 2**20:>10,.1f} {part.after / 2**20:>10,.1f}"
            lines.append(f"{text:<44} {part.method:>10} {part.layers or '':>7} {sizes}")
        return "\n".join(lines)


@dataclass(frozen=True)
class T3Sizes:
    """Of the Llama, told from the tensors' shapes."""

    layers: int
    width: int
    feed_forward: int
    vocabulary: int


class QuantizationMemoryEstimator:
    """Weighs one checkpoint.

    Args:
        checkpoint: its files. A T3 file that is quantised already weighs what it weighs, whatever a policy says of T3.
        itemsize: bytes of a number of T3's dtype: 2 on a GPU, 4 on a CPU.
        vocoder_itemsize: the same of the vocoder.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, checkpoint: Files, *, itemsize: int = 2, vocoder_itemsize: int = 2) -> None:
        self._stored = Stored.of(checkpoint.t3) if checkpoint.t3.suffix == ".safetensors" else Stored()
        t3 = _unpacked(read_shapes(checkpoint.t3), self._stored.method)
        self._sizes = {"t3": itemsize, "host": 4, "vocoder": vocoder_itemsize, "enrolment": 4}
        self._tensors = [
            *_sorted(t3, _T3),
            ("t3_embeddings", _Kept.FULL, _ANGLES),
            *(("t3_conditioning", _Kept.FULL, t3[name]) for name in _COPIED if name in t3),
            *_sorted(read_shapes(checkpoint.s3gen), _S3GEN),
            *_sorted(read_shapes(checkpoint.voice_encoder), _VOICE_ENCODER),
        ]
        self.t3_sizes = _t3_sizes(t3, checkpoint.t3)

    def estimate(self, policy: Policy) -> Estimate:
        """What the engine will keep under ``policy``."""
        if self._stored.method != Method.NONE:
            policy = policy.but(t3=self._stored.method)
        methods = policy.methods
        return Estimate(policy, tuple(self._part(name, methods.get(name, Method.NONE)) for name in COMPONENTS))

    def compare_strategies(self) -> dict[str, Estimate]:
        """Each strategy by its name, ``none`` first."""
        return {name: self.estimate(policy) for name, policy in STRATEGIES.items()}

    def _part(self, component: str, method: str) -> Part:
        place = COMPONENTS[component][0]
        own = [(kept, shape) for name, kept, shape in self._tensors if name == component]
        cost, size = COSTS.get((place, method)), self._sizes[place]
        if cost is not None and place == "t3" and self._stored.group_size:
            cost = cost._replace(block=self._stored.group_size)
        linear = [shape for kept, shape in own if kept is _Kept.LINEAR]
        before = sum(math.prod(shape) * (4 if kept is _Kept.FULL else size) for kept, shape in own)
        saved = sum(math.prod(shape) * size - cost.of(shape) for shape in linear) if cost is not None else 0
        return Part(component, method, len(linear) if method != Method.NONE else 0, before, before - saved)


def table(estimates: Iterable[Estimate]) -> str:
    """A line for each estimate: what is where, in MiB."""
    places = ("t3", "vocoder", "enrolment", "host")
    lines = [f"{'weights, MiB':<14}" + "".join(f"{place:>11}" for place in (*places, "saved"))]
    for estimate in estimates:
        numbers = [*(estimate.at(place) for place in places), estimate.saved]
        name = estimate.policy.strategy or estimate.policy.method
        lines.append(f"{name:<14}" + "".join(f"{number / 2**20:>11,.1f}" for number in numbers))
    return "\n".join(lines)


def read_shapes(path: Path) -> dict[str, Shape]:
    """The tensors of a ``.safetensors`` or ``.pt`` file, by name; of their values nothing is read.

    Raises:
        CheckpointError: the file is missing, cut short, or holds something else.
    """
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)


def _of_safetensors(path: Path) -> dict[str, Shape]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); get it anew") from error


def _of_pickle(path: Path) -> dict[str, Shape]:
    import torch

    try:
        # Mapped into memory, so that only the pickle is read; what is no zip is of an older format that cannot be.
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, struct.error) as error:
        raise CheckpointError(f"{path} cannot be read as a file of torch.save ({error}); get it anew") from error
    if isinstance(loaded, dict) and set(loaded) == {"model"}:
        loaded = loaded["model"]
    if isinstance(loaded, list) and len(loaded) == 1:
        loaded = loaded[0]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} holds something other than named tensors")
    return {key: tuple(value.shape) for key, value in loaded.items()}


def _unpacked(shapes: Mapping[str, Shape], method: str) -> dict[str, Shape]:
    """With each matrix's own shape in place of its packed one, several weights an int32."""
    if method not in PACKED:
        return dict(shapes)
    codes = WORD // PACKED[Method(method)]
    return {
        name: (shape[0], codes * shape[1]) if name.endswith(".weight_packed") else shape
        for name, shape in shapes.items()
    }


def _sorted(shapes: Mapping[str, Shape], rules: list[_Rule]) -> Iterator[tuple[str, _Kept, Shape]]:
    for name, shape in shapes.items():
        component, kept = next((component, kept) for pattern, component, kept in rules if re.search(pattern, name))
        if kept is not _Kept.NOT:
            yield component, kept, shape


def _t3_sizes(shapes: Mapping[str, Shape], file: Path) -> T3Sizes:
    up = re.compile(r"^tfmr\.layers\.\d+\.mlp\.up_proj\.weight(_packed)?$")  # and not its scales
    inner = [shape[0] for name, shape in shapes.items() if up.search(name)]
    try:
        return T3Sizes(
            layers=len(inner),
            width=shapes["speech_emb.weight"][1],
            feed_forward=inner[0],
            vocabulary=shapes["speech_emb.weight"][0] + shapes["text_emb.weight"][0] + 1,
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{file} is not a T3 checkpoint: it lacks {error}") from error
