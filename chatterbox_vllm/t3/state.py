"""What T3 does of its own in vLLM's V2 model runner, of which a step's Python is most of the time of few requests.

Each kernel that is launched outside of the CUDA graph takes that Python 10 to 50 us, and there were forty. So nothing
is embedded for a batch that only decodes (``GuidedLlama`` does that), nothing is told to attention that reads what it
needs where vLLM keeps it (``attention``), and a token is drawn in one kernel (``sampler``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.utils import AttentionGroup

from chatterbox_vllm.t3 import graphs
from chatterbox_vllm.t3.attention import OneTokenAttention
from chatterbox_vllm.t3.sampler import OneKernelSampler


class GuidedModelState(DefaultModelState):
    """vLLM's ``ModelState`` of ``ChatterboxT3``."""

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        graphs.install()  # vLLM makes its graphs later, and has no other way to say of which class

    def prepare_inputs_embeds(
        self, scheduled_encoder_inputs: dict[str, list[int]], input_batch: InputBatch, req_states: RequestState
    ) -> Tensor:
        """Voice vectors belong to prompts: where there is none, nothing is written, and nothing of it is read."""
        if input_batch.has_prefill or scheduled_encoder_inputs:
            return super().prepare_inputs_embeds(scheduled_encoder_inputs, input_batch, req_states)
        return self.dummy_inputs_embeds(input_batch.num_tokens_after_padding)

    def prepare_attn(
        self,
        input_batch: InputBatch,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: list[list[AttentionGroup]],
        *others: Any,
        **more: Any,
    ) -> dict[str, Any]:
        """What layers are told of a batch: nothing, if a graph of steps with a token each is about to be replayed.

        ``graphs`` runs no other graph for such a step, and its layers have vLLM's own lengths and tables of pages.
        """
        one_each = input_batch.num_reqs == input_batch.num_tokens
        if one_each and cudagraph_mode == CUDAGraphMode.FULL and not more.get("for_capture"):
            every = [group for groups in attn_groups for group in groups]
            # Else the tables of pages that its layers have are made anew for each batch.
            if all(group.backend is OneTokenAttention and group.kernel_block_size is None for group in every):
                return {}
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, *others, **more
        )

    def custom_sampler(self, sampler: Sampler) -> tuple[Sampler, Any]:
        """vLLM's sampler and no rejection sampler, as there is nothing drafted."""
        return OneKernelSampler(sampler, self.model), None
