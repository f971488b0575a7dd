"""T3 files in few bits: which of their tensors are quantised, how vLLM is told, and conversions kept in the cache.

vLLM quantises while it loads (``bnb-4bit``, ``fp8``), or loads what was quantised before (``packing.STORABLE``). Of the
latter, int8 and bnb-8bit are plain rounding: a checkpoint is converted on first use. AWQ needs calibration, which is
a command's work (``chatterbox_vllm.convert``).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chatterbox_vllm.checkpoint import unusable_cache
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import Method

if TYPE_CHECKING:
    from torch import Tensor

    from chatterbox_vllm.t3.config import T3Config

logger = logging.getLogger(__name__)
_VERSION = 2
"""Counts the changes to what a conversion writes."""
_SCRATCH: Final = ".quantize-"
_ABANDONED: Final = 3600.0
"""Seconds after which nobody is still writing: that takes seconds or minutes."""


def linear_layers(config: T3Config) -> dict[str, tuple[int, int]]:
    """Stem to (outputs, inputs) of every matrix that a method quantises: the Llama's, without embeddings and head."""
    width, inner = config.hidden_size, config.intermediate_size
    sizes = {f"self_attn.{name}_proj": (width, width) for name in "qkvo"}
    sizes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    return {
        f"tfmr.layers.{layer}.{name}": size for layer in range(config.num_hidden_layers) for name, size in sizes.items()
    }


def vllm_quantization(stored: Stored) -> dict[str, Any]:
    """The ``quantization_config`` of a Hugging Face config.json, by which vLLM knows what it loads."""
    eight: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    four = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": stored.group_size}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": four if stored.method == Method.AWQ else eight,
        "input_activations": inputs if stored.method == Method.INT8 else None,
    }
    layout = "int-quantized" if stored.method == Method.INT8 else "pack-quantized"
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


def encoded(tensors: Iterable[tuple[str, Tensor]], stored: Stored, config: T3Config) -> dict[str, Tensor]:
    """A T3 file's tensors with its linear layers stored as ``stored``; the others as they are."""
    weights = {f"{stem}.weight": stem for stem in linear_layers(config)}
    result: dict[str, Tensor] = {}
    for name, tensor in tensors:
        result |= stored.encode(weights[name], tensor) if name in weights else {name: tensor}
    return {name: tensor.contiguous() for name, tensor in result.items()}


def converted(weights: Path, method: str, config: T3Config, cache: Path) -> Path:
    """A T3 file like ``weights`` whose linear layers are quantised by ``method``; written once for each file.

    What the cache holds in its place but cannot be read, or is quantised otherwise, is replaced.

    Args:
        weights: an unquantised T3 file, checked by ``infer_config``.
        method: int8 or bnb-8bit.
        cache: where conversions are kept. What fails leaves nothing there.

    Raises:
        ConfigurationError: ``cache`` cannot be written to, for instance because it is full.
    """
    try:
        source, state = weights.resolve(), weights.stat()
        identity = f"{source}\n{state.st_size}\n{state.st_mtime_ns}\n{method}\n{_VERSION}"
        target = cache / "t3-quantized" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.safetensors"
        _remove_abandoned(target.parent)
        if not _holds(target, Stored(method)):
            logger.info("converting T3 to %s, once, into %s", method, target)
            target.parent.mkdir(parents=True, exist_ok=True)
            with safe_open(source, "pt") as file:
                one_by_one = ((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
                tensors = encoded(one_by_one, Stored(method), config)
            write(target, tensors, Stored(method))
    except OSError as error:
        raise unusable_cache(error) from error
    return target


def _holds(path: Path, stored: Stored) -> bool:
    try:
        return path.is_file() and Stored.of(path) == stored
    except CheckpointError:
        logger.warning("%s is cut short or damaged and is written anew", path)
        return False


def _remove_abandoned(folder: Path) -> None:
    """What processes left that were killed while they wrote; by age, as pids of other containers mean nothing here."""
    for scratch in folder.glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # another process was faster
            written = max(path.stat().st_mtime for path in (scratch, *scratch.iterdir()))
            if time.time() - written > _ABANDONED:
                shutil.rmtree(scratch)


def write(path: Path, tensors: Mapping[str, Tensor], stored: Stored) -> None:
    """The whole file or none of it; raises OSError."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH) as scratch:
        fresh = Path(scratch) / path.name
        try:
            save_file(dict(tensors), fresh, metadata={"format": "pt", **stored.metadata()})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path} cannot be written: {error}") from error
        fresh.chmod(0o644)  # safetensors lets nobody else read
        with fresh.open("rb") as file:
            os.fsync(file.fileno())  # else the name can outlive a power cut, and the content not
        fresh.replace(path)
