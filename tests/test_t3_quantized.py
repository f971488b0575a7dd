"""T3 in few bits through vLLM's CPU build; and what of it can be checked without a GPU."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from vllm import AsyncEngineArgs
from vllm.config import CUDAGraphMode
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear import MPLinearKernel, MPLinearLayerConfig
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.platforms.interface import PlatformEnum
from vllm.scalar_type import scalar_types

from chatterbox_vllm.checkpoint import Checkpoint, load_tensors, resolve
from chatterbox_vllm.convert import quantize
from chatterbox_vllm.errors import CheckpointError, ConfigurationError, MissingDependency
from chatterbox_vllm.evaluate.t3 import PlainT3
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import effective_method
from chatterbox_vllm.t3 import conversion, methods
from chatterbox_vllm.t3.config import T3Config
from chatterbox_vllm.t3.conversion import converted, linear_layers
from chatterbox_vllm.t3.folder import infer_config, model_folder
from chatterbox_vllm.t3.footprint import T3Footprint
from chatterbox_vllm.t3.four_bit import FourBitLinear
from chatterbox_vllm.t3.launch import engine_arguments, launch
from chatterbox_vllm.t3.methods import method_arguments
from chatterbox_vllm.types import SpeechOptions
from tests.t3_reference import InProcessT3, assert_same, requests

# Later, a greedy choice between two that are as good may fall otherwise: products round differently.
GREEDY = SpeechOptions(temperature=0.0, repetition_penalty=1.2, max_tokens=4)


@pytest.fixture(scope="module")
def awq(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("awq") / "out"
    quantize(demo, out, texts=["Hello there."], tokens=8)
    return resolve(out)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """vLLM's platform as a GPU of the capability in the list."""
    capability = [90]
    monkeypatch.setattr(methods.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(
        methods.current_platform, "has_device_capability", lambda least, device_id=0: capability[0] >= least
    )
    monkeypatch.setattr(
        methods.current_platform, "is_device_capability_family", lambda family: capability[0] // 10 == family // 10
    )
    return capability


def decoded(path: Path, target: Path, scales: torch.dtype = torch.float32) -> Path:
    """The quantised T3 file as a plain one, of the matrices that its tensors stand for, with scales of that dtype."""
    stored, tensors = Stored.of(path), load_file(path)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(scales) if name.endswith(".weight_scale") else tensor
    for stem, size in linear_layers(infer_config(path)).items():
        whole = stored.decode(stem, tensors)
        for name in stored.shapes(stem, *size):
            del tensors[name]
        tensors[f"{stem}.weight"] = whole
    save_file(tensors, target)
    return target


def test_8_bit_methods_speak_as_their_decoded_weights(
    demo: Checkpoint, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both round a row alike."""
    config, asked = infer_config(demo.t3), requests(8, 704)
    path = converted(demo.t3, "int8", config, cache)
    theirs = InProcessT3(decoded(path, tmp_path / "t3.safetensors"), cache).tokens(asked, GREEDY)
    assert_same(InProcessT3(path, cache).tokens(asked, GREEDY), theirs)
    monkeypatch.setitem(linear._POSSIBLE_KERNELS, PlatformEnum.CPU, [UnpackedKernel])
    path = converted(demo.t3, "bnb-8bit", config, cache)
    assert_same(InProcessT3(path, cache).tokens(asked, GREEDY), theirs)


class UnpackedKernel(MPLinearKernel):
    """In the place of Marlin, of which a CPU has none: multiplies with what vLLM reads out of the packed integers."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        return c.weight_type == scalar_types.uint8b128 and not c.zero_points and c.group_size == -1, "another type"

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        packed, scale, _ = self._get_weight_params(layer)
        codes = unpack_quantized_values_into_int32(packed.data, self.config.weight_type, packed_dim=1)
        layer.unpacked = (codes - 128).to(scale.dtype) * scale.data

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.nn.functional.linear(x, layer.unpacked, bias)  # type: ignore[arg-type]


def test_awq_speaks_as_its_decoded_weights(awq: Checkpoint, cache: Path, tmp_path: Path) -> None:
    asked = requests(8, 704)
    arguments = method_arguments("awq", infer_config(awq.t3), {})
    assert arguments == {"dtype": "bfloat16"}
    ours = InProcessT3(awq.t3, cache, **arguments).tokens(asked, GREEDY)
    plain = decoded(awq.t3, tmp_path / "t3.safetensors")
    theirs = InProcessT3(plain, cache, **arguments).tokens(asked, GREEDY)
    # Both round to bfloat16, one within the product and one after it, so that a near tie may fall either way: in
    # float32 what is said first is the likeliest, or within a tenth of it, where others are further.
    exact = PlainT3(load_tensors(plain), plain, "none")
    for request, said in zip(asked, ours, strict=True):
        options = replace(GREEDY, cfg_weight=request.cfg_weight, exaggeration=request.exaggeration)
        (likely,) = exact.log_probabilities(request.text, request.voice, options, said[:1])
        assert likely[said[0]] > likely.max() - 0.1
    assert sum(own == their for own, their in zip(ours, theirs, strict=True)) >= 6


def test_awq_arranged_for_our_kernel_speaks_as_its_decoded_weights(
    demo: Checkpoint, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM loads a checkpoint into it, with merged matrices; ``test_t3_four_bit`` has the products."""
    quantize(demo, tmp_path / "awq", texts=["Hello there."], tokens=8, group_size=32)
    path, asked = resolve(tmp_path / "awq").t3, requests(8, 704)
    plain = decoded(path, tmp_path / "t3.safetensors", scales=torch.bfloat16)
    theirs = InProcessT3(plain, cache, dtype="bfloat16").tokens(asked, GREEDY)
    monkeypatch.setitem(linear._POSSIBLE_KERNELS, PlatformEnum.CPU, [ArrangedKernel])
    ours = InProcessT3(path, cache, dtype="bfloat16").tokens(asked, GREEDY)
    assert_same(ours, theirs)


class ArrangedKernel(FourBitLinear):
    """In the place of Triton: multiplies with what stands in its arrangement."""

    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        words, groups, _ = self._get_weight_params(layer)
        planes = words.to(torch.int32).unflatten(1, (-1, 1, 32)) >> torch.tensor([0, 4, 8, 12])[:, None]
        codes = ((planes & 15) | 0x4300).to(torch.int16).view(torch.bfloat16).flatten(1)
        scale, zero = ((each.T & 0xFFFF).to(torch.int16).view(torch.bfloat16) for each in (groups, groups >> 16))
        weight = (codes.unflatten(1, (-1, 32)) - zero[..., None]) * scale[..., None]
        return torch.nn.functional.linear(x, weight.flatten(1), bias)


def test_launch_converts_once_and_measures(demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "write", counted := Counted(conversion.write))

    async def measured() -> tuple[str, T3Footprint, int]:
        t3 = await asyncio.to_thread(
            launch, demo.t3, cache=tmp_path, method="int8", max_model_len=256, max_num_seqs=2, dtype="float32"
        )
        try:
            request = requests(2, 704)[0]
            spoken = [i async for new in t3.tokens(request.text, request.voice, GREEDY, interval=None) for i in new]
            return t3.method, await t3.footprint(), len(spoken)
        finally:
            t3.shutdown()

    method, footprint, spoken = asyncio.run(measured())
    assert (method, spoken) == ("int8", GREEDY.max_tokens)
    config = infer_config(demo.t3)
    sizes = linear_layers(config).values()
    elements, rows = sum(n * k for n, k in sizes), sum(n for n, _ in sizes)
    assert footprint.linear_before == 4 * elements
    assert elements < footprint.linear <= elements + 8 * rows  # a scale and oneDNN's sum, a row
    assert footprint.layers == 4 * config.num_hidden_layers
    tensors = load_tensors(demo.t3)
    names = ("text_emb", "speech_emb", "speech_head", "text_pos_emb.emb", "speech_pos_emb.emb")
    embeddings = sum(tensors[f"{name}.weight"].nbytes for name in names)
    assert footprint.embeddings == pytest.approx(embeddings, rel=0.01)  # vLLM pads the head to 8256 rows
    assert footprint.weights == footprint.linear + footprint.embeddings + footprint.rest
    assert (footprint.allocated, footprint.peak) == (0, 0)
    converted(demo.t3, "int8", config, tmp_path)
    assert counted.calls == 1


class Counted:
    """A function that counts its calls."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        return self.function(*arguments)


def test_a_changed_file_is_converted_anew(demo: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "t3_cfg.safetensors"
    source.write_bytes(demo.t3.read_bytes())
    config = infer_config(source)
    first = converted(source, "int8", config, tmp_path)
    assert converted(source, "int8", config, tmp_path) == first
    assert converted(source, "bnb-8bit", config, tmp_path) != first
    save_file({**load_file(source), "speech_head.weight": torch.zeros(8194, 128)}, source)
    second = converted(source, "int8", config, tmp_path)
    assert second != first
    assert not load_file(second)["speech_head.weight"].any()


def test_what_the_cache_holds_in_a_conversion_s_place_is_replaced(demo: Checkpoint, tmp_path: Path) -> None:
    config = infer_config(demo.t3)
    path = converted(demo.t3, "int8", config, tmp_path)
    whole = path.read_bytes()
    tensors = load(whole)  # not of the file, which is written over
    other = converted(demo.t3, "bnb-8bit", config, tmp_path)
    for wrong in (whole[: len(whole) // 2], whole[:4], b"", demo.t3.read_bytes(), other.read_bytes()):
        path.write_bytes(wrong)
        assert converted(demo.t3, "int8", config, tmp_path) == path
        assert Stored.of(path) == Stored("int8")
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in load(path.read_bytes()).items())


def test_a_conversion_is_on_the_disk_before_it_has_its_name(
    demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = tmp_path / "t3-quantized", []

    def fsync(descriptor: int) -> None:
        assert not list(folder.glob("*.safetensors"))
        synced.append(os.fstat(descriptor))

    monkeypatch.setattr(os, "fsync", fsync)
    path = converted(demo.t3, "int8", infer_config(demo.t3), tmp_path)
    assert [(state.st_ino, state.st_size) for state in synced] == [(path.stat().st_ino, path.stat().st_size)]


def test_a_file_of_an_older_layout_is_to_be_quantised_again(demo: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "t3_cfg.safetensors"
    save_file(load_file(demo.t3), path, metadata=Stored("bnb-8bit").metadata())
    with pytest.raises(CheckpointError, match=r"is bnb-8bit, but has no tensor .*weight_packed.*quantise it again"):
        infer_config(path)


def test_a_failed_conversion_leaves_nothing(demo: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(conversion, "save_file", broken)
    with pytest.raises(ConfigurationError, match="No space left"):
        converted(demo.t3, "int8", infer_config(demo.t3), tmp_path)
    assert list((tmp_path / "t3-quantized").iterdir()) == []


def test_what_a_killed_conversion_left_is_removed_once_it_is_old(demo: Checkpoint, tmp_path: Path) -> None:
    config, folder = infer_config(demo.t3), tmp_path / "t3-quantized"
    path = converted(demo.t3, "int8", config, tmp_path)
    hours_ago = time.time() - 2 * 3600
    for name in ("left", "written", "begun"):
        scratch = folder / f".quantize-{name}"
        scratch.mkdir()
        (scratch / path.name).write_bytes(b"half")
    for old in (".quantize-left", f".quantize-left/{path.name}", ".quantize-written", f".quantize-begun/{path.name}"):
        os.utime(folder / old, (hours_ago, hours_ago))
    assert converted(demo.t3, "int8", config, tmp_path) == path
    assert {each.name for each in folder.iterdir()} == {path.name, ".quantize-written", ".quantize-begun"}


def test_the_checkpoint_knows_its_method(demo: Checkpoint, awq: Checkpoint) -> None:
    assert effective_method(Stored.of(awq.t3), "none") == "awq"
    assert effective_method(Stored.of(awq.t3), "awq") == "awq"
    assert effective_method(Stored.of(demo.t3), "none") == "none"
    with pytest.raises(ConfigurationError, match="int8, but this checkpoint's T3 is awq already"):
        effective_method(Stored.of(awq.t3), "int8")
    with pytest.raises(ConfigurationError, match="chatterbox-vllm quantize MODEL OUT --method awq"):
        effective_method(Stored.of(demo.t3), "awq")


@pytest.mark.parametrize(
    ("method", "capability", "arguments"),
    [
        ("none", 90, {}),
        ("bnb-4bit", 75, {"quantization": "bitsandbytes"}),
        ("bnb-8bit", 90, {}),
        ("int8", 90, {}),
        ("int8", 100, {"linear_backend": "triton"}),
        ("fp8", 89, {"quantization": "fp8_per_channel"}),
        ("fp8", 86, {"quantization": "fp8_per_tensor"}),
        ("mxfp8", 90, {"quantization": "mxfp8"}),
    ],
)
def test_what_a_method_asks_of_vllm(
    gpu: list[int], monkeypatch: pytest.MonkeyPatch, method: str, capability: int, arguments: dict[str, Any]
) -> None:
    gpu[0] = capability
    monkeypatch.setattr(methods, "find_spec", lambda name: name)
    assert method_arguments(method, T3Config(), {}) == arguments


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("bnb4bit", r"choose none, bnb-4bit, .*, or one of vLLM's own: .*compressed-tensors"),
        ("Mixed", "it is a strategy: give it as quantization_strategy"),
    ],
)
def test_a_method_that_nobody_knows_is_refused_before_anything_loads(method: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=f"quantization={method} is no method; {remedy}") as told:
        method_arguments(method, T3Config(), {})
    assert told.value.param == "quantization"


@pytest.mark.parametrize("method", ["bnb-4bit", "bnb-8bit", "fp8"])
def test_methods_that_need_a_gpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods.current_platform, "is_cpu", lambda: True)
    with pytest.raises(ConfigurationError, match=f"quantization={method} needs an NVIDIA GPU"):
        method_arguments(method, T3Config(), {})


def test_a_checkpoint_that_needs_a_gpu_says_so(demo: Checkpoint, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody asked for the method, so it cannot be left out."""
    monkeypatch.setattr(methods.current_platform, "is_cpu", lambda: True)
    config = infer_config(converted(demo.t3, "bnb-8bit", infer_config(demo.t3), cache))
    with pytest.raises(ConfigurationError, match=r"this checkpoint's T3 is bnb-8bit.*it was made from.*int8") as caught:
        method_arguments("bnb-8bit", config, {})
    assert caught.value.param == "model"


@pytest.mark.parametrize("absent", ["vllm_bnb_plugin", "bitsandbytes"])
@pytest.mark.usefixtures("gpu")
def test_bitsandbytes_needs_packages(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: None if name == absent else name)
    with pytest.raises(MissingDependency, match="pip install 'vllm-bnb-plugin"):
        method_arguments("bnb-4bit", T3Config(), {})


@pytest.mark.usefixtures("gpu")
def test_contradictions_are_named(awq: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "find_spec", lambda name: name)
    config = infer_config(awq.t3)
    with pytest.raises(ConfigurationError, match="tensor_parallel_size=2 cuts through this checkpoint's groups of 128"):
        method_arguments("awq", config, {"tensor_parallel_size": 2})
    for method in ("bnb-4bit", "bnb-8bit", "int8", "awq", "fp8"):
        with pytest.raises(ConfigurationError, match="needs dtype=bfloat16 or float16"):
            method_arguments(method, config, {"dtype": "float32"})
    for method in ("int8", "bnb-8bit"):
        assert method_arguments(method, config, {"tensor_parallel_size": 2}) == {}
    assert method_arguments("bnb-4bit", config, {"tensor_parallel_size": 2}) == {"quantization": "bitsandbytes"}
    with pytest.raises(ConfigurationError, match="is launch's method"):
        engine_arguments(config, {"quantization": "bitsandbytes"})


@pytest.mark.usefixtures("gpu")
def test_a_cache_in_bytes_is_not_compared_with_a_share_of_the_card(demo: Checkpoint) -> None:
    config = infer_config(demo.t3)
    given = {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.5}
    arguments = engine_arguments(config, given)
    assert arguments["gpu_memory_utilization"] < 0.01
    assert arguments["kv_cache_memory_bytes"] == 1 << 28
    assert engine_arguments(config, {"gpu_memory_utilization": 0.5})["gpu_memory_utilization"] == 0.5


@pytest.mark.usefixtures("gpu")
def test_attention_has_keys_in_one_piece_unless_asked_otherwise(demo: Checkpoint, tmp_path: Path) -> None:
    config = infer_config(demo.t3)
    folder = str(model_folder(demo.t3, config, tmp_path))
    made = AsyncEngineArgs(model=folder, **engine_arguments(config, {}))
    assert made.attention_config.flash_attn_max_num_splits_for_cuda_graph == 1
    asked = {"attention_config": {"flash_attn_max_num_splits_for_cuda_graph": 8}}
    made = AsyncEngineArgs(model=folder, **engine_arguments(config, asked))
    assert made.attention_config.flash_attn_max_num_splits_for_cuda_graph == 8


def test_graphs_of_whole_steps_where_flash_attention_3_is(
    demo: Checkpoint, gpu: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = infer_config(demo.t3)
    gpu[0] = 89
    assert "compilation_config" not in engine_arguments(config, {})
    gpu[0] = 90
    folder = str(model_folder(demo.t3, config, tmp_path))
    made = AsyncEngineArgs(model=folder, **engine_arguments(config, {"max_num_seqs": 100}))
    assert made.compilation_config.cudagraph_mode == CUDAGraphMode.FULL
    sizes = made.cudagraph_capture_sizes or []
    assert {1, 104, 256, 512, 1024, 2048} <= set(sizes), "64 prompts at once are read in steps of so many positions"
    assert max(sizes) == 2048

    def largest(**given: int) -> int:
        return max(engine_arguments(config, given)["cudagraph_capture_sizes"])

    assert (largest(max_num_seqs=1), largest(max_num_seqs=4), largest(max_num_seqs=300)) == (256, 512, 2048)
    assert largest(max_num_seqs=300, max_num_batched_tokens=1000) == 768, "no step is larger"
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        assert engine_arguments(config, {name: "many"})[name] == "many", "vLLM complains of it"
    for given in ({"compilation_config": {}}, {"max_cudagraph_capture_size": 8}, {"enforce_eager": True}):
        arguments = engine_arguments(config, given)
        assert arguments | given == arguments
        assert "cudagraph_capture_sizes" not in arguments
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "compilation_config" not in engine_arguments(config, {}), "vLLM's older runner has its own graphs"
