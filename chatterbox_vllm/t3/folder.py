"""What vLLM loads T3 from: a folder with a config.json and the checkpoint's T3 file under a name vLLM looks for.

Upstream's folder has no config.json and holds other networks' weights beside T3's, so vLLM gets a folder of its own in
our cache, with a link to the file. The file is checked here, from its header, before an engine is started.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from chatterbox_vllm.checkpoint import unusable_cache
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import Method
from chatterbox_vllm.t3 import ARCHITECTURE
from chatterbox_vllm.t3.config import HEAD_DIM, T3Config
from chatterbox_vllm.t3.conversion import linear_layers, vllm_quantization
from chatterbox_vllm.t3.positions import VOICE_LENGTH
from chatterbox_vllm.types import SPEECH_VOCABULARY

Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path) -> Shapes:
    """Names and shapes of a safetensors file, without reading its tensors."""
    try:
        with safe_open(path, "pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); download it again") from error


def infer_config(path: Path, *, mask_invalid_tokens: bool = True) -> T3Config:
    """The sizes of a T3 checkpoint, strictly checked, and for a quantised one what vLLM has to know of that.

    Raises:
        CheckpointError: a key is missing, unexpected or misshapen; names them.
    """
    found = read_shapes(path)
    stored = Stored.of(path)
    layers = {int(m[1]) for key in found if (m := re.match(r"tfmr\.layers\.(\d+)\.", key))}
    try:
        config = T3Config(
            hidden_size=found["speech_emb.weight"][1],
            intermediate_size=found[f"tfmr.layers.0.mlp.up_proj.{stored.codes}"][0],
            num_hidden_layers=max(layers, default=-1) + 1,
            text_vocabulary=found["text_emb.weight"][0],
            text_positions=found["text_pos_emb.emb.weight"][0],
            speech_positions=found["speech_pos_emb.emb.weight"][0],
            mask_invalid_tokens=mask_invalid_tokens,
            architectures=[ARCHITECTURE],
            dtype="float32",
            **({} if stored.method == Method.NONE else {"quantization_config": vllm_quantization(stored)}),
        )
    except KeyError as error:
        if stored.method != Method.NONE:
            raise CheckpointError(f"{path} is {stored.method}, but has no tensor {error}; quantise it again") from error
        raise CheckpointError(f"{path} has no tensor {error}: it is not a T3 checkpoint") from error
    _check(path, found, expected_shapes(config, stored))
    return config


def expected_shapes(config: T3Config, stored: Stored) -> Shapes:
    """Every tensor of upstream's ``T3().state_dict()``, its linear layers ``stored`` in their way."""
    h, text = config.hidden_size, config.text_vocabulary
    shapes: Shapes = {
        "tfmr.embed_tokens.weight": (8, h),
        "tfmr.norm.weight": (h,),
        "text_emb.weight": (text, h),
        "text_head.weight": (text, h),
        "speech_emb.weight": (SPEECH_VOCABULARY, h),
        "speech_head.weight": (SPEECH_VOCABULARY, h),
        "text_pos_emb.emb.weight": (config.text_positions, h),
        "speech_pos_emb.emb.weight": (config.speech_positions, h),
        "cond_enc.spkr_enc.weight": (h, 256),
        "cond_enc.spkr_enc.bias": (h,),
        "cond_enc.emotion_adv_fc.weight": (h, 1),
        "cond_enc.perceiver.pre_attention_query": (1, VOICE_LENGTH - 2, h),
    }
    for name in ("norm", "to_q", "to_k", "to_v", "proj_out"):
        shapes[f"cond_enc.perceiver.attn.{name}.weight"] = (h,) if name == "norm" else (h, h)
        shapes[f"cond_enc.perceiver.attn.{name}.bias"] = (h,)
    for layer in range(config.num_hidden_layers):
        prefix = f"tfmr.layers.{layer}"
        shapes |= {f"{prefix}.{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
    for stem, size in linear_layers(config).items():
        shapes |= stored.shapes(stem, *size)
    return shapes


def _check(path: Path, found: Mapping[str, tuple[int, ...]], expected: Shapes) -> None:
    problems = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key} is {found[key]}, not {expected[key]}"
        for key in sorted(found.keys() & expected.keys())
        if found[key] != expected[key]
    ]
    if expected["speech_emb.weight"][1] % HEAD_DIM:
        problems.append(f"hidden size {expected['speech_emb.weight'][1]} is no multiple of {HEAD_DIM}")
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(f"{path} is not a T3 checkpoint: " + "; ".join(problems[:8]) + more)


def model_folder(weights: Path, config: T3Config, cache: Path) -> Path:
    """A folder vLLM can load: config.json and a link to ``weights``. The same inputs give the same folder.

    Args:
        weights: the checkpoint's T3 file.
        cache: where folders of this kind are kept; made when absent.

    Raises:
        ConfigurationError: ``cache`` cannot be written to.
    """
    text = json.dumps({**config.to_dict(), "model_type": config.model_type}, indent=1, sort_keys=True)
    key = hashlib.sha256(f"{weights.resolve()}\n{text}".encode()).hexdigest()[:16]
    folder = cache / "t3" / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / "config.json", lambda path: path.write_text(text))
        _replace(folder / "model.safetensors", lambda path: path.symlink_to(weights.resolve()))
    except OSError as error:
        raise unusable_cache(error) from error
    return folder


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Makes ``path`` atomically: engines that start side by side share the folder."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        fresh = Path(scratch) / path.name
        make(fresh)
        fresh.replace(path)
