"""Checkpoints: which files a variant has, where they are, and loading them strictly.

The files and their names are those of upstream's ``from_local`` and ``from_pretrained``. Unlike there, a missing,
unexpected or misshapen key is an error that names it and its file, a ``.pt`` file is read with ``weights_only``, and
nothing is written but to the caches of the hub and of this package.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from chatterbox_vllm.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from torch import Tensor, nn

REPOSITORY: Final = "ResembleAI/chatterbox"
CONDS: Final = "conds.pt"
CANGJIE: Final = "Cangjie5_TC.json"
DEMO_MARKER: Final = "DEMO.json"
"""Written beside random weights, so that nobody takes them for trained ones."""
_UNREADABLE: Final = (
    *(OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError, struct.error),
    *(KeyError, IndexError, AssertionError, AttributeError, TypeError),
)
"""What ``torch.load`` raises for files that are damaged in one place or another."""
DERIVED_KEYS: Final = frozenset({"tokenizer._mel_filters", "tokenizer.window"})
"""Keys of S3Gen that a file may lack: they are computed, and upstream ignores their absence."""


class Variant(StrEnum):
    """A model that this package speaks with."""

    ENGLISH = "english"
    MULTILINGUAL = "multilingual"
    MULTILINGUAL_V3 = "multilingual-v3"

    @property
    def is_multilingual(self) -> bool:
        return self is not Variant.ENGLISH


def as_variant(value: str) -> Variant:
    """The variant of that name.

    Raises:
        CheckpointError: there is none; the message names those there are.
    """
    if value not in list(Variant):
        raise CheckpointError(f"no variant {value!r}; there are {', '.join(Variant)}")
    return Variant(value)


@dataclass(frozen=True)
class FileNames:
    """The files without which a variant cannot speak."""

    t3: str
    s3gen: str
    voice_encoder: str
    tokenizer: str

    def all(self) -> tuple[str, ...]:
        return (self.t3, self.s3gen, self.voice_encoder, self.tokenizer)


_GRAPHEMES: Final = "grapheme_mtl_merged_expanded_v1.json"
FILES: Final[dict[Variant, FileNames]] = {
    Variant.ENGLISH: FileNames("t3_cfg.safetensors", "s3gen.safetensors", "ve.safetensors", "tokenizer.json"),
    Variant.MULTILINGUAL: FileNames("t3_mtl23ls_v2.safetensors", "s3gen.pt", "ve.pt", _GRAPHEMES),
    Variant.MULTILINGUAL_V3: FileNames("t3_mtl23ls_v3.safetensors", "s3gen.pt", "ve.pt", _GRAPHEMES),
}


@dataclass(frozen=True)
class Checkpoint:
    """The files of one variant; every path exists.

    Args:
        conds: the built-in voice; upstream's folders may lack it.
        cangjie: the table of Chinese input codes; only Chinese needs it.
        is_demo: the weights are random and speak noise.
    """

    folder: Path
    variant: Variant
    t3: Path
    s3gen: Path
    voice_encoder: Path
    tokenizer: Path
    conds: Path | None
    cangjie: Path | None
    is_demo: bool


def locate(folder: str | Path, variant: Variant | None = None) -> Checkpoint:
    """The checkpoint in ``folder``, mirroring upstream's ``from_local``.

    Args:
        variant: None takes the first of ``Variant`` whose files are all there.

    Raises:
        CheckpointError: the folder, or a file the variant cannot do without, is missing; each is named.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give one that holds a checkpoint's files")
    variant = as_variant(variant) if variant else _detect(folder)
    if missing := _missing(folder, variant):
        raise CheckpointError(f"{folder} lacks {', '.join(missing)} of the {variant} checkpoint")
    names = FILES[variant]
    return Checkpoint(
        folder=folder,
        variant=variant,
        t3=folder / names.t3,
        s3gen=folder / names.s3gen,
        voice_encoder=folder / names.voice_encoder,
        tokenizer=folder / names.tokenizer,
        conds=_optional(folder / CONDS),
        cangjie=_optional(folder / CANGJIE) if variant.is_multilingual else None,
        is_demo=(folder / DEMO_MARKER).is_file(),
    )


def _optional(path: Path) -> Path | None:
    return path if path.is_file() else None


def _missing(folder: Path, variant: Variant) -> list[str]:
    return [name for name in FILES[variant].all() if not (folder / name).is_file()]


def _detect(folder: Path) -> Variant:
    missing = {variant: _missing(folder, variant) for variant in Variant}
    for variant, names in missing.items():
        if not names:
            return variant
    lacks = "; ".join(f"{variant} lacks {', '.join(names)}" for variant, names in missing.items())
    raise CheckpointError(f"{folder} holds no complete checkpoint: {lacks}")


