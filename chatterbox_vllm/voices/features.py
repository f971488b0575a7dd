"""Voice features in files: ours, which are safetensors, and upstream's ``conds.pt``."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from chatterbox_vllm.checkpoint import load_pickle
from chatterbox_vllm.errors import CheckpointError, InvalidAudio
from chatterbox_vllm.types import SPOKEN_TOKENS, VoiceFeatures

FORMAT: Final = "chatterbox-voice"
VERSION: Final = "1"
SUFFIX: Final = ".safetensors"
MAX_FILE_BYTES: Final = 2**20
"""The largest voice has 170 KB."""
MAX_T3_PROMPT: Final = 150
MAX_PROMPT: Final = 250
_NAMES: Final = tuple(field.name for field in fields(VoiceFeatures))


class _Wrong(ValueError):
    """The rest of the sentence that begins with the file's name."""


def save_features(features: VoiceFeatures, path: str | Path, *, private: bool = False) -> None:
    """Writes ``features`` as safetensors; at no moment is there half a file under ``path``.

    Args:
        private: others may not read it, whatever the umask.
    """
    tensors = {name: getattr(features, name).contiguous() for name in _NAMES}
    content = save(tensors, metadata={"format": FORMAT, "version": VERSION})
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.part")
    mode = 0o600 if private else 0o666  # less the umask
    try:
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_features(path: str | Path, *, param: str = "voice") -> VoiceFeatures:
    """What ``save_features`` wrote.

    Raises:
        InvalidAudio: not a voice file, of another version, or with tensors that no voice has; ``param`` names
            the argument at fault.
    """
    path = Path(path)
    try:
        return _checked(_read(path))
    except OSError as error:  # whose text has the whole path, which is no client's business
        reason = error.strerror or "it cannot be read"
        raise InvalidAudio(f"{param}: {path.name!r} is not a usable voice file: {reason}", param=param) from error
    except (_Wrong, SafetensorError) as error:
        raise InvalidAudio(f"{param}: {path.name!r} is not a usable voice file: {error}", param=param) from error


def _read(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise _Wrong(f"it has more than {MAX_FILE_BYTES} bytes")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise _Wrong(f"its metadata do not say format={FORMAT}")
        if metadata.get("version") != VERSION:
            raise _Wrong(f"it is of version {metadata.get('version')!r}, this program reads {VERSION}")
        # clone: the file may be replaced while its tensors are in use
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dictionary


def load_conds(path: str | Path) -> VoiceFeatures:
    """The built-in voice of a checkpoint; mirrors upstream's ``Conditionals.load`` less the exaggeration.

    Raises:
        CheckpointError: the file is not a ``conds.pt`` or holds values no voice has.
    """
    content = load_pickle(path)
    try:
        return _checked(_unpacked(content))
    except _Wrong as error:
        raise CheckpointError(f"{path} is not a usable built-in voice: {error}") from error


def _unpacked(content: Mapping[str, Any]) -> dict[str, Tensor]:
    t3, gen = _part(content, "t3"), _part(content, "gen")
    tokens = _tensor(gen, "prompt_token").reshape(-1).long()
    if gen.get("prompt_token_len") is not None:
        tokens = tokens[: int(_tensor(gen, "prompt_token_len").reshape(-1)[0])]
    mel = _tensor(gen, "prompt_feat").float()
    if mel.dim() != 3 or len(mel) != 1:
        raise _Wrong(f"gen.prompt_feat has the shape {tuple(mel.shape)}, not (1, frames, 80)")
    prompt_tokens, prompt_mel = matched(tokens, mel[0])
    return {
        "speaker_embedding": _tensor(t3, "speaker_emb").reshape(-1).float(),
        "t3_prompt_tokens": _tensor(t3, "cond_prompt_speech_tokens").reshape(-1).long(),
        "prompt_tokens": prompt_tokens,
        "prompt_mel": prompt_mel,
        "x_vector": _tensor(gen, "embedding").reshape(-1).float(),
    }


def matched(tokens: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) tokens and (2P, 80) mel frames of the same time, from (n,) and (frames, 80).

    Upstream's ``embed_ref`` shortens the tokens only. A mel frame more than two a token, which a recording of
    30 ms over a multiple of 40 has, then costs the end of every utterance 480 samples.
    """
    count = min(len(tokens), len(mel) // 2)
    return tokens[:count].clone(), mel[: 2 * count].clone()


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = content.get(name)
    if not isinstance(part, Mapping):
        raise _Wrong(f"it lacks the dictionary {name!r}")
    return part


def _tensor(part: Mapping[str, Any], name: str) -> Tensor:
    value = part.get(name)
    if not isinstance(value, Tensor) or not value.numel():
        raise _Wrong(f"it lacks the tensor {name!r}")
    return value


def _checked(tensors: Mapping[str, Tensor]) -> VoiceFeatures:
    """The features made of ``tensors``, if every one has the shape, type and range of ``VoiceFeatures``."""
    if set(tensors) != set(_NAMES):
        raise _Wrong(f"it holds {', '.join(sorted(tensors)) or 'nothing'} instead of {', '.join(_NAMES)}")
    prompts = len(tensors["prompt_tokens"]) if tensors["prompt_tokens"].dim() == 1 else 0
    _check_vector(tensors, "speaker_embedding", (256,))
    _check_vector(tensors, "x_vector", (192,))
    _check_vector(tensors, "prompt_mel", (2 * prompts, 80))
    _check_tokens(tensors, "t3_prompt_tokens", MAX_T3_PROMPT)
    _check_tokens(tensors, "prompt_tokens", MAX_PROMPT)
    return VoiceFeatures(**tensors)


def _check_vector(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> None:
    tensor = tensors[name]
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        raise _Wrong(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not {shape} float32")
    if not tensor.isfinite().all():
        raise _Wrong(f"{name} holds values that are not finite")


def _check_tokens(tensors: Mapping[str, Tensor], name: str, most: int) -> None:
    tensor = tensors[name]
    if tensor.dtype != torch.int64 or tensor.dim() != 1 or not 1 <= len(tensor) <= most:
        raise _Wrong(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, not (1 to {most},) int64")
    if int(tensor.min()) < 0 or int(tensor.max()) >= SPOKEN_TOKENS:
        raise _Wrong(f"{name} holds ids outside 0..{SPOKEN_TOKENS - 1}")


def checked(features: VoiceFeatures) -> VoiceFeatures:
    """``features``, if they are as ``VoiceFeatures`` says.

    Raises:
        ValueError: they are not.
    """
    return _checked({name: getattr(features, name) for name in _NAMES})
