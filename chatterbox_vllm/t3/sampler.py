"""vLLM's sampling in one kernel: fewest tokens, repetition penalty, temperature, min_p, and a token drawn.

vLLM's own sampler launches nine for that. Numbers are computed as it computes them, and its noise is used: so the same
token is drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor
from vllm.triton_utils import triton
from vllm.v1.worker.gpu.sample.sampler import Sampler

from chatterbox_vllm.t3.kernels import draw
from chatterbox_vllm.types import SPEECH_VOCABULARY, START_SPEECH, STOP_SPEECH

if TYPE_CHECKING:
    import numpy.typing as npt

    from chatterbox_vllm.t3.model import ChatterboxT3

_WARPS: Final = 8
"""More ask for a request's parameters more often, which are in the CPU's memory."""


class OneKernelSampler(Sampler):
    """vLLM's ``Sampler``, which it takes the place of, for ``ChatterboxT3``'s raw logits.

    What it does not know, such as top_p, vLLM's kernels do.

    Args:
        sampler: vLLM's, whose state this shares.
        model: whose logits come from now on without masks.
    """

    def __init__(self, sampler: Sampler, model: ChatterboxT3) -> None:
        self.__dict__.update(vars(sampler))
        self._masked = model.masked
        masks = len(model.unspoken) > 0
        count = STOP_SPEECH + 1 if masks else SPEECH_VOCABULARY
        self._constants = {
            "COUNT": count,
            "SILENT": START_SPEECH if masks else -1,
            "STOP": STOP_SPEECH,
            "SIZE": triton.next_power_of_2(count),
            "num_warps": _WARPS,
        }
        model.raw_logits = True

    def sample(
        self,
        logits: Tensor,
        expanded_idx_mapping: Tensor,
        idx_mapping: Tensor,
        idx_mapping_np: npt.NDArray[Any],
        pos: Tensor,
        *others: Any,
        return_logprobs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(N, 8194) logits to (N,) int64 tokens, and processed logits where ``return_logprobs`` asks for them."""
        if return_logprobs or not self._suits(idx_mapping_np):
            mapped = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, *others)
            return super().sample(self._masked(logits), *mapped, return_logprobs=return_logprobs)
        sampled = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        states, penalties, (bias, *_) = self.sampling_states, self.penalties_state, self.logits_processors
        draw[(len(logits),)](
            logits,
            logits.stride(0),
            idx_mapping,
            pos,
            penalties.repetition_penalty.gpu,
            penalties.prompt_bin_mask,
            penalties.prompt_bin_mask.stride(0),
            penalties.output_bin_counts,
            penalties.output_bin_counts.stride(0),
            states.temperature.gpu,
            states.min_p.gpu,
            states.seeds.gpu,
            bias.num_stop_token_ids.gpu,
            bias.min_lens.gpu,
            sampled,
            **self._constants,
        )
        return sampled, logits

    def _suits(self, rows: npt.NDArray[Any]) -> bool:
        """Whether all requests, whose rows of vLLM's state these are, ask for no more than the kernel does."""
        states, (bias, penalties, bad_words, *more) = self.sampling_states, self.logits_processors
        unusual = (
            states.top_p.np[rows] != 1.0,
            states.top_k.np[rows] != states.vocab_size,
            bias.num_allowed_token_ids.np[rows],
            bias.num_logit_bias.np[rows],
            bias.num_stop_token_ids.np[rows] > 1,  # STOP_SPEECH alone, for those that may not stop yet
            bias.restore_when_all_masked.np[rows],
            penalties.frequency_penalty.np[rows],
            penalties.presence_penalty.np[rows],
            bad_words.num_bad_words.np[rows],
        )
        return not (more or self.thinking_budget_state.enabled or self.use_fp64_gumbel or np.any(unusual))
