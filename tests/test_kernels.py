"""The GPU's kernels where there is no GPU: in Triton's interpreter and in its compiler, each in a Python of its own.

``scripts/setup.sh --tests`` puts Triton into a folder beside the packages, as vLLM's CPU build warns in every process
that finds it. On a GPU the files are tests like any other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernel_support import ON_CARD

ROOT = Path(__file__).resolve().parent.parent
INTERPRET = {"TRITON_INTERPRET": "1"}
RUNS = {
    "the vocoder's, in the interpreter": (["tests/test_vocoder_cuda.py"], INTERPRET),
    "T3's, in the interpreter": (
        [f"tests/test_t3_{name}.py" for name in ("sampler", "attention", "four_bit")],
        INTERPRET,
    ),
    "all, in the compiler": (["tests/test_kernels_compile.py"], {}),
}
TRITON = Path(sys.prefix) / "kernels"
pytestmark = [
    pytest.mark.skipif(
        ON_CARD or not TRITON.is_dir(), reason="a card runs the files as they are; Triton is from setup.sh"
    ),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[str]]]:
    """All of them, two at a time: each would leave a core idle."""
    cache = str(tmp_path_factory.mktemp("triton"))
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(printed, *files, TRITON_CACHE_DIR=cache, OMP_NUM_THREADS="1", **environment)
            for name, (files, environment) in RUNS.items()
        }


def printed(*files: str, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"PYTHONPATH": str(TRITON)} | environment
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("name", RUNS)
def test_the_kernels(running: dict[str, Future[str]], name: str) -> None:
    told = running[name].result()
    assert re.search(r"^\d+ passed(, \d+ warnings?)? in", told, re.MULTILINE), told[-8000:]
