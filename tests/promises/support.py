"""What the tests of several predecessors' promises need."""

from __future__ import annotations

import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from chatterbox_vllm.errors import EngineError
from chatterbox_vllm.quantization.policy import STRATEGIES, Policy
from chatterbox_vllm.quantization.spellings import Given, resolve
from tests.memory_support import Headers

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks.md"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")


def policy(**spellings: Any) -> Policy:
    return resolve({name: Given(value, name) for name, value in spellings.items()})


@dataclass
class Started:
    """What an engine was about to load, each time it tried."""

    attempts: list[dict[str, Any]]

    @property
    def last(self) -> dict[str, Any]:
        return self.attempts[-1]

    def by(self, build: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """What ``build`` would load; it gets as far as T3."""
        with pytest.raises(EngineError, match="no T3 in this test"):
            build(*arguments, **options)
        return self.last


def corrected(claim: str) -> str:
    """What the guide to memory says to another guide's claim."""
    guide = (ROOT / "docs" / "VRAM_OPTIMIZATION.md").read_text(encoding="utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith(f"| {claim}")]
    return row.split("|")[2]


def at_64(method: str, host: str, column: int) -> float:
    """T3's tokens a second with 64 requests: the first row of a method after the first mention of a host."""
    speeds = BENCHMARKS.read_text(encoding="utf-8").partition("## Quantised")[2]
    row = re.search(rf"^\| `{method}` \|.*", speeds.partition(host)[2], flags=re.MULTILINE)
    assert row is not None
    return float(row[0].split("|")[column].replace(",", ""))


def weights(files: Headers, strategy: str) -> Any:
    from chatterbox_vllm.quantization_config import QuantizationMemoryEstimator

    return QuantizationMemoryEstimator(files).estimate(STRATEGIES[strategy])


def example(name: str) -> Any:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]
