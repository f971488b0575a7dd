"""Writes a demo checkpoint: all files into a folder beside the wanted one, which then takes its place."""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from chatterbox_vllm.checkpoint import CANGJIE, CONDS, DEMO_MARKER, FILES, Checkpoint, Variant, locate
from chatterbox_vllm.demo_checkpoint import RECIPE, networks
from chatterbox_vllm.demo_checkpoint.tokenizers import cangjie_table, english_tokenizer, multilingual_tokenizer
from chatterbox_vllm.demo_checkpoint.voice import save_voice
from chatterbox_vllm.demo_checkpoint.weights import draw
from chatterbox_vllm.errors import CheckpointError

logger = logging.getLogger(__name__)

_SAFETENSORS_TYPES = {torch.float32: "F32", torch.int64: "I64"}
_NOTE = "Random weights: this checkpoint speaks noise."
_CANGJIE_NOTE = " Cangjie5_TC.json holds a few dozen common characters only."


def write(folder: Path, *, size: networks.Size, variant: Variant, seed: int, replace: bool) -> Checkpoint:
    """Mirrors ``write_demo``; without ``replace`` a demo that another process finished first is left in place."""
    if size not in networks.SIZES:
        raise CheckpointError(f"no demo of size {size!r}; there are {', '.join(networks.SIZES)}")
    folder = folder.resolve()  # "." has no name
    try:
        _write(folder, size, variant, seed, replace=replace)
    except OSError as error:
        raise CheckpointError(f"{folder}: the demo checkpoint cannot be written: {error}") from error
    return locate(folder, variant)


def _write(folder: Path, size: networks.Size, variant: Variant, seed: int, *, replace: bool) -> None:
    _refuse_others(folder)
    staging = _beside(folder)
    logger.info("Writing the %s %s demo checkpoint (random weights, speaks noise) to %s", size, variant, folder)
    try:
        staging.mkdir(parents=True)
        _write_files(staging, size, variant, seed)
        _put_in_place(staging, folder, replace=replace)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_others(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder for the demo checkpoint")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / DEMO_MARKER).is_file():
        raise CheckpointError(f"{folder} holds something other than a demo checkpoint; name an empty or new folder")


def _beside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}")


def _put_in_place(staging: Path, folder: Path, *, replace: bool) -> None:
    try:
        staging.rename(folder)  # takes the place of nothing, or of an empty folder
    except OSError:
        if not folder.is_dir():
            raise
        _refuse_others(folder)
        if not replace:
            return
        retired = _beside(folder)
        folder.rename(retired)
        staging.rename(folder)
        shutil.rmtree(retired)


def _write_files(folder: Path, size: networks.Size, variant: Variant, seed: int) -> None:
    names = FILES[variant]
    device = "meta" if size == "full" else "cpu"  # small networks are made faster than they are imagined
    with torch.random.fork_rng(devices=[]), torch.device(device):
        parts = {
            names.t3: networks.t3(size, multilingual=variant.is_multilingual),
            names.s3gen: networks.s3gen(size),
            names.voice_encoder: networks.voice_encoder(),
        }
    for name, network in parts.items():
        _write_weights(folder / name, network, seed)
    save_voice(folder / CONDS, prompt_tokens=networks.SIZES[size].prompt_tokens, seed=seed)
    tokenizer = multilingual_tokenizer() if variant.is_multilingual else english_tokenizer()
    _write_json(folder / names.tokenizer, tokenizer)
    if variant.is_multilingual:
        _write_json(folder / CANGJIE, cangjie_table())
    note = _NOTE + (_CANGJIE_NOTE if variant.is_multilingual else "")
    _write_json(folder / DEMO_MARKER, {"size": size, "variant": variant, "seed": seed, "recipe": RECIPE, "note": note})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _write_weights(path: Path, network: nn.Module, seed: int) -> None:
    like = network.state_dict()
    if path.suffix == ".safetensors":
        _write_safetensors(path, like, seed)
    else:
        torch.save({name: draw(path.name, name, tensor, seed) for name, tensor in like.items()}, path)
    logger.info("Wrote %s, %.1f MB", path.name, path.stat().st_size / 1e6)


def _write_safetensors(path: Path, like: Mapping[str, Tensor], seed: int) -> None:
    """Tensor by tensor, so that two gigabytes on disk need a few megabytes of memory."""
    names = sorted(like, key=lambda name: -like[name].element_size())  # keeps eight-byte numbers aligned
    header, end = {}, 0
    for name in names:
        tensor = like[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            file.write(draw(path.name, name, like[name], seed).numpy().data)
