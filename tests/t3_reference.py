"""T3 twice: upstream's ``T3.inference``, and our model in an in-process vLLM engine, greedy, on the same requests."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tqdm import tqdm

from chatterbox_vllm import upstream
from chatterbox_vllm.bench.workload import random_text, random_voice
from chatterbox_vllm.checkpoint import load_tensors
from chatterbox_vllm.t3.conditioning import VoiceConditioner
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.folder import infer_config, model_folder
from chatterbox_vllm.t3.launch import engine_arguments
from chatterbox_vllm.t3.positions import weight_steps
from chatterbox_vllm.t3.processor import engine_input
from chatterbox_vllm.t3.prompt import prompt_tokens, sampling_params
from chatterbox_vllm.types import SpeechOptions, VoiceFeatures


@dataclass(frozen=True)
class Request:
    text: list[int]
    voice: VoiceFeatures
    cfg_weight: float
    exaggeration: float


def requests(count: int, vocabulary: int, seed: int = 0) -> list[Request]:
    """Mixed lengths (3 to 200 text tokens), guidance weights (0 to 1), exaggerations and voices."""
    draw = random.Random(seed)
    voices = [random_voice(i) for i in range(3)]
    lengths = [3, 200, *(draw.randint(3, 200) for _ in range(count - 2))]
    weights = [0.0, 1.0, 0.5, 0.3, 0.7231]
    return [
        Request(
            random_text(i, vocabulary, length), voices[i % 3], weights[i % len(weights)], draw.choice([0.25, 0.5, 1.3])
        )
        for i, length in enumerate(lengths)
    ]


def upstream_t3(weights: Path) -> Any:
    """Upstream's ``T3`` with the checkpoint's sizes, which its constructors otherwise fix."""
    config = infer_config(weights)
    llama, cond_enc = upstream.load("t3.llama_configs"), upstream.load("t3.modules.cond_enc")
    llama.LLAMA_CONFIGS["of-this-checkpoint"] = {
        **llama.LLAMA_520M_CONFIG_DICT,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "attn_implementation": "eager",
    }
    hp = upstream.load("t3.modules.t3_config").T3Config(config.text_vocabulary)
    hp.llama_config_name = "of-this-checkpoint"
    perceiver = upstream.load("t3.modules.perceiver").Perceiver
    sized = partial(perceiver, pre_attention_query_size=config.hidden_size, embedding_dim=config.hidden_size)
    with mock.patch.object(cond_enc, "Perceiver", sized):
        t3 = upstream.load("t3.t3").T3(hp)
    t3.load_state_dict(load_tensors(weights))
    return t3.eval()


def upstream_cond(request: Request) -> Any:
    """Upstream's ``T3Cond`` of a request."""
    return upstream.load("t3.modules.cond_enc").T3Cond(
        speaker_emb=request.voice.speaker_embedding[None],
        cond_prompt_speech_tokens=request.voice.t3_prompt_tokens[None],
        emotion_adv=request.exaggeration * torch.ones(1, 1, 1),
    )


def upstream_tokens(weights: Path, asked: list[Request], count: int) -> list[list[int]]:
    """Upstream's greedy tokens, one request at a time. Its multilingual analyzer, gone upstream since, is left out."""
    t3 = upstream_t3(weights)

    def greedy(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
        return probabilities.argmax(-1, keepdim=True)

    def one(request: Request) -> list[int]:
        return t3.inference(
            t3_cond=upstream_cond(request),
            text_tokens=torch.tensor([[255, *request.text, 0]] * 2),
            max_new_tokens=count,
            temperature=1.0,
            top_p=1.0,
            min_p=0.0,
            # upstream crashes on 0; this adds nothing in float32
            cfg_weight=request.cfg_weight or 1e-30,
            repetition_penalty=1.2,
        )[0].tolist()

    no_analyzer = property(lambda self: False)
    quiet = partial(tqdm, disable=True)
    with (
        mock.patch.object(torch, "multinomial", greedy),
        mock.patch.object(type(t3.hp), "is_multilingual", no_analyzer),
        mock.patch.object(upstream.load("t3.t3"), "tqdm", quiet),
    ):
        return [one(request) for request in asked]


@contextmanager
def llvmlite_hidden() -> Iterator[None]:
    """In-process CPU engines look through every loaded module, and trip over llvmlite's way of answering."""
    hidden = {name: module for name, module in sys.modules.items() if name.startswith("llvmlite")}
    for name in hidden:
        del sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update(hidden)


class InProcessT3:
    """Our model in a vLLM engine without processes of its own, so that tests can look inside."""

    def __init__(self, weights: Path, cache: Path, *, mask_invalid_tokens: bool = False, **engine: Any) -> None:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.config: T3Config = infer_config(weights, mask_invalid_tokens=mask_invalid_tokens)
        folder = model_folder(weights, self.config, cache)
        engine = {"max_model_len": 512, "max_num_seqs": 32, "kv_cache_memory_bytes": 256 << 20, **engine}
        arguments = EngineArgs(model=str(folder), **engine_arguments(self.config, engine))
        with llvmlite_hidden():
            self._engine = LLMEngine.from_engine_args(arguments, enable_multiprocessing=False)
        self._conditioner = VoiceConditioner(load_tensors(weights))

    @property
    def scheduler(self) -> Any:
        return self._engine.engine_core.engine_core.scheduler

    def tokens(
        self, asked: list[Request], options: SpeechOptions, watch: Callable[[], None] = lambda: None
    ) -> list[list[int]]:
        """All requests in one batch; ``watch`` is called after each step. The stop token is kept."""
        for index, request in enumerate(asked):
            prefix = self._conditioner.prefix(request.voice, request.exaggeration)
            self._engine.add_request(
                f"{index}",
                engine_input(
                    prompt_tokens(request.text, self.config.placeholder_id),
                    prefix,
                    weight_steps(request.cfg_weight),
                    f"{request.voice.digest}:{request.exaggeration}",
                ),
                sampling_params(options, max_tokens=options.max_tokens, interval=None),
            )
        done: dict[str, list[int]] = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                if output.finished:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            watch()
        return [done[f"{index}"] for index in range(len(asked))]


def assert_same(ours: list[list[int]], theirs: list[list[int]]) -> None:
    """Fails naming the first request and token that differ."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            pytest.fail(f"request {index} differs from token {at} on: {a[at : at + 4]} for {b[at : at + 4]}")
