"""What README.md shows runs as it stands there."""

from __future__ import annotations

import json
import re
import shlex
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile

if TYPE_CHECKING:
    from chatterbox_vllm.tts import ChatterboxTTS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_scripts_it_names_are_there() -> None:
    named = {command[0] for command in commands() if command[0].startswith("./")}
    assert named == {"./start-api-server.sh", "./run-tests.sh"}
    assert all((ROOT / name).is_file() for name in named)


def test_its_request_is_one_that_the_server_takes() -> None:
    from chatterbox_vllm.api.schemas import SpeechBody

    curls = [command for command in commands() if command[0] == "curl"]
    assert curls
    for command in curls:
        body = SpeechBody.model_validate(json.loads(command[command.index("-d") + 1]))
        assert body.format == Path(command[command.index("-o") + 1]).suffix.lstrip(".")


def test_its_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from chatterbox_vllm.cli import main

    with pytest.raises(SystemExit):
        main(["--help"])
    known = capsys.readouterr().out
    shown = set(re.findall(r"chatterbox-vllm ([a-z-]+)", README))
    assert {"serve", "say", "doctor"} <= shown
    assert all(command in known for command in shown)


def test_its_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert "docs/install.md" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


# The clients of a server are tested in test_docs.py.
OWN = [code for code in blocks("python") if "chatterbox_vllm" in code]


@pytest.mark.parametrize("code", OWN, ids=lambda code: code.strip().splitlines()[0])
def test_its_python(code: str, model: ChatterboxTTS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo checkpoint stands for the hub's, and says less: noise has no end of its own."""
    short = SimpleNamespace(generate=partial(model.generate, max_tokens=25))
    monkeypatch.setattr(type(model), "from_pretrained", lambda *_, **__: nullcontext(short))
    monkeypatch.chdir(tmp_path)
    sound = np.random.default_rng(0).normal(size=48_000).astype(np.float32) * 0.1
    soundfile.write("me.wav", sound, 16_000)
    scope: dict[str, object] = {}
    exec(code, scope)
    for tensor in (scope["hello"], scope["bye"]):
        assert tensor.shape[0] == 1
        assert tensor.shape[1] > 0
