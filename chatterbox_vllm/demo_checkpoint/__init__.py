"""Random weights in upstream's exact layout, so that the whole program runs without a download. They speak noise.

``full`` has the real sizes; ``tiny`` is the same networks made small, for tests and for a first look.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from chatterbox_vllm.checkpoint import Checkpoint, Variant, as_variant, cache_dir, locate

if TYPE_CHECKING:
    from chatterbox_vllm.demo_checkpoint.networks import Size

RECIPE: Final = 2
"""Counts the changes to what is written: a cached demo of another recipe is not used."""


def write_demo(
    folder: str | Path, *, size: Size = "tiny", variant: Variant = Variant.ENGLISH, seed: int = 0
) -> Checkpoint:
    """Writes a checkpoint of random weights; an older demo in ``folder`` is replaced.

    Every file of the variant is there, conds.pt and DEMO.json included, or, on an error, none.

    Args:
        size: ``tiny`` (about 60 MB) or ``full`` (3.2 GB).
        seed: equal seeds give equal tensors.

    Raises:
        CheckpointError: ``folder`` is a file, holds something else or cannot be written; or no such size or variant.
        MissingDependency: upstream's wheel, which defines the keys, is not installed.
    """
    from chatterbox_vllm.demo_checkpoint.writer import write

    return write(Path(folder).expanduser(), size=size, variant=as_variant(variant), seed=seed, replace=True)


def demo(variant: Variant = Variant.ENGLISH) -> Checkpoint:
    """The tiny demo of ``variant`` in ``cache_dir()``, written on first use.

    Raises:
        MissingDependency: upstream's wheel, which defines the keys, is not installed.
    """
    variant = as_variant(variant)
    folder = cache_dir() / "demo" / f"tiny-{variant}-{RECIPE}"
    if folder.is_dir():
        return locate(folder, variant)
    from chatterbox_vllm.demo_checkpoint.writer import write

    return write(folder, size="tiny", variant=variant, seed=0, replace=False)
