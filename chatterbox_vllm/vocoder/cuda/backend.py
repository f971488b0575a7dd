"""The networks on a CUDA card: the flow in half precision, HiFT with TF32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
from torch import Tensor, nn

from chatterbox_vllm.vocoder.cuda import hift_kernels
from chatterbox_vllm.vocoder.cuda.captured import Captured
from chatterbox_vllm.vocoder.cuda.encoder import ALIGNMENT, HalfEncoder
from chatterbox_vllm.vocoder.cuda.estimator import PackedEstimator
from chatterbox_vllm.vocoder.cuda.graphs import GraphSolver
from chatterbox_vllm.vocoder.cuda.hift import FusedHift
from chatterbox_vllm.vocoder.hift import Stretch
from chatterbox_vllm.vocoder.transfer import to_device
from chatterbox_vllm.vocoder.weights import Networks

_CAPTURED: Final = 64
"""A single utterance's tokens are padded to a multiple of this, so that few graphs serve all lengths."""
_LONGEST_CAPTURED: Final = 640
"""Tokens, the recording's among them; beyond, computing takes longer than launching."""
_POSITIONS: Final = 16
"""Of one program of ``hift_kernels.normals``."""


class CudaBackend:
    """``Backend`` for CUDA cards.

    Args:
        networks: on the card. What is packed anew is let go.
        dtype: bfloat16 or float16, for the flow.
        frames: the most mel frames that will be solved at once, for which memory is taken.
    """

    def __init__(self, networks: Networks, *, dtype: torch.dtype, frames: int) -> None:
        flow = networks.flow
        self._device = flow.encoder_proj.weight.device
        self._embedding, self._projection = flow.input_embedding, flow.encoder_proj
        self._encoder = HalfEncoder(flow.encoder, dtype)
        estimator = PackedEstimator(flow.estimator, dtype=dtype, device=self._device)
        self._captured: dict[int, Captured[Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._solver = GraphSolver(estimator, frames=frames)
        self._hift = FusedHift(networks.mel2wav)
        _let_go(networks)

    @staticmethod
    def fits(networks: Networks) -> bool:
        """Whether the kernels can compute networks of these sizes."""
        return PackedEstimator.fits(networks.flow.estimator) and FusedHift.fits(networks.mel2wav)

    def mu(self, tokens: Sequence[Tensor]) -> Tensor:
        """See ``Backend.mu``."""
        lengths = torch.tensor([len(row) for row in tokens])
        longest = _rounded(int(lengths.max()), _CAPTURED if len(tokens) == 1 else ALIGNMENT)
        ids = torch.zeros(len(tokens), longest, dtype=torch.int64)
        for row, own in zip(ids, tokens, strict=True):
            row[: len(own)] = own
        mask = torch.arange(longest) < lengths[:, None]
        inputs = to_device(ids, self._device), to_device(mask, self._device)
        if len(tokens) > 1 or longest > _LONGEST_CAPTURED:
            return self._encoded(*inputs)
        if longest not in self._captured:
            self._captured[longest] = Captured(self._encoded, inputs, self._pool)
        return self._captured[longest](*inputs)

    def _encoded(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self._projection(self._encoder(self._embedding(ids), mask))

    def normals(self, keys: Tensor, first: Tensor, count: int, channels: int) -> Tensor:
        """See ``Backend.normals``."""
        out = torch.empty(len(keys), count, channels, device=self._device)
        lanes = (channels + 1) // 2
        hift_kernels.normals[(triton.cdiv(count, _POSITIONS), len(keys))](
            keys,
            first,
            out,
            count,
            LANES=lanes,
            CHANNELS=channels,
            PADDED=triton.next_power_of_2(lanes),
            ROWS=_POSITIONS,
        )
        return out

    def solve(
        self, noise: Tensor, mu: Tensor, speaker: Tensor, cond: Tensor, lengths: Sequence[int], steps: int
    ) -> list[Tensor]:
        """See ``Backend.solve``."""
        return self._solver.solve(noise, mu, speaker, cond, lengths, steps)

    def hift(self, stretch: Stretch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """See ``Backend.hift``."""
        return self._hift(stretch)

    def warm_up(self, frames: int) -> None:
        """Compiles kernels and captures graphs."""
        self._solver.warm_up(frames, steps=10)
        for longest in range(_CAPTURED, _LONGEST_CAPTURED + 1, _CAPTURED):
            self.mu([torch.zeros(longest, dtype=torch.int64)])
        self._hift.warm_up(frames)


def _let_go(networks: Networks) -> None:
    """Drops the weights of which there are copies: 0.5 GB at the real sizes."""
    flow, hift = networks.flow, networks.mel2wav
    flow.decoder = nn.ModuleDict()
    flow.encoder.encoders, flow.encoder.up_encoders = nn.ModuleList(), nn.ModuleList()
    hift.ups, hift.source_downs = nn.ModuleList(), nn.ModuleList()
    hift.source_resblocks, hift.resblocks = nn.ModuleList(), nn.ModuleList()


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
