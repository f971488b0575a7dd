"""Linear layers whose products are of 8-bit integers, for CPUs.

Weights have a scale a row, and so have activations, which are quantised as they come. So a row's result does not depend
on the rows beside it; with a scale for all of them, as ``torch.ao`` has it, one loud row would cost the others their
accuracy, and what is in a batch would be heard.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from chatterbox_vllm.quantization.matrices import INT8_SHARE, EightBit, QuantizedLinear

_LOWEST: Final = 1e-30
"""Of a row of activations; less would divide by zero."""


class Int8Linear(QuantizedLinear):
    """``nn.Linear`` in int8, weights and activations, with sums in int32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs), in the dtype of ``x``."""
        matrix = self.matrix
        assert isinstance(matrix, EightBit)
        rows = x.flatten(0, -2).to(torch.float32)
        scales = rows.abs().amax(dim=1, keepdim=True).clamp_(min=_LOWEST).mul_(INT8_SHARE)
        sums = torch._int_mm((rows / scales).round_().to(torch.int8), matrix.codes.T)
        product = sums.to(torch.float32).mul_(scales).mul_(matrix.scales * INT8_SHARE)
        if self.bias is not None:
            product += self.bias
        return product.to(x.dtype).unflatten(0, x.shape[:-1])
