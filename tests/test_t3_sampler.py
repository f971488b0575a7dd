"""T3's sampling in one kernel against vLLM's kernels, to the token.

On a card as it is; without one, in Triton's interpreter: see ``test_kernels``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernel_support import DEVICE, fresh_modules, needs_triton

pytestmark = needs_triton

VLLM = "vllm.v1.worker.gpu.sample"
KERNELS = (
    *(f"{VLLM}.{name}" for name in ("gumbel", "logit_bias", "min_p", "penalties", "sampler")),
    "chatterbox_vllm.t3.kernels",
)
VOCABULARY = 8194 + 704 + 1
SILENT = -float("inf")


@pytest.fixture
def modules() -> Iterator[dict[str, Any]]:
    """vLLM's kernels and ours."""
    with fresh_modules(*KERNELS, f"{VLLM}.states", "chatterbox_vllm.t3.sampler"):
        yield {name.rpartition(".")[2]: importlib.import_module(name) for name in KERNELS}


class State:
    """What vLLM keeps of requests, some of them in work: ``rows`` says which."""

    def __init__(self, generator: torch.Generator) -> None:
        self.rows = torch.tensor([3, 0, 6, 1, 5, 4], device=DEVICE)
        self.position = torch.tensor([98, 200, 131, 99, 512, 1000], device=DEVICE)
        self.temperature = torch.tensor([0.8, 0.0, 1.0, 0.8, 1.3, 0.8, 0.5]).to(DEVICE)
        self.min_p = torch.tensor([0.05, 0.05, 0.0, 0.2, 0.05, 0.0, 0.1]).to(DEVICE)
        self.repetition = torch.tensor([1.2, 1.2, 1.0, 2.0, 1.1, 1.2, 1.0]).to(DEVICE)
        self.seeds = torch.randint(-(2**62), 2**62, (7,), generator=generator).to(DEVICE)
        self.stops = torch.tensor([0, 1, 0, 1, 1, 1, 0], dtype=torch.int32, device=DEVICE)
        self.shortest = torch.tensor([0, 101, 0, 99, 900, 600, 0], dtype=torch.int32, device=DEVICE)
        seen = torch.randint(0, 8194, (7, 300), generator=generator)
        counts = torch.zeros(7, VOCABULARY, dtype=torch.int32)
        self.counts = counts.scatter_(1, seen, 1).to(DEVICE)
        self.prompt = torch.zeros(7, -(-VOCABULARY // 32), dtype=torch.int32)
        self.prompt[:, 6561 // 32] = 1 << 6561 % 32
        self.prompt[2:5, 17] = 0x0F0F00FF
        self.prompt = self.prompt.to(DEVICE)

    @property
    def zeros(self) -> Tensor:
        return torch.zeros(7, device=DEVICE)


def masked(logits: Tensor, *, mask: bool) -> Tensor:
    from chatterbox_vllm.t3.model import ChatterboxT3, unspoken_ids

    model = SimpleNamespace(unspoken=unspoken_ids(mask).to(DEVICE), config=SimpleNamespace(vocab_size=VOCABULARY))
    return ChatterboxT3.masked(model, logits.clone())  # type: ignore[arg-type]


def vllms_token(modules: dict[str, Any], logits: Tensor, state: State) -> Tensor:
    """As ``Sampler.apply_sampling_params`` and ``_sample_random`` go about it."""
    logits, none = logits.float(), torch.zeros(7, dtype=torch.int32, device=DEVICE)
    ids = torch.full((7, 128), 6562, dtype=torch.int32, device=DEVICE)
    modules["logit_bias"].apply_logit_bias(
        *(logits, state.rows, state.position, none, ids, none, ids, state.zeros[:, None]),
        *(state.shortest, state.stops, none, ids),
    )
    penalties = (state.repetition, state.zeros, state.zeros, state.prompt, state.counts)
    modules["penalties"].apply_penalties(logits, state.rows, none, none, *penalties)
    modules["gumbel"].apply_temperature(logits, state.rows, state.temperature)
    modules["min_p"].apply_min_p(logits, state.rows, state.min_p)
    options = {"apply_temperature": False, "is_drafting": False}
    return modules["gumbel"].gumbel_sample(
        logits, state.rows, state.temperature, state.seeds, state.position, **options
    )


def shared(values: Tensor) -> SimpleNamespace:
    """As vLLM's tensors that a CPU and a card share."""
    return SimpleNamespace(gpu=values, np=values.cpu().numpy())


def one_kernel(modules: dict[str, Any], state: State, *, mask: bool) -> Any:
    """Our sampler in place of a vLLM's that has this state."""
    from chatterbox_vllm.t3.model import unspoken_ids

    off = shared(state.zeros)
    bias = {"num_allowed_token_ids": off, "num_logit_bias": off, "restore_when_all_masked": off}
    bias |= {"num_stop_token_ids": shared(state.stops), "min_lens": shared(state.shortest)}
    sampling = {"temperature": shared(state.temperature), "min_p": shared(state.min_p), "seeds": shared(state.seeds)}
    sampling |= {"top_p": shared(state.zeros + 1), "top_k": shared(state.zeros + VOCABULARY)}
    penalties = SimpleNamespace(
        repetition_penalty=shared(state.repetition),
        frequency_penalty=off,
        presence_penalty=off,
        prompt_bin_mask=state.prompt,
        output_bin_counts=state.counts,
    )
    vllms = SimpleNamespace(
        sampling_states=SimpleNamespace(**sampling, vocab_size=VOCABULARY),
        penalties_state=penalties,
        logits_processors=[SimpleNamespace(**bias), penalties, SimpleNamespace(num_bad_words=off)],
        thinking_budget_state=SimpleNamespace(enabled=False),
        use_fp64_gumbel=False,
    )
    model = SimpleNamespace(unspoken=unspoken_ids(mask), masked=lambda logits: masked(logits, mask=mask))
    sampler = importlib.import_module("chatterbox_vllm.t3.sampler").OneKernelSampler(vllms, model)
    assert model.raw_logits
    return sampler


@pytest.mark.parametrize("mask", [True, False])
def test_the_token_is_vllms(modules: dict[str, Any], mask: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    state = State(generator)
    sampler, drawn = one_kernel(modules, state, mask=mask), []
    for _ in range(8):
        logits = (4 * torch.randn(6, 8194, generator=generator)).to(DEVICE, torch.bfloat16)
        logits[::2, 6562] = 30.0  # of these three that want to stop, the last may not yet
        own, _ = sampler.sample(logits, state.rows, state.rows, state.rows.cpu().numpy(), state.position)
        assert own.tolist() == vllms_token(modules, masked(logits, mask=mask), state).tolist()
        drawn += own.tolist()
    assert len(set(drawn)) > 30
    assert drawn.count(6562) == 16
    assert any(token > 6562 for token in drawn) is not mask


@pytest.mark.parametrize(
    "unusual",
    [
        *("top_p", "top_k", "frequency_penalty", "presence_penalty", "num_bad_words"),
        *("num_allowed_token_ids", "num_logit_bias", "num_stop_token_ids", "restore_when_all_masked"),
    ],
)
def test_what_the_kernel_does_not_know_is_left_to_vllm(
    modules: dict[str, Any], unusual: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = State(torch.Generator().manual_seed(0))
    sampler, asked = one_kernel(modules, state, mask=True), []
    monkeypatch.setattr(type(sampler).__bases__[0], "sample", lambda _, logits, *args, **kwargs: asked.append(logits))
    logits, rows = torch.zeros(2, 8194, device=DEVICE), state.rows[:2]
    call = (logits, rows, rows, rows.cpu().numpy(), state.position[:2])
    sampler.sample(*call)
    assert not asked
    for part in (sampler.sampling_states, *sampler.logits_processors):
        values = vars(part).get(unusual)
        if values is not None:
            vars(part)[unusual] = shared(torch.full((7,), 2.5))
    sampler.sample(*call)
    (given,) = asked
    assert given.shape == (2, VOCABULARY)
    assert given[0, [0, 6561, 6562, 6563, 8194]].tolist() == [0.0, SILENT, 0.0, SILENT, SILENT]
    asked.clear()
    one_kernel(modules, state, mask=True).sample(*call, return_logprobs=True)
    assert len(asked) == 1
