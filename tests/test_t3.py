"""T3's parts that need no engine: positions, conditioning, prompts, the folder vLLM loads, engine arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chatterbox_vllm.bench.workload import random_voice
from chatterbox_vllm.checkpoint import Checkpoint, load_tensors
from chatterbox_vllm.errors import CheckpointError, ConfigurationError
from chatterbox_vllm.t3.conditioning import VoiceConditioner
from chatterbox_vllm.t3.folder import infer_config, model_folder
from chatterbox_vllm.t3.launch import cache_bytes_per_position, engine_arguments
from chatterbox_vllm.t3.positions import ORIGIN, OVERHEAD, prompt_positions, unpack, weight_steps
from chatterbox_vllm.t3.prompt import prompt_tokens
from chatterbox_vllm.types import START_SPEECH
from tests.t3_reference import Request, upstream_cond, upstream_t3


def test_positions_carry_kind_and_weight() -> None:
    tokens = prompt_tokens([5, 6, 7], placeholder_id=8898)
    positions, delta = prompt_positions(tokens, weight_steps(0.7231))
    rope, kind, weight = unpack(positions)
    bos = len(tokens) - 1
    assert kind.tolist() == [0] * 34 + [1, 2, 3, 4, 5] + [ORIGIN, ORIGIN]
    assert (rope - rope[bos]).tolist() == [i - bos for i in range(len(tokens))]
    assert torch.equal(weight, torch.full_like(weight, 0.7231))
    for i in range(1000):  # as vLLM counts on
        decoded = torch.tensor([[bos + 1 + i + delta]] * 3)
        rope, kind, weight = unpack(decoded)
        assert (rope.item(), kind.item()) == (ORIGIN + 1 + i, ORIGIN + 1 + i)
        assert weight.item() == pytest.approx(0.7231)


def test_positions_after_preemption_ignore_generated_start_tokens() -> None:
    """A resumed prompt ends in generated tokens, and upstream's distribution may generate 6561 itself."""
    prompt = prompt_tokens([5, 6, 7], placeholder_id=8898)
    whole, delta = prompt_positions([*prompt, 17, START_SPEECH, START_SPEECH, 4], weight_steps(0.5))
    alone, same = prompt_positions(prompt, weight_steps(0.5))
    assert delta == same
    assert torch.equal(whole[:, : len(prompt)], alone)
    assert (unpack(whole)[1][len(prompt) :] - ORIGIN).tolist() == [1, 2, 3, 4]


def test_positions_fit_32_bits() -> None:
    positions, delta = prompt_positions(prompt_tokens(list(range(1, 2049)), 8898), weight_steps(10.0))
    assert positions.min() >= 0
    assert positions.max() + 4100 < 2**31
    assert delta < 2**31


@pytest.mark.parametrize("exaggeration", [0.0, 0.5, 1.7])
def test_conditioning_equals_upstream(demo: Checkpoint, exaggeration: float) -> None:
    conditioner = VoiceConditioner(load_tensors(demo.t3))
    t3 = upstream_t3(demo.t3)
    for seed in range(3):
        request = Request([], random_voice(seed), 0.5, exaggeration)
        with torch.inference_mode():
            theirs = t3.prepare_conditioning(upstream_cond(request))[0]
        ours = conditioner.prefix(request.voice, exaggeration)
        assert ours.shape == (34, 128)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_prompt_length() -> None:
    assert len(prompt_tokens([1, 2, 3], 8898)) == 3 + OVERHEAD


def _written(demo: Checkpoint, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**load_tensors(demo.t3), **changes}
    path = folder / "t3_cfg.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_checkpoint_keys_are_strict(demo: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing tfmr\.norm\.weight"):
        infer_config(_written(demo, tmp_path, **{"tfmr.norm.weight": None}))
    with pytest.raises(CheckpointError, match="unexpected stray"):
        infer_config(_written(demo, tmp_path, stray=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"speech_head\.weight is \(8194, 64\), not \(8194, 128\)"):
        infer_config(_written(demo, tmp_path, **{"speech_head.weight": torch.zeros(8194, 64)}))
    with pytest.raises(CheckpointError, match="speech_emb"):
        infer_config(_written(demo, tmp_path, **{"speech_emb.weight": None}))


def test_truncated_checkpoint(demo: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "t3_cfg.safetensors"
    path.write_bytes(demo.t3.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"t3_cfg\.safetensors is not a readable safetensors file"):
        infer_config(path)


def test_model_folder_is_made_once_and_outside_the_checkpoint(demo: Checkpoint, tmp_path: Path) -> None:
    before = sorted(demo.folder.iterdir())
    config = infer_config(demo.t3)
    folder = model_folder(demo.t3, config, tmp_path)
    assert model_folder(demo.t3, config, tmp_path) == folder
    assert folder.is_relative_to(tmp_path)
    assert sorted(demo.folder.iterdir()) == before
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["ChatterboxT3"]
    assert (folder / "model.safetensors").resolve() == demo.t3.resolve()
    assert model_folder(demo.t3, infer_config(demo.t3, mask_invalid_tokens=False), tmp_path) != folder


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"enable_prefix_caching": True}, "enable_prefix_caching"),
        ({"gpu_memory_utilisation": 0.5}, "gpu_memory_utilisation"),
        ({"max_model_len": 10}, "max_model_len must be an integer from 54 to 3086"),
        ({"max_model_len": "many"}, "max_model_len must be an integer"),
    ],
)
def test_engine_arguments_are_checked(demo: Checkpoint, given: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        engine_arguments(infer_config(demo.t3), given)


@pytest.mark.parametrize("length", [54, 128, 384, 385, 500, 512, 513])
@pytest.mark.parametrize("block", [None, 32, 256])
def test_a_cpus_cache_holds_one_request_of_the_full_length(demo: Checkpoint, length: int, block: int | None) -> None:
    """And the block that vLLM keeps for itself."""
    config = infer_config(demo.t3)
    given = {"max_model_len": length, "max_num_seqs": 1} | ({"block_size": block} if block else {})
    size = block or 128
    bytes_of_a_block = cache_bytes_per_position(config, itemsize=4) * size
    blocks = engine_arguments(config, given)["kv_cache_memory_bytes"] // bytes_of_a_block
    assert (blocks - 1) * size >= length
