"""Where the tests of the GPU's kernels run: on a card, or in Triton's interpreter."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
# Set from the start, as Triton reads it whenever a kernel is defined, be it one of its own.
needs_triton = pytest.mark.skipif(
    not ON_CARD and "TRITON_INTERPRET" not in os.environ, reason="without a card, test_kernels runs it"
)


@contextmanager
def fresh_modules(*names: str) -> Iterator[None]:
    """Inside, modules of these names are imported anew, with a Triton, which vLLM has not where it sees no card."""
    if ON_CARD:
        yield
        return
    import triton
    import triton.language as tl
    import vllm  # noqa: F401

    before = {name: sys.modules.pop(name, None) for name in ("vllm.triton_utils", *names)}
    sys.modules["vllm.triton_utils"] = SimpleNamespace(tl=tl, triton=triton, HAS_TRITON=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
