"""Our T3 in vLLM speaks upstream's tokens, whatever vLLM does with the batch."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from chatterbox_vllm.checkpoint import Checkpoint
from chatterbox_vllm.t3.generator import T3Generator
from chatterbox_vllm.t3.launch import launch
from chatterbox_vllm.types import SPOKEN_TOKENS, STOP_SPEECH, SpeechOptions
from tests.t3_reference import InProcessT3, Request, assert_same, requests, upstream_tokens

TOKENS = 100
GREEDY = SpeechOptions(temperature=0.0, repetition_penalty=1.2, max_tokens=TOKENS)


@pytest.fixture(scope="module")
def english(demo: Checkpoint) -> tuple[Path, list[Request], list[list[int]]]:
    """Weights, 20 requests, and what upstream says to them."""
    asked = requests(20, 704)
    return demo.t3, asked, upstream_tokens(demo.t3, asked, TOKENS)


def test_references_vary(english: Any) -> None:
    """The comparison means something: the requests get different tokens, and no run repeats one token."""
    theirs = english[2]
    assert len({tuple(tokens[:10]) for tokens in theirs}) == len(theirs)
    assert min(len(set(tokens[:20])) for tokens in theirs) > 5


def test_mixed_batch(english: Any, cache: Path) -> None:
    weights, asked, theirs = english
    assert_same(InProcessT3(weights, cache).tokens(asked, GREEDY), theirs)


def test_chunked_prefill(english: Any, cache: Path) -> None:
    weights, asked, theirs = english
    t3 = InProcessT3(weights, cache, max_num_batched_tokens=48, enable_chunked_prefill=True)
    assert_same(t3.tokens(asked, GREEDY), theirs)


def test_preemption(english: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, asked, theirs = english
    t3 = InProcessT3(weights, cache, num_gpu_blocks_override=14)
    preempted = []
    preempt = t3.scheduler._preempt_request
    monkeypatch.setattr(t3.scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), preempt(*a, **k))[1])
    assert_same(t3.tokens(asked, GREEDY), theirs)
    assert preempted, "the engine was not starved"


def test_torch_compile(english: Any, cache: Path) -> None:
    weights, asked, theirs = english
    assert_same(InProcessT3(weights, cache, enforce_eager=False).tokens(asked, GREEDY), theirs)


def test_multilingual(multilingual_demo: Checkpoint, cache: Path) -> None:
    asked = requests(20, 2454, seed=1)
    theirs = upstream_tokens(multilingual_demo.t3, asked, TOKENS)
    assert_same(InProcessT3(multilingual_demo.t3, cache).tokens(asked, GREEDY), theirs)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors")
def test_tensor_parallel(english: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers with half the heads each; through the launcher, as a server would."""
    weights, asked, theirs = english
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])))

    async def speak() -> list[list[int]]:
        t3 = await asyncio.to_thread(
            launch, weights, cache=cache, mask_invalid_tokens=False, max_model_len=512, tensor_parallel_size=2
        )
        try:
            return list(await asyncio.gather(*(one(t3, request) for request in asked)))
        finally:
            t3.shutdown()

    async def one(t3: T3Generator, request: Request) -> list[int]:
        options = GREEDY.but(cfg_weight=request.cfg_weight, exaggeration=request.exaggeration)
        return [i async for new in t3.tokens(request.text, request.voice, options, interval=None) for i in new]

    assert_same(asyncio.run(speak()), theirs)


def test_unspoken_ids_are_masked(english: Any, cache: Path) -> None:
    """At a temperature where upstream would sample ids that are no sound, we do not, unless asked to."""
    weights, asked, _ = english
    wild = SpeechOptions(temperature=2.0, min_p=0.0, repetition_penalty=1.0, max_tokens=TOKENS, seed=1)

    def unspoken(mask: bool) -> int:
        spoken = InProcessT3(weights, cache, mask_invalid_tokens=mask).tokens(asked, wild)
        return sum(token >= SPOKEN_TOKENS and token != STOP_SPEECH for tokens in spoken for token in tokens)

    assert unspoken(mask=True) == 0
    assert unspoken(mask=False) > 0
