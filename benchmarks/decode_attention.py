"""T3's attention of one new token a request: our kernel against vLLM's FlashAttention 3, on a Hopper GPU.

    python benchmarks/decode_attention.py

Both write the new key and value into the paged cache and attend to all positions before. Thirty layers, each with a
cache of its own, are one CUDA graph, so no layer finds its cache in the GPU's L2; FlashAttention's plan, which vLLM
makes once a step, is not counted. Prints microseconds a layer, and how long the card would need to read the cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.utils.platform_utils import num_compute_units
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

from chatterbox_vllm.t3.attention import shape
from chatterbox_vllm.t3.kernels import decode

HEADS, WIDTH, LAYERS, PAGE = 32, 64, 30, 16
"""T3's, both halves of the guidance; and vLLM's page."""
SPREAD = 60
"""Requests are so many positions shorter or longer, at most."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16, 64, 128, 256])
    made.add_argument("--positions", type=int, default=225, help="of a request on average (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second (default: an H200's)")
    return made


@dataclass(frozen=True)
class Batch:
    """Requests with shuffled pages, and a new token of each.

    Args:
        caches: of each layer, (pages, HEADS, PAGE, 2 x WIDTH) bfloat16.
        pages: (n, most) int32, a request's.
        lengths: (n,) int32 positions, the new one among them.
        query, key, value: (n, HEADS, WIDTH) bfloat16.
    """

    caches: list[Tensor]
    pages: Tensor
    lengths: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def of(cls, requests: int, positions: int) -> Batch:
        most = -(-(positions + SPREAD) // PAGE)
        count = requests * most + 1
        device = torch.device("cuda")
        like = {"device": device, "dtype": torch.bfloat16}
        lengths = torch.full((requests,), positions, device=device)
        if requests > 1:
            lengths += torch.randint(-SPREAD, SPREAD, (requests,), device=device)
        return cls(
            [torch.randn(count, PAGE, HEADS, 2 * WIDTH, **like).transpose(1, 2) for _ in range(LAYERS)],
            (torch.randperm(count - 1, device=device) + 1).view(requests, most).int(),
            lengths.int(),
            *(torch.randn(requests, HEADS, WIDTH, **like) for _ in range(3)),
        )

    def ours(self) -> Tensor:
        """Of the last layer."""
        out, requests = torch.empty_like(self.query), len(self.lengths)
        tile, warps = shape(requests * HEADS, num_compute_units())
        for cache in self.caches:
            rows = (each for tensor in (self.query, self.key, self.value, out) for each in (tensor, tensor.stride(0)))
            decode[(HEADS, requests)](
                *(*rows, cache, *cache.stride()[:3], self.lengths, self.pages, self.pages.stride(0)),
                WIDTH**-0.5 * math.log2(math.e),
                WIDTH=WIDTH,
                PAGE=PAGE,
                TILE=tile,
                num_warps=warps,
            )
        return out

    def flash_attention(self) -> Callable[[], Tensor]:
        """With keys in one piece, as T3 has it."""
        requests, last = len(self.lengths), self.lengths.long() - 1
        starts = torch.arange(requests + 1, device=last.device, dtype=torch.int32)
        slots = self.pages.gather(1, (last // PAGE)[:, None])[:, 0].long() * PAGE + last % PAGE
        one, out = torch.ones((), device=last.device), torch.empty_like(self.query)
        longest = self.pages.shape[1] * PAGE
        plan = get_scheduler_metadata(
            batch_size=requests,
            max_seqlen_q=1,
            max_seqlen_k=longest,
            num_heads_q=HEADS,
            num_heads_kv=HEADS,
            headdim=WIDTH,
            cache_seqlens=self.lengths,
            qkv_dtype=torch.bfloat16,
            cu_seqlens_q=starts,
            page_size=PAGE,
            causal=True,
            num_splits=1,
        )

        def run() -> Tensor:
            for cache in self.caches:
                keys, values = cache.transpose(1, 2).split(WIDTH, -1)
                ops.reshape_and_cache_flash(self.key, self.value, keys, values, slots, "auto", one, one)
                flash_attn_varlen_func(
                    q=self.query,
                    k=keys,
                    v=values,
                    out=out,
                    cu_seqlens_q=starts,
                    max_seqlen_q=1,
                    seqused_k=self.lengths,
                    max_seqlen_k=longest,
                    softmax_scale=WIDTH**-0.5,
                    causal=True,
                    block_table=self.pages,
                    scheduler_metadata=plan,
                    num_splits=1,
                    fa_version=3,
                )
            return out

        return run


def microseconds(work: Callable[[], Tensor], rounds: int) -> tuple[float, Tensor]:
    """Of a layer, in a CUDA graph; and what came out."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = work()
    graph.replay()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(rounds):
        graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end) / rounds / LAYERS, out.float()


def main() -> None:
    arguments = parser().parse_args()
    print(f"{'requests':>8} {'FlashAttention':>15} {'ours':>7} {'to read':>8} {'differ by':>10}")
    for requests in arguments.requests:
        batch = Batch.of(requests, arguments.positions)
        theirs, wanted = microseconds(batch.flash_attention(), arguments.rounds)
        ours, found = microseconds(batch.ours, arguments.rounds)
        read = 1e6 * int(batch.lengths.sum()) * HEADS * 2 * WIDTH * 2 / arguments.bandwidth
        apart = (found - wanted).abs().max().item()
        print(f"{requests:>8} {theirs:>15.1f} {ours:>7.1f} {read:>8.1f} {apart:>10.4f}", flush=True)


if __name__ == "__main__":
    main()
