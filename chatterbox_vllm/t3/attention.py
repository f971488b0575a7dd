"""vLLM's FlashAttention, with a kernel of our own for steps in which each request has one new token.

FlashAttention gives a request's queries a tile of 64 to 192 rows, of which such a step fills one: at 256 requests the
idle rows take a card longer than to read the cache. The kernel (``kernels.decode``) has no tile of queries, and reads
the cache about as fast as the card can: in half of FlashAttention's time. It also writes the cache, for which vLLM has
a kernel of its own, and needs no plan, for which it has three. docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import math
from typing import Any, Final

from torch import Tensor, nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.utils.platform_utils import num_compute_units
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.selector import get_attn_backend

from chatterbox_vllm.t3.kernels import decode

SHAPES: Final = ((1, 128, 8), (8, 32, 4), (None, 16, 1))
"""Up to so many programs a multiprocessor: positions of a tile, and its warps. The fastest on an H200: few programs
need many threads each, and many keep a multiprocessor busy with a warp each, which waits for no other."""
_PLAIN: Final = ("auto", "bfloat16", "float16")


def attention_backend(vllm_config: VllmConfig, head_dim: int) -> type[AttentionBackend] | None:
    """For ``Attention``: ours in place of FlashAttention on a cache that is whole and not quantised; else None."""
    cache_dtype = vllm_config.cache_config.cache_dtype
    is_shared_out = vllm_config.parallel_config.decode_context_parallel_size > 1
    # Its order of summation depends on how many requests there are.
    if cache_dtype not in _PLAIN or is_shared_out or envs.VLLM_BATCH_INVARIANT:
        return None
    chosen = get_attn_backend(head_dim, vllm_config.model_config.dtype, cache_dtype)
    return OneTokenAttention if chosen is FlashAttentionBackend else None


def shape(programs: int, multiprocessors: int) -> tuple[int, int]:
    """Positions of a tile, and its warps: see ``SHAPES``."""
    return next((tile, warps) for most, tile, warps in SHAPES if most is None or programs <= most * multiprocessors)


class OneTokenAttention(FlashAttentionBackend):
    """vLLM's backend, whose ``forward`` writes the cache."""

    forward_includes_kv_cache_update = True

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """Of the layers."""
        return OneTokenImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """Of what they are told of a batch."""
        return OneTokenBuilder


class OneTokenBuilder(FlashAttentionMetadataBuilder):
    """Plans only the steps that FlashAttention computes."""

    def _get_scheduler_metadata(self, *, max_query_len: int, **others: Any) -> Tensor | None:
        # vLLM's older runner has steps with a token each run in graphs that FlashAttention is in.
        if max_query_len == 1 and self.vllm_config.use_v2_model_runner:
            return None
        return super()._get_scheduler_metadata(max_query_len=max_query_len, **others)


class OneTokenImpl(FlashAttentionImpl):
    """Attention of a layer that has as many heads of keys as of queries."""

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata | None,
        output: Tensor,
        *others: Any,
        **more: Any,
    ) -> Tensor:
        """query, key, value, output (N, heads, head_dim); kv_cache (pages, heads, page, 2 x head_dim) -> output."""
        if attn_metadata is not None and attn_metadata.max_query_len == 1:
            requests, page = len(attn_metadata.seq_lens), kv_cache.shape[2]
            tile, warps = shape(requests * self.num_heads, num_compute_units())
            decode[(self.num_heads, requests)](
                *(query, query.stride(0), key, key.stride(0), value, value.stride(0), output, output.stride(0)),
                *(kv_cache, *kv_cache.stride()[:3]),
                *(attn_metadata.seq_lens, attn_metadata.block_table, attn_metadata.block_table.stride(0)),
                self.scale * math.log2(math.e),
                WIDTH=self.head_size,
                PAGE=page,
                TILE=tile,
                num_warps=warps,
            )
            return output
        if attn_metadata is not None:
            self.do_kv_cache_update(layer, key, value, kv_cache, attn_metadata.slot_mapping)
        return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *others, **more)
