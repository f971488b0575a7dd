"""Voice files: what is saved is loaded, and what no voice has is refused."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from chatterbox_vllm.errors import CheckpointError, InvalidAudio
from chatterbox_vllm.types import VoiceFeatures
from chatterbox_vllm.voices.features import load_conds, load_features, save_features

METADATA = {"format": "chatterbox-voice", "version": "1"}


def some_voice(prompt: int = 25) -> VoiceFeatures:
    generator = torch.Generator().manual_seed(prompt)
    return VoiceFeatures(
        speaker_embedding=torch.nn.functional.normalize(torch.randn(256, generator=generator), dim=0),
        t3_prompt_tokens=torch.randint(6561, (150,), generator=generator),
        prompt_tokens=torch.randint(6561, (prompt,), generator=generator),
        prompt_mel=torch.randn(2 * prompt, 80, generator=generator),
        x_vector=torch.randn(192, generator=generator),
    )


def tensors(voice: VoiceFeatures) -> dict[str, torch.Tensor]:
    return {field.name: getattr(voice, field.name) for field in fields(voice)}


@pytest.mark.parametrize("prompt", [1, 25, 250])
def test_round_trip(prompt: int, tmp_path: Path) -> None:
    voice = some_voice(prompt)
    save_features(voice, tmp_path / "voice.safetensors")
    loaded = load_features(tmp_path / "voice.safetensors")
    assert loaded.digest == voice.digest
    assert [file.name for file in tmp_path.iterdir()] == ["voice.safetensors"]


@pytest.mark.parametrize(("private", "mode"), [(False, 0o640), (True, 0o600)])
def test_who_may_read_it(private: bool, mode: int, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_features(some_voice(), tmp_path / "voice.safetensors", private=private)
    finally:
        os.umask(before)
    assert (tmp_path / "voice.safetensors").stat().st_mode & 0o777 == mode


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    save_features(some_voice(3), tmp_path / "voice.safetensors")
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_features(some_voice(4), tmp_path / "voice.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["voice.safetensors"]
    assert load_features(tmp_path / "voice.safetensors").digest == some_voice(3).digest


WRONG: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
    "a tensor too few": ({"x_vector": None}, "instead of"),
    "a tensor too many": ({"extra": torch.zeros(1)}, "extra"),
    "half precision": ({"x_vector": torch.zeros(192).half()}, "x_vector"),
    "not finite": ({"x_vector": torch.full((192,), float("nan"))}, "not finite"),
    "a short speaker": ({"speaker_embedding": torch.ones(255)}, "speaker_embedding"),
    "a batch": ({"prompt_mel": torch.zeros(1, 50, 80)}, "prompt_mel"),
    "an odd mel": ({"prompt_mel": torch.zeros(51, 80)}, "prompt_mel"),
    "no tokens": ({"prompt_tokens": torch.zeros(0).long(), "prompt_mel": torch.zeros(0, 80)}, "prompt_tokens"),
    "too many tokens": ({"prompt_tokens": torch.zeros(251).long(), "prompt_mel": torch.zeros(502, 80)}, "1 to 250"),
    "int32 tokens": ({"t3_prompt_tokens": torch.zeros(9, dtype=torch.int32)}, "t3_prompt_tokens"),
    "an id too high": ({"t3_prompt_tokens": torch.tensor([6561])}, "ids outside 0..6560"),
    "an id too low": ({"t3_prompt_tokens": torch.tensor([-1])}, "ids outside 0..6560"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_tensors_are_refused(name: str, tmp_path: Path) -> None:
    changes, reason = WRONG[name]
    changed = {key: value for key, value in (tensors(some_voice()) | changes).items() if value is not None}
    save_file(changed, tmp_path / "voice.safetensors", metadata=METADATA)
    with pytest.raises(InvalidAudio, match=re.escape(reason)) as caught:
        load_features(tmp_path / "voice.safetensors")
    assert caught.value.param == "voice"


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "chatterbox-voice", "version": "99"}])
def test_other_safetensors_are_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file(tensors(some_voice()), tmp_path / "voice.safetensors", metadata=metadata)
    with pytest.raises(InvalidAudio, match=r"voice\.safetensors"):
        load_features(tmp_path / "voice.safetensors")


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "voice.safetensors"
    for content in (b"", b"no safetensors", b"\xff" * 64, bytes(2**20 + 1)):
        file.write_bytes(content)
        with pytest.raises(InvalidAudio, match="not a usable voice file"):
            load_features(file)
    with pytest.raises(InvalidAudio, match="not a usable voice file") as caught:
        load_features(tmp_path / "absent.safetensors", param="audio_prompt_path")
    assert caught.value.param == "audio_prompt_path"


def conds(voice: VoiceFeatures, **gen: Any) -> dict[str, dict[str, Any]]:
    """Upstream's layout of ``voice``."""
    return {
        "t3": {
            "speaker_emb": voice.speaker_embedding[None],
            "clap_emb": None,
            "cond_prompt_speech_tokens": voice.t3_prompt_tokens[None],
            "cond_prompt_speech_emb": None,
            "emotion_adv": torch.full((1, 1, 1), 0.5),
        },
        "gen": {
            "prompt_token": voice.prompt_tokens[None],
            "prompt_token_len": torch.tensor([len(voice.prompt_tokens)]),
            "prompt_feat": voice.prompt_mel[None],
            "prompt_feat_len": None,
            "embedding": voice.x_vector[None],
            **gen,
        },
    }


def test_conds(tmp_path: Path) -> None:
    torch.save(conds(some_voice(250)), tmp_path / "conds.pt")
    assert load_conds(tmp_path / "conds.pt").digest == some_voice(250).digest


@pytest.mark.parametrize("frames", [51, 50, 49])
def test_conds_whose_mel_and_tokens_differ(frames: int, tmp_path: Path) -> None:
    """As upstream's embed_ref leaves them: whole tokens, and one mel frame more."""
    mel = torch.arange(frames * 80.0).reshape(1, frames, 80)
    torch.save(conds(some_voice(25), prompt_feat=mel), tmp_path / "conds.pt")
    voice = load_conds(tmp_path / "conds.pt")
    assert len(voice.prompt_tokens) == frames // 2
    assert torch.equal(voice.prompt_mel, mel[0, : 2 * (frames // 2)])


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"t3": {}, "gen": {}},
        {"t3": conds(some_voice())["t3"]},
        conds(some_voice(), prompt_feat=torch.zeros(50, 80)),
        conds(some_voice(), embedding=torch.zeros(1, 191)),
        conds(some_voice(), prompt_token=torch.full((1, 25), 6562)),
    ],
)
def test_other_conds_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "conds.pt")
    with pytest.raises(CheckpointError, match=r"conds\.pt"):
        load_conds(tmp_path / "conds.pt")


def test_conds_run_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    torch.save({"t3": Trap(), "gen": {}}, tmp_path / "conds.pt")
    with pytest.raises(CheckpointError, match=r"conds\.pt"):
        load_conds(tmp_path / "conds.pt")
    assert not (tmp_path / "sprung").exists()