def download(
    variant: Variant, *, repo_id: str = REPOSITORY, revision: str | None = None, token: str | None = None
) -> Checkpoint:
    """The checkpoint from the Hugging Face hub. Shows progress.

    What its cache holds is not loaded again. A hub that cannot be reached does no harm if the cache holds everything.

    Args:
        repo_id: repository with upstream's file names.
        revision: branch, tag or commit; None is the default branch.
        token: access token; None uses HF_TOKEN or the one stored by ``hf auth login``.

    Raises:
        CheckpointError: the hub cannot be reached, refuses, or lacks a file.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    variant = as_variant(variant)
    wanted = [*FILES[variant].all(), CONDS, *([CANGJIE] if variant.is_multilingual else [])]
    try:
        folder = snapshot_download(repo_id, revision=revision, allow_patterns=wanted, token=token)
    except HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not the name of a repository: {error}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"the hub refused {repo_id}: {error}; check its name and revision, and set HF_TOKEN if it needs one"
        ) from error
    except (HTTPError, OSError, RuntimeError) as error:  # the last are hf_xet's
        raise CheckpointError(
            f"{repo_id} is not in the hub's cache and could not be downloaded ({error}). Set HF_ENDPOINT to a mirror "
            "or HF_TOKEN to a token, give a folder that holds the files, or try CHATTERBOX_MODEL=demo, "
            "which speaks noise"
        ) from error
    return locate(folder, variant)


def resolve(model: str | Path, variant: Variant | None = None) -> Checkpoint:
    """The checkpoint that an operator's word for it means.

    Args:
        model: a variant's name (from the hub), ``demo`` or ``demo-<variant>`` (random weights, made on first use),
            a folder, or a hub repository ``organisation/name`` with upstream's file names.
        variant: which variant of a folder or repository, or of ``demo``; None detects a folder's and takes English
            elsewhere.

    Raises:
        CheckpointError: nothing of that name, or its files are missing; or ``variant`` contradicts ``model``.
        ConfigurationError: the demo cannot be written to ``cache_dir()``.
    """
    variant = as_variant(variant) if variant else None
    word = str(model)
    if not isinstance(model, Path) and (named := _named(word)):
        if variant not in (None, named) and word != "demo":
            raise CheckpointError(f"the model {word!r} is not the {variant} one; leave one of the two out")
        return _demo(variant or named) if word.startswith("demo") else download(named)
    if Path(model).expanduser().is_dir():
        return locate(model, variant)
    if isinstance(model, Path) or word.startswith(("/", ".", "~")) or word.count("/") != 1:
        choices = ", ".join([*Variant, "demo", *(f"demo-{each}" for each in Variant)])
        raise CheckpointError(f"no model {word!r}: give a folder, a hub repository, or one of {choices}")
    return download(variant or Variant.ENGLISH, repo_id=word)


def _named(word: str) -> Variant | None:
    for variant in Variant:
        if word in (variant, f"demo-{variant}"):
            return variant
    return Variant.ENGLISH if word == "demo" else None


def _demo(variant: Variant) -> Checkpoint:
    from chatterbox_vllm.demo_checkpoint import demo

    try:
        return demo(variant)
    except (OSError, CheckpointError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError):
            raise unusable_cache(cause) from error
        raise


def cache_dir() -> Path:
    """Where this package keeps what it can make again; CHATTERBOX_CACHE_DIR moves it. It may not exist yet."""
    if chosen := os.environ.get("CHATTERBOX_CACHE_DIR"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "chatterbox-vllm"


def unusable_cache(error: Exception) -> ConfigurationError:
    """What to raise when ``cache_dir()`` cannot be written to."""
    name = "CHATTERBOX_CACHE_DIR"
    message = f"the cache folder {cache_dir()} cannot be written to ({error}); set {name} to one that can"
    return ConfigurationError(message, param=name)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a ``.safetensors`` or ``.pt`` file, on the CPU. ``{"model": [tensors]}`` is unwrapped.

    Raises:
        CheckpointError: the file is missing, cut short, of another format, or holds more than tensors.
    """
    path = Path(path)
    loaded: Any = _load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    if set(loaded) == {"model"}:
        loaded = loaded["model"]
    if isinstance(loaded, list) and len(loaded) == 1:
        loaded = loaded[0]
    if not isinstance(loaded, Mapping) or not all(hasattr(value, "shape") for value in loaded.values()):
        raise CheckpointError(f"{path} holds something other than named tensors")
    return dict(loaded)


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as safetensors ({error}); get it anew") from error


def load_pickle(path: str | Path) -> dict[str, Any]:
    """A ``torch.save`` file that holds a dictionary, on the CPU. Only tensors and plain values are unpickled.

    Raises:
        CheckpointError: the file is missing, cut short, of another format, or would run code.
    """
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read as a file of torch.save ({error}); get it anew") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__} where a dictionary was expected")
    return loaded


def load_strict(
    module: nn.Module, tensors: Mapping[str, Tensor], *, file: Path, optional: Collection[str] = ()
) -> None:
    """Fills ``module`` with exactly ``tensors``. A module on the meta device takes them over, others copy.

    Args:
        file: where the tensors come from; named in the error.
        optional: keys that may be missing; the module keeps its own values for them.

    Raises:
        CheckpointError: naming every key that is missing, unexpected or of another shape. The module is unchanged.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in tensors and key not in optional]
    unexpected = [key for key in tensors if key not in own]
    misshapen = [
        f"{key} is {tuple(tensors[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    faults = {"lacks": missing, "has the unexpected": unexpected, "has another shape:": misshapen}
    if any(faults.values()):
        told = "; ".join(f"{fault} {', '.join(keys)}" for fault, keys in faults.items() if keys)
        raise CheckpointError(f"{file} does not fit {type(module).__name__}: it {told}")
    assign = any(tensor.is_meta for tensor in own.values())
    module.load_state_dict({**own, **tensors}, strict=True, assign=assign)
