"""T3's own attention of one token a request, and which CUDA graphs its steps have.

The kernel runs on a card as it is; without one, in Triton's interpreter: see ``test_kernels``.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel_support import DEVICE, fresh_modules, needs_triton

HEADS, WIDTH, PAGE = 4, 64, 16
LENGTHS = (1, 2, 16, 17, 129, 130, 300, 0)
"""Of one token, around a page and a tile, of several tiles; and a row that only fills up a graph."""


@pytest.fixture
def attention() -> Iterator[Any]:
    with fresh_modules("chatterbox_vllm.t3.kernels", "chatterbox_vllm.t3.attention"):
        yield importlib.import_module("chatterbox_vllm.t3.attention")


class Batch:
    """A cache with the past of some requests in shuffled pages, and a new token for each."""

    def __init__(self, dtype: torch.dtype) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw).to(DEVICE, dtype)

        most = -(-max(LENGTHS) // PAGE)
        pages = torch.randperm(len(LENGTHS) * most, generator=draw) + 1
        self.metadata = SimpleNamespace(
            max_query_len=1,
            seq_lens=torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE),
            block_table=pages.view(len(LENGTHS), most).to(DEVICE, torch.int32),
        )
        # As vLLM lays it out: a page's tokens, their heads, a head's key and value.
        self.cache = normal(len(pages) + 1, PAGE, HEADS, 2 * WIDTH).transpose(1, 2)
        self.query, self.key = 2 * normal(len(LENGTHS), HEADS, WIDTH), normal(len(LENGTHS), HEADS, WIDTH)
        self.value = normal(len(LENGTHS), 3, HEADS, WIDTH)[:, 1]  # a part of something larger

    def past(self, request: int) -> tuple[Tensor, Tensor]:
        """(heads, length, width) keys and values of the request, read from the cache."""
        table, length = self.metadata.block_table[request].long(), LENGTHS[request]
        rows = self.cache[table].movedim(1, 0).flatten(1, 2)[:, :length]
        return rows[..., :WIDTH], rows[..., WIDTH:]


@needs_triton
@pytest.mark.parametrize("multiprocessors", [1, 8, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_token_attends_to_all_before_it(
    attention: Any, dtype: torch.dtype, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "num_compute_units", lambda: multiprocessors)
    batch = Batch(dtype)
    before, output = batch.cache.clone(), torch.empty_like(batch.query)
    layer = SimpleNamespace(num_heads=HEADS, head_size=WIDTH, scale=WIDTH**-0.5)
    attention.OneTokenImpl.forward(
        layer, None, batch.query, batch.key, batch.value, batch.cache, batch.metadata, output
    )
    written = torch.zeros(batch.cache.shape[0], PAGE, dtype=torch.bool)
    for request, length in enumerate(LENGTHS):
        if length == 0:
            continue
        keys, values = batch.past(request)
        assert torch.equal(keys[:, -1], batch.key[request])
        assert torch.equal(values[:, -1], batch.value[request])
        written[batch.metadata.block_table[request, (length - 1) // PAGE], (length - 1) % PAGE] = True
        score = torch.einsum("hd,hnd->hn", batch.query[request].double(), keys.double()) / math.sqrt(WIDTH)
        wanted = torch.einsum("hn,hnd->hd", score.softmax(-1), values.double())
        close = {"atol": 2e-6, "rtol": 2e-6} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 8e-3}
        torch.testing.assert_close(output[request].double(), wanted, **close)
    untouched = ~written[:, None, :, None].expand_as(before).to(DEVICE)
    assert torch.equal(batch.cache[untouched], before[untouched])


def config(cache_dtype: str = "auto", ranks: int = 1) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(decode_context_parallel_size=ranks),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )


def test_what_takes_the_place_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from chatterbox_vllm.t3 import attention

    monkeypatch.setattr(attention, "get_attn_backend", lambda *_: attention.FlashAttentionBackend)
    assert attention.attention_backend(config(), 64) is attention.OneTokenAttention
    assert attention.attention_backend(config("fp8"), 64) is None
    assert attention.attention_backend(config(ranks=2), 64) is None
    monkeypatch.setattr(attention.envs, "VLLM_BATCH_INVARIANT", True)
    assert attention.attention_backend(config(), 64) is None
    monkeypatch.setattr(attention.envs, "VLLM_BATCH_INVARIANT", False)
    monkeypatch.setattr(attention, "get_attn_backend", lambda *_: CPUAttentionBackend)
    assert attention.attention_backend(config(), 64) is None


def test_programs_have_the_more_threads_the_fewer_they_are() -> None:
    from chatterbox_vllm.t3.attention import SHAPES, shape

    chosen = [shape(32 * requests, 132) for requests in (1, 4, 5, 33, 34, 256)]
    few, some, many = (tuple(each[1:]) for each in SHAPES)
    assert chosen == [few, few, some, some, many, many]


def test_vllm_knows_the_backend_as_its_own() -> None:
    from chatterbox_vllm.t3.attention import OneTokenAttention, OneTokenBuilder, OneTokenImpl

    assert OneTokenAttention.get_name() == "FLASH_ATTN"
    assert OneTokenAttention.get_impl_cls() is OneTokenImpl
    assert OneTokenAttention.get_builder_cls() is OneTokenBuilder


def test_a_prompt_is_flash_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    from chatterbox_vllm.t3.attention import FlashAttentionImpl, OneTokenImpl

    done: list[object] = []
    monkeypatch.setattr(OneTokenImpl, "do_kv_cache_update", lambda _, *given: done.append(given[1:]))
    monkeypatch.setattr(FlashAttentionImpl, "forward", lambda _, *given: done.append(given[5]))
    layer, metadata = object.__new__(OneTokenImpl), SimpleNamespace(max_query_len=2, slot_mapping="slots")
    layer.forward(None, "query", "key", "value", "cache", metadata, "output")  # type: ignore[arg-type]
    assert done == [("key", "value", "cache", "slots"), metadata]
    done.clear()
    layer.forward(None, "query", "key", "value", "cache", None, "output")  # type: ignore[arg-type]
    assert done == [None]


def test_only_prompts_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from chatterbox_vllm.t3.attention import FlashAttentionMetadataBuilder, OneTokenBuilder

    monkeypatch.setattr(
        FlashAttentionMetadataBuilder, "_get_scheduler_metadata", lambda _, *, max_query_len, batch_size: "plan"
    )
    builder: Any = object.__new__(OneTokenBuilder)
    builder.vllm_config = SimpleNamespace(use_v2_model_runner=True)
    assert builder._get_scheduler_metadata(max_query_len=1, batch_size=8) is None
    assert builder._get_scheduler_metadata(max_query_len=98, batch_size=8) == "plan"
    builder.vllm_config.use_v2_model_runner = False
    assert builder._get_scheduler_metadata(max_query_len=1, batch_size=8) == "plan"


class TestGraphs:
    @pytest.fixture
    def make(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Any]:
        """The graphs of a mode, of a runner with room for so many requests."""
        from vllm.config.compilation import CUDAGraphMode
        from vllm.v1.worker.gpu import cudagraph_utils

        from chatterbox_vllm.t3.graphs import StepGraphs

        rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
        monkeypatch.setattr(cudagraph_utils, "get_pp_group", lambda: rank)
        monkeypatch.setattr(cudagraph_utils.current_platform, "get_global_graph_pool", lambda: None, raising=False)

        def made(mode: str, requests: int) -> Any:
            sizes = [1, 2, 4, 8, 16, 32]
            vllm_config = SimpleNamespace(
                scheduler_config=SimpleNamespace(max_num_seqs=requests),
                compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=32),
                parallel_config=SimpleNamespace(tensor_parallel_size=1),
                speculative_config=None,
                cache_config=SimpleNamespace(use_kda_recoverssm=False),
            )
            graphs: Any = StepGraphs(vllm_config, torch.device("cpu"), CUDAGraphMode[mode], decode_query_len=1)
            graphs._graphs_captured = True
            return graphs

        return made

    @pytest.fixture(params=["FULL", "FULL_AND_PIECEWISE"])
    def graphs(self, make: Callable[[str, int], Any], request: pytest.FixtureRequest) -> Any:
        """Of a runner with room for eight requests."""
        return make(request.param, 8)

    def test_all_requests_have_a_graph_to_decode_in(self, make: Callable[[str, int], Any]) -> None:
        """Though vLLM was told no size for so many."""
        graphs = make("FULL", 11)
        step = graphs.dispatch(10, 10, 1, 0)
        assert (step.num_tokens, step.num_reqs, step.uniform_token_count) == (11, 11, 1)
        assert graphs.dispatch(10, 11, None, 0).num_tokens == 16
        sizes = [step.num_tokens for step in next(iter(graphs._capture_descs.values())) if step.uniform_token_count]
        assert sizes == [11, 8, 4, 2, 1]

    def test_which_graph_a_step_runs(self, graphs: Any) -> None:
        mode = graphs.cudagraph_mode.name
        decoding = graphs.dispatch(5, 5, 1, 0)
        assert (decoding.cg_mode.name, decoding.num_tokens, decoding.uniform_token_count) == ("FULL", 8, 1)
        assert decoding.num_reqs == 8
        prompt = graphs.dispatch(2, 21, None, 0)
        assert prompt.cg_mode.name == ("FULL" if mode == "FULL" else "PIECEWISE")
        assert (prompt.num_tokens, prompt.uniform_token_count) == (32, None)
        assert prompt.num_reqs == (8 if mode == "FULL" else None)
        assert graphs.dispatch(2, 33, None, 0).cg_mode.name == "NONE"

    def test_a_token_each_is_never_a_step_that_reads_prompts(self, graphs: Any) -> None:
        """Nine requests have no graph; and a prompt's first token, if it comes alone, is no decoding to vLLM."""
        for step in (graphs.dispatch(9, 9, 1, 0), graphs.dispatch(5, 5, None, 0)):
            assert step.uniform_token_count is None
            assert step.cg_mode.name != "FULL"
        assert graphs.dispatch(1, 1, None, 0).num_tokens == 1

    def test_all_are_captured_the_largest_first(self, graphs: Any) -> None:
        from vllm.config.compilation import CUDAGraphMode

        steps = graphs._capture_descs[CUDAGraphMode.FULL]
        sizes = [step.num_tokens for step in steps]
        assert sizes == sorted(sizes, reverse=True)
        assert [step.num_tokens for step in steps if step.uniform_token_count] == [8, 4, 2, 1]
        others = [step.num_tokens for step in steps if not step.uniform_token_count]
        assert others == ([32, 16, 8, 4, 2, 1] if graphs.cudagraph_mode == CUDAGraphMode.FULL else [])
        assert len(set(steps)) == len(steps)


