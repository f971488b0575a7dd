"""Where the tests of the GPU's kernels run: on a card, or in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

ON_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
# Set from the start, as Triton reads it whenever a kernel is defined, be it one of its own.
needs_triton = pytest.mark.skipif(
    not ON_CARD and "TRITON_INTERPRET" not in os.environ, reason="without a card, test_kernels runs it"
)
