"""CUDA graphs of whole steps in vLLM's V2 model runner, those that read prompts among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import cudagraph_utils, model_runner
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor as Step


class StepGraphs(cudagraph_utils.ModelCudaGraphManager):
    """vLLM's graphs for ``cudagraph_mode=FULL``, and beside them some for steps in which each request has one token.

    A graph that may read a prompt attends with as many queries a request as it has tokens. Steps that only decode, most
    of all, run slower in it, so they get graphs of their own, as vLLM has them in its other modes. There, what reads
    prompts is cut at each attention, and launching the pieces takes longer than to compute them.
    """

    def _init_candidates(self) -> None:
        super()._init_candidates()
        if self.cudagraph_mode != CUDAGraphMode.FULL or not self._capture_descs:
            return
        steps = self._capture_descs[CUDAGraphMode.FULL]
        decoding = {step: self._decoding(step) for step in steps}
        steps += dict.fromkeys(decoding.values())
        steps.sort(key=lambda step: step.num_tokens, reverse=True)  # the largest first, as vLLM has it
        for found in self._candidates.values():  # the first that suits is taken
            found[:0] = [decoding[step] for step in found if step in decoding]

    def _decoding(self, step: Step) -> Step:
        """As large as ``step`` or, if that is less, all requests with a token each."""
        size = min(step.num_tokens, self.max_num_reqs)
        return replace(step, num_tokens=size, num_reqs=size, uniform_token_count=1)

    def dispatch(self, num_reqs: int, num_tokens: int, *others: Any, **more: Any) -> Step:
        """The graph of a step. One with a token each never runs in a graph that may read a prompt.

        Such a graph attends by a plan, which is made for no such step (``attention.OneTokenBuilder``).
        """
        found = super().dispatch(num_reqs, num_tokens, *others, **more)
        is_full = found.cg_mode == CUDAGraphMode.FULL
        if num_reqs == num_tokens and is_full and found.uniform_token_count is None and found.num_tokens > 1:
            return Step(CUDAGraphMode.NONE, num_tokens, num_reqs)
        return found


def install() -> None:
    """Has the model runner of this process use them."""
    model_runner.ModelCudaGraphManager = StepGraphs
