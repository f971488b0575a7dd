"""``chatterbox-vllm quantize MODEL OUT``: writes a checkpoint whose T3 is in few bits.

OUT is a whole checkpoint in upstream's layout: its T3 file is quantised and says so in its header, and the other files
are MODEL's, as hard links where the file system has them. ``serve --model OUT`` needs no further flag.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.bench import sentences
from chatterbox_vllm.checkpoint import DEMO_MARKER, Checkpoint, load_tensors, resolve
from chatterbox_vllm.convert.calibration import record
from chatterbox_vllm.errors import CheckpointError, ConfigurationError
from chatterbox_vllm.evaluate.t3 import PlainT3
from chatterbox_vllm.quantization.awq import scale_layer
from chatterbox_vllm.quantization.packing import GROUP_SIZES, STORABLE, Stored
from chatterbox_vllm.quantization.policy import Method
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.conversion import encoded, write
from chatterbox_vllm.t3.folder import infer_config
from chatterbox_vllm.text.frontend import TextFrontend
from chatterbox_vllm.text.tokenise import load_tokenizer
from chatterbox_vllm.types import MAX_SPEECH_TOKENS, VoiceFeatures
from chatterbox_vllm.voices.features import load_conds

TEXTS: Final = 4
"""Calibration texts of our own, of a few seconds each."""
_SECONDS: Final = 6.0
TOKENS: Final = 100
"""Speech tokens of each, unless asked otherwise."""
_OF_AWQ: Final = ("group_size", "texts", "language", "tokens", "device")
"""Options without a meaning for the other methods."""


@dataclass(frozen=True)
class Report:
    """What a quantisation did.

    Args:
        folder: the new checkpoint.
        before, after: bytes of the T3 file.
        error: squared output error of AWQ's layers on the calibration, by that of plain rounding; None without AWQ.
    """

    folder: Path
    before: int
    after: int
    error: float | None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="chatterbox-vllm quantize", description=__doc__)
    made.add_argument("model", metavar="MODEL", help="as for serve: a folder, a name, demo")
    made.add_argument("out", metavar="OUT", type=Path, help="the folder to write; new or empty")
    made.add_argument(
        "--method", choices=[str(each) for each in STORABLE], default=str(Method.AWQ), help="default: %(default)s"
    )
    made.add_argument("--group-size", type=int, choices=GROUP_SIZES, help="awq: inputs that share a scale")
    made.add_argument("--texts", type=Path, help="awq: calibration texts, one a line; default: a few of our own")
    made.add_argument("--language", help="awq: language of the texts, for a multilingual model; default: en")
    made.add_argument("--tokens", type=int, help=f"awq: speech tokens a text; default: {TOKENS}")
    made.add_argument(
        "--device", choices=("cpu", "cuda"), help="awq: where to calibrate; default: cuda if there is one"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    arguments = parser().parse_args(argv)
    if arguments.method != Method.AWQ:
        _refuse_options_of_awq(arguments)
    report = quantize(
        resolve(arguments.model),
        arguments.out,
        method=arguments.method,
        group_size=arguments.group_size,
        texts=None if arguments.texts is None else sentences.read(arguments.texts, "--texts"),
        language=arguments.language,
        tokens=TOKENS if arguments.tokens is None else arguments.tokens,
        device=arguments.device,
    )
    print(f"{report.folder}: T3 is {arguments.method}, {report.before / 1e6:.0f} MB -> {report.after / 1e6:.0f} MB")
    if report.error is not None:
        print(f"output error of its linear layers on the calibration: {report.error:.2f} of plain rounding's")
    return 0


def _refuse_options_of_awq(arguments: argparse.Namespace) -> None:
    for name in _OF_AWQ:
        if getattr(arguments, name) is not None:
            option, method = f"--{name.replace('_', '-')}", arguments.method
            does = "it has no groups" if name == "group_size" else "it needs no calibration"
            raise ConfigurationError(
                f"{option} is for --method awq and has no effect on {method}: {does}; leave it out", param=option
            )


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    *,
    method: str = Method.AWQ,
    group_size: int | None = None,
    texts: Sequence[str] | None = None,
    language: str | None = None,
    tokens: int = TOKENS,
    device: str | None = None,
) -> Report:
    """Writes ``checkpoint`` to the folder ``out`` with its T3 quantised; on an error nothing is left there.

    Args:
        method: one of ``packing.STORABLE``.
        group_size: for awq, inputs that share a scale; default: the largest of ``GROUP_SIZES`` that divides T3's.
        texts: for awq, what the calibration speaks.
        language: of ``texts``; default: English.
        tokens: speech tokens of each text.
        device: for awq, where it computes.

    Raises:
        CheckpointError: T3's file is wrong, quantised already, or the built-in voice is missing, as which the
            calibration speaks.
        ConfigurationError: ``out`` holds something or cannot be written; or a value does not fit.
        InvalidRequest: a text cannot be spoken.
    """
    config = infer_config(checkpoint.t3)
    if Stored.of(checkpoint.t3).method != Method.NONE:
        raise CheckpointError(f"{checkpoint.t3} is quantised already; give the checkpoint it was made from")
    out = out.expanduser().resolve()
    if not 1 <= tokens <= MAX_SPEECH_TOKENS:
        raise ConfigurationError(f"--tokens must be from 1 to {MAX_SPEECH_TOKENS}, not {tokens}", param="--tokens")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(f"{out} exists and is not an empty folder; name a new one", param="OUT")
    stored = Stored(method, _group_size(config, group_size) if method == Method.AWQ else 0)
    tensors = load_tensors(checkpoint.t3)
    error = None
    if method == Method.AWQ:
        voice, spoken = _voice(checkpoint), _spoken(checkpoint, texts, language)
        t3 = PlainT3(tensors, checkpoint.t3, Method.NONE, _device(device))
        error = _scale(tensors, record(t3, spoken, voice, tokens), stored.group_size)
    try:
        after = _write_folder(checkpoint, out, encoded(tensors.items(), stored, config), stored)
    except OSError as fault:
        raise ConfigurationError(f"{out} cannot be written: {fault}", param="OUT") from fault
    return Report(out, checkpoint.t3.stat().st_size, after, error)


def _device(asked: str | None) -> str:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device=cuda: torch finds no NVIDIA GPU here; leave it out", param="--device")
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _group_size(config: T3Config, asked: int | None) -> int:
    widths = (config.hidden_size, config.intermediate_size)
    fitting = [size for size in GROUP_SIZES if not any(width % size for width in widths)]
    if asked is None and fitting:
        return fitting[0]
    if asked not in fitting:
        raise ConfigurationError(
            f"groups of {asked} do not divide T3's widths {widths[0]} and {widths[1]}; use {fitting}",
            param="--group-size",
        )
    return asked


def _voice(checkpoint: Checkpoint) -> VoiceFeatures:
    if checkpoint.conds is None:
        raise CheckpointError(f"{checkpoint.folder} lacks conds.pt, the voice as which the calibration speaks")
    return load_conds(checkpoint.conds)


def _spoken(checkpoint: Checkpoint, texts: Sequence[str] | None, language: str | None) -> list[list[int]]:
    """Ids of each text, without start and stop."""
    frontend = TextFrontend(load_tokenizer(checkpoint), multilingual=checkpoint.variant.is_multilingual)
    chosen = [sentences.text(seed, _SECONDS) for seed in range(TEXTS)] if texts is None else texts
    return [frontend.one(text, language or "en", param="--texts") for text in chosen]


def _scale(tensors: dict[str, Tensor], activations: list[dict[str, Tensor]], group_size: int) -> float:
    """Scales every layer of ``tensors`` in place; returns the error by that of plain rounding."""
    error = plain = 0.0
    for index, inputs in enumerate(activations):
        prefix = f"tfmr.layers.{index}."
        device = next(iter(inputs.values())).device
        layer = {name.removeprefix(prefix): each.to(device) for name, each in _under(tensors, prefix)}
        scaled = scale_layer(layer, inputs, group_size)
        tensors |= {f"{prefix}{name}": weight.cpu() for name, weight in scaled.weights.items()}
        error, plain = error + scaled.error, plain + scaled.plain_error
    return error / plain


def _under(tensors: dict[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in tensors.items() if name.startswith(prefix))


def _write_folder(checkpoint: Checkpoint, out: Path, tensors: dict[str, Tensor], stored: Stored) -> int:
    staging = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}")
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        staging.mkdir(parents=True)
        write(staging / checkpoint.t3.name, tensors, stored)
        marker = checkpoint.folder / DEMO_MARKER if checkpoint.is_demo else None
        same = (checkpoint.s3gen, checkpoint.voice_encoder, checkpoint.tokenizer)
        for file in (*same, checkpoint.conds, checkpoint.cangjie, marker):
            if file is not None:
                _link(file, staging / file.name)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # it was not come to, or somebody else has put something there
                folder.rmdir()
        raise
    return (out / checkpoint.t3.name).stat().st_size


def _link(file: Path, target: Path) -> None:
    """A hard link, which outlives the hub's cache and takes no room; a copy where there can be none."""
    try:
        target.hardlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)
