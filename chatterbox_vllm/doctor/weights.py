"""Settings, weights, disk and port: what this server in particular needs."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from chatterbox_vllm import checkpoint
from chatterbox_vllm.checkpoint import Variant
from chatterbox_vllm.doctor.finding import Finding, error, ok, warn
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.settings import Settings

DOWNLOAD_GB: Final = 3.5
"""More than the files of any one model take."""


def cached(variant: Variant, repo_id: str = checkpoint.REPOSITORY) -> tuple[list[str], list[str]]:
    """The variant's file names that the hub's cache has, and those that it lacks."""
    from huggingface_hub import try_to_load_from_cache

    names = checkpoint.FILES[variant].all()
    present = [name for name in names if isinstance(try_to_load_from_cache(repo_id, name), str)]
    return present, [name for name in names if name not in present]


def weights(settings: Settings) -> Iterator[Finding]:
    """Whether the chosen model's weights are here; where it is a hub's, which others are."""
    model, variant = settings.checkpoint
    name, folder = f"weights ({model})", Path(model).expanduser()
    if model in set(Variant):
        yield _hub(name, Variant(model), checkpoint.REPOSITORY)
        yield from (ok(f"weights ({other})", "in the hub's cache") for other in _others(model))
    elif folder.is_dir():
        yield _folder(name, folder, variant)
    elif model.startswith("demo"):
        yield ok(name, "random, made on first use: this server will speak noise")
    elif model.startswith(("/", ".", "~")) or model.count("/") != 1:
        remedy = f"set CHATTERBOX_MODEL to {', '.join(Variant)}, demo, a folder, or organisation/repository"
        yield error(name, "no such folder or model", remedy)
    else:
        yield _hub(name, Variant(variant or Variant.ENGLISH), model)


def _others(model: str) -> list[Variant]:
    return [other for other in Variant if other != model and not cached(other)[1]]


def _folder(name: str, folder: Path, variant: str | None) -> Finding:
    try:
        found = checkpoint.locate(folder, Variant(variant) if variant else None)
    except CheckpointError as problem:
        remedy = f"copy the files there, or make random ones: chatterbox-vllm demo-checkpoint {folder}"
        return error(name, str(problem), remedy)
    kind = "random weights, it will speak noise" if found.is_demo else "complete"
    return ok(name, f"{found.variant} in {found.folder}: {kind}")


def _hub(name: str, variant: Variant, repo_id: str) -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    present, missing = cached(variant, repo_id)
    if not missing:
        return ok(name, f"complete in the hub's cache, {HF_HUB_CACHE}")
    state = f"{'incomplete' if present else 'not downloaded yet'}: {HF_HUB_CACHE} lacks {', '.join(missing)}"
    if HF_HUB_OFFLINE:
        return error(
            name, f"{state}, and HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE, or set CHATTERBOX_MODEL to a folder"
        )
    free = free_gb(Path(HF_HUB_CACHE))
    if free < DOWNLOAD_GB:
        remedy = f"free {DOWNLOAD_GB} GB, or set HF_HOME to a folder on a larger disk"
        return error(name, f"{state}, and its disk has {free:.1f} GB free", remedy)
    return warn(name, state, f"the first start downloads them; by hand: hf download {repo_id} {' '.join(missing)}")


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that there is."""
    while not os.path.exists(folder):  # noqa: PTH110 - Path.exists raises where it may not look
        folder = folder.parent
    return folder


def free_gb(folder: Path) -> float:
    return shutil.disk_usage(existing(folder)).free / 1e9


def disk() -> Finding:
    """The folder for enrolled voices, demo weights, what vLLM loads T3 from, and what numba compiles."""
    folder = checkpoint.cache_dir().absolute()
    if not os.access(existing(folder), os.W_OK | os.X_OK):
        remedy = "set CHATTERBOX_CACHE_DIR to a folder that can be"
        return error("disk", f"the cache folder {folder} cannot be written to", remedy)
    free = free_gb(folder)
    detail = f"{free:.1f} GB free for {folder}"
    if free < 1.0:
        return warn("disk", detail, "free some, or set CHATTERBOX_CACHE_DIR to a folder on a larger disk")
    return ok("disk", detail)


def port(settings: Settings) -> Finding:
    """Whether the server could listen where it is told to."""
    where = f"{settings.host}:{settings.port}"
    try:
        address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(address[0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address[4])
    except (OSError, UnicodeError) as problem:
        return _unusable(where, problem)
    return ok("port", f"{where} is free")


def _unusable(where: str, problem: OSError | UnicodeError) -> Finding:
    told = f"{where}: {getattr(problem, 'strerror', None) or problem}"
    number = getattr(problem, "errno", None)
    if isinstance(problem, socket.gaierror | UnicodeError) or number == errno.EADDRNOTAVAIL:
        return error("port", told, "set --host to an address of this machine, 127.0.0.1 or 0.0.0.0")
    if number == errno.EADDRINUSE:
        return warn("port", told, "is a server running already? Else choose another --port")
    return error("port", told, "choose another --port, from 1024 on")
