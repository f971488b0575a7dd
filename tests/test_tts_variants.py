"""Which checkpoint the builders of the Python API ask for."""

from __future__ import annotations

from typing import Any

import pytest

from chatterbox_vllm import checkpoint
from chatterbox_vllm.errors import CheckpointError
from chatterbox_vllm.tts import ChatterboxMultilingualTTS, ChatterboxTTS


@pytest.fixture(autouse=True)
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The variants that are looked for, in place of the engine's start."""
    found: list[str] = []

    def init(self: ChatterboxTTS, model: Any, *, device: str | None, variant: Any = None) -> None:
        checkpoint.resolve(model, variant)

    monkeypatch.setattr(ChatterboxTTS, "__init__", init)
    monkeypatch.setattr(checkpoint, "download", lambda variant, **_: found.append(variant))
    monkeypatch.setattr(checkpoint, "_demo", lambda variant: found.append(f"demo-{variant}"))
    return found


def test_names_and_variants_go_together(resolved: list[str]) -> None:
    for name in ("multilingual-v3", "demo-multilingual-v3", "demo", "demo-multilingual", "some/where"):
        ChatterboxMultilingualTTS.from_local(name)
    ChatterboxMultilingualTTS.from_pretrained(variant="multilingual-v3")
    ChatterboxTTS.from_pretrained(variant="multilingual-v3")
    ChatterboxTTS.from_pretrained_multilingual(variant="multilingual-v3")
    ChatterboxTTS.from_pretrained(variant="english")
    ChatterboxTTS.from_local("multilingual-v3", variant="multilingual-v3")
    demos = ["demo-multilingual-v3", "demo-multilingual", "demo-multilingual"]
    assert resolved == ["multilingual-v3", *demos, "multilingual", *["multilingual-v3"] * 3, "english", resolved[0]]


def test_what_contradicts_itself_is_refused() -> None:
    for build in (
        lambda: ChatterboxMultilingualTTS.from_pretrained(variant="english"),
        lambda: ChatterboxTTS.from_pretrained_multilingual(variant="english"),
        lambda: ChatterboxMultilingualTTS.from_local("multilingual", variant="multilingual-v3"),
        lambda: ChatterboxTTS.from_pretrained(variant="klingon"),
    ):
        with pytest.raises(CheckpointError):
            build()