def test_vllms_runner_makes_these_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu import model_runner

    from chatterbox_vllm.t3 import graphs

    monkeypatch.setattr(model_runner, "ModelCudaGraphManager", model_runner.ModelCudaGraphManager)
    graphs.install()
    assert model_runner.ModelCudaGraphManager is graphs.StepGraphs


def test_what_layers_are_told_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where a graph of steps with a token each is replayed, which is the one case in which nobody asks."""
    from vllm.config.compilation import CUDAGraphMode

    from chatterbox_vllm.t3 import state
    from chatterbox_vllm.t3.attention import FlashAttentionBackend, OneTokenAttention

    monkeypatch.setattr(state.DefaultModelState, "prepare_attn", lambda *_, **more: {"told": "all"})
    its: Any = object.__new__(state.GuidedModelState)

    def told(
        tokens: int = 4, mode: str = "FULL", backend: Any = OneTokenAttention, blocks: int | None = None, **more: bool
    ) -> bool:
        batch = SimpleNamespace(num_reqs=4, num_tokens=tokens)
        groups = [[SimpleNamespace(backend=backend, kernel_block_size=blocks)]]
        return bool(its.prepare_attn(batch, CUDAGraphMode[mode], (), None, groups, None, **more))

    assert not told()
    assert told(tokens=5)
    assert told(mode="NONE")
    assert told(mode="PIECEWISE")
    assert told(backend=FlashAttentionBackend)
    assert told(blocks=16)
    assert told(for_capture=True)
