"""The GPU's kernels where there is no GPU: in Triton's interpreter and in its compiler, each in a Python of its own.

``scripts/setup.sh --tests`` puts Triton into a folder beside the packages, as vLLM's CPU build warns in every process
that finds it. On a GPU the files are tests like any other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel_support import ON_CARD

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = ("tests/test_vocoder_cuda.py", "tests/test_t3_sampler.py", "tests/test_t3_attention.py")
TRITON = Path(sys.prefix) / "kernels"
pytestmark = [
    pytest.mark.skipif(
        ON_CARD or not TRITON.is_dir(), reason="a card runs the files as they are; Triton is from setup.sh"
    ),
    pytest.mark.timeout(900),
]


def run(*files: str, **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(TRITON)} | environment
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:]
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", done.stdout.splitlines()[-1]), done.stdout[-500:]


def test_the_kernels_in_tritons_interpreter() -> None:
    run(*INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernels_compile(tmp_path: Path) -> None:
    run("tests/test_kernels_compile.py", TRITON_CACHE_DIR=str(tmp_path))
