"""The networks on a CUDA card: the flow in half precision, HiFT with TF32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
import triton
from torch import Tensor, nn

from chatterbox_vllm.quantization.matrices import matrices_of
from chatterbox_vllm.vocoder.cuda import hift_kernels
from chatterbox_vllm.vocoder.cuda.captured import Captured
from chatterbox_vllm.vocoder.cuda.dequantize import Scratch
from chatterbox_vllm.vocoder.cuda.encoder import ALIGNMENT, HalfEncoder
from chatterbox_vllm.vocoder.cuda.estimator import PackedEstimator
from chatterbox_vllm.vocoder.cuda.graphs import GraphSolver
from chatterbox_vllm.vocoder.cuda.hift import FusedHift
from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN
from chatterbox_vllm.vocoder.footprint import footprint, savings
from chatterbox_vllm.vocoder.hift import Stretch
from chatterbox_vllm.vocoder.transfer import pinned, to_device
from chatterbox_vllm.vocoder.weights import Networks

_CAPTURED: Final = 64
"""Tokens are padded to a multiple of this, and batches to 2, 4, 8, ... rows, so that few graphs serve all."""
_LONGEST_CAPTURED: Final = 640
"""Tokens, the recording's among them; beyond, computing takes longer than launching."""
_MOST_ROWS: Final = 16
"""Of batches whose graphs are captured beforehand."""
_POSITIONS: Final = 16
"""Of one program of ``hift_kernels.normals``."""


class CudaBackend:
    """``Backend`` for CUDA cards.

    Args:
        networks: on the CPU. The flow's embedding and projections move to the card; what is packed anew is let go.
        device: the card.
        dtype: bfloat16 or float16, for the flow.
        frames: the most mel frames that will be solved at once, for which memory is taken.
        frugal: have graphs of the encoder for single utterances only. Those of batches take up to 1.5 GB at 8,192
            frames; without them a batch waits 10 ms for the host.
    """

    def __init__(
        self, networks: Networks, *, device: torch.device, dtype: torch.dtype, frames: int, frugal: bool
    ) -> None:
        flow, self._device = networks.flow, device
        saved = savings(networks, dict.fromkeys(("flow_encoder", "estimator"), dtype))
        scratch, scratches = _scratch(networks, dtype, device)
        self._encoder = HalfEncoder(flow.encoder, dtype, device, scratches["flow_encoder"])
        estimator = PackedEstimator(flow.estimator, dtype=dtype, device=device, scratch=scratches["estimator"])
        # Graphs run one after the other, and what one of them gives is used up before the next one runs.
        self._pool = torch.cuda.graph_pool_handle()
        self._hift = FusedHift(networks.mel2wav, device=device, pool=self._pool)
        _let_go(networks)
        flow.to(device)
        self._embedding, self._projection = flow.input_embedding, flow.encoder_proj
        self._captured: dict[tuple[int, int], Captured[Tensor]] = {}
        self._longest_captured = min(_LONGEST_CAPTURED, frames // 4)
        # Of a batch, padding included: a quarter more than there may be without.
        self._most_captured = 0 if frugal else frames // FRAMES_PER_TOKEN * 5 // 4
        self._solver = GraphSolver(estimator, frames=frames)
        parts = {"flow_encoder": self._encoder.weights, "estimator": estimator.weights, "hift": self._hift.weights}
        self.footprint = footprint({"scratch": scratch.memory, **parts, "other": flow}, saved)

    @staticmethod
    def fits(networks: Networks) -> bool:
        """Whether the kernels can compute networks of these sizes."""
        return (
            PackedEstimator.fits(networks.flow.estimator)
            and FusedHift.fits(networks.mel2wav)
            and Scratch.fits(list(matrices_of(networks.flow)))
        )

    def mu(self, tokens: Sequence[Tensor]) -> Tensor:
        """See ``Backend.mu``."""
        longest = max(len(row) for row in tokens)
        captured = self._graph_of(len(tokens), longest)
        rows, length = captured or (len(tokens), _rounded(longest, ALIGNMENT))
        # Everything in one copy: a row's ids, and how many there are.
        given = torch.zeros(rows, length + 1, dtype=torch.int64)
        # Rows that no utterance has are as good as any: without a token in use, attention would divide by zero.
        given[:, length] = length
        for row, own in zip(given, tokens, strict=False):
            row[: len(own)] = own
            row[length] = len(own)
        if captured is None:
            return self._encoded(to_device(given, self._device))
        if captured not in self._captured:
            self._captured[captured] = Captured(self._encoded, (to_device(given, self._device),), self._pool)
        return self._captured[captured](pinned(given, self._device))[: len(tokens)]

    def _graph_of(self, rows: int, longest: int) -> tuple[int, int] | None:
        """Rows and tokens of the graph for a batch, if there is to be one."""
        rows, length = 1 << (rows - 1).bit_length(), _rounded(longest, _CAPTURED)
        if rows == 1:
            fits = length <= self._longest_captured
        else:
            fits = length <= _LONGEST_CAPTURED and rows * length <= self._most_captured
        return (rows, length) if fits else None

    def _encoded(self, given: Tensor) -> Tensor:
        ids, counts = given[:, :-1], given[:, -1:]
        mask = torch.arange(ids.shape[1], device=self._device) < counts
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

    def warm_up(self, frames: int, hift_frames: int) -> None:
        """Compiles kernels and captures graphs."""
        self._solver.warm_up(frames)
        self._hift.warm_up(hift_frames)
        rows = [1 << power for power in range(_MOST_ROWS.bit_length())]
        sizes = [(count, length) for count in rows for length in range(_CAPTURED, _LONGEST_CAPTURED + 1, _CAPTURED)]
        # What needs less finds the graphs' memory there; attention's scores need most.
        for count, length in sorted(sizes, key=lambda size: -size[0] * size[1] ** 2):
            if self._graph_of(count, length):
                self.mu([torch.zeros(length, dtype=torch.int64)] * count)


def _scratch(networks: Networks, dtype: torch.dtype, device: torch.device) -> tuple[Scratch, dict[str, Scratch | None]]:
    """Memory for one conformer block's or one stage's matrices, and which components are quantised and need it."""
    flow = networks.flow
    groups = {
        "flow_encoder": [*flow.encoder.encoders, *flow.encoder.up_encoders],
        "estimator": [stage[1] for stage in flow.estimator.stages],
    }
    elements = {
        name: max(sum(math.prod(matrix.shape) for matrix in matrices_of(part)) for part in parts)
        for name, parts in groups.items()
    }
    scratch = Scratch(max(elements.values()), dtype=dtype, device=device)
    return scratch, {name: scratch if count else None for name, count in elements.items()}


def _let_go(networks: Networks) -> None:
    """Drops the weights of which there are copies: 0.5 GB at the real sizes."""
    flow, hift = networks.flow, networks.mel2wav
    flow.decoder = nn.ModuleDict()
    flow.encoder.encoders, flow.encoder.up_encoders = nn.ModuleList(), nn.ModuleList()
    hift.ups, hift.source_downs = nn.ModuleList(), nn.ModuleList()
    hift.source_resblocks, hift.resblocks = nn.ModuleList(), nn.ModuleList()
    hift.conv_pre, hift.conv_post = nn.Identity(), nn.Identity()


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
