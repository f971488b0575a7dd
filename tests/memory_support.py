"""A checkpoint of the real sizes that takes no room: the headers of its files, with holes for the weights.

``python -m tests.memory_support`` prints the rows of the guide in docs/VRAM_OPTIMIZATION.md.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from chatterbox_vllm.budget import Plan, compare
from chatterbox_vllm.costs import Demand
from chatterbox_vllm.demo_checkpoint import networks

GUIDE: Final = (
    *((28, gigabytes) for gigabytes in (2, 3, 4, 6, 8, 12)),
    *((132, gigabytes) for gigabytes in (2, 3, 4, 6, 8, 12, 16, 24)),
)
"""A card's multiprocessors, and GiB."""


@dataclass(frozen=True)
class Headers:
    t3: Path
    s3gen: Path
    voice_encoder: Path


def full_headers(folder: Path) -> Headers:
    """Of the English checkpoint, written to ``folder``."""
    with torch.device("meta"):
        t3, s3gen = networks.t3("full", multilingual=False), networks.s3gen("full")
        voice_encoder = networks.voice_encoder()
    return Headers(
        _written(folder / "t3_cfg.safetensors", t3.state_dict()),
        _written(folder / "s3gen.safetensors", s3gen.state_dict()),
        _written(folder / "ve.safetensors", voice_encoder.state_dict()),
    )


def _written(path: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = "I64" if tensor.dtype == torch.int64 else "F32"
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    return path


def guide_row(checkpoint: Headers, multiprocessors: int, gigabytes: int) -> str:
    """Of the guide in docs/VRAM_OPTIMIZATION.md: how many utterances of 1,024 positions fit under each strategy."""
    plans = compare(gigabytes * 2**30, Demand(checkpoint, max_model_len=1024, multiprocessors=multiprocessors))
    counts = [str(each.max_batch_size) if isinstance(each, Plan) else "" for each in plans.values()]
    return f"| {multiprocessors} | {gigabytes} GiB | {' | '.join(counts)} |"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        headers = full_headers(Path(folder))
        print("\n".join(guide_row(headers, *card) for card in GUIDE))
