"""What docs/ says is so: its tables are the code's, its links lead somewhere, its examples run.

When a table fails: python -m tests.docs_support
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

import config
from chatterbox_vllm import cli
from chatterbox_vllm.api import faults
from chatterbox_vllm.api.app import create_app
from chatterbox_vllm.audio.encode import FORMATS
from chatterbox_vllm.quantization.spellings import SPELLINGS
from chatterbox_vllm.settings import FOREIGN, Settings, default_text, variables
from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES
from chatterbox_vllm.types import OPTION_RANGES, SpeechOptions, SpeechRequest, VoiceFeatures
from tests.docs_support import DOCS, ROOT, TABLES, first_cells, refreshed
from tests.fake_engine import FakeChatterbox, Running, running, wav

DOC = {path.name: path.read_text(encoding="utf-8") for path in DOCS}
ABSENT = {"api_server.py"}
"""Files that are named in order to say that there is no such file."""
SERVER = "http://127.0.0.1:8000"


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOC[name], flags=re.DOTALL)


def prose(name: str) -> str:
    """The text in one line."""
    return " ".join(DOC[name].split())


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", DOC[path.name]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", DOC)
def test_files_and_variables_that_are_named_exist(name: str) -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:py|md|sh|toml))`", DOC[name])) - ABSENT
    places = (ROOT, ROOT / "chatterbox_vllm", ROOT / "docs")
    assert [file for file in named if not any((place / file).exists() for place in places)] == []
    known = {key for setting in Settings.model_fields for key in variables(setting)} | FOREIGN
    assert set(re.findall(r"CHATTERBOX_[A-Z0-9_]*[A-Z0-9]", DOC[name])) <= known
    assert re.findall(r"(?<![\w~.])/(?:work|root|home|tmp)/", DOC[name]) == []


def test_every_document_is_in_the_readme_s_list() -> None:
    assert [path.name for path in DOCS[1:] if f"(docs/{path.name})" not in DOC["README.md"]] == []


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_the_code_s(name: str) -> None:
    path = ROOT / "docs" / name
    assert refreshed(path) == path.read_text(encoding="utf-8"), "run: python -m tests.docs_support"
    assert set(TABLES[name][0]) - set(first_cells(DOC[name])) == set()


def test_every_setting_is_documented_once_and_no_other() -> None:
    tables = re.findall(r"^\| setting .*?(?:\n\n|\Z)", DOC["configuration.md"], flags=re.MULTILINE | re.DOTALL)
    assert sorted(name for table in tables for name in first_cells(table)) == sorted(Settings.model_fields)
    assert set(re.findall(r"CHATTERBOX_\w+", DOC["configuration.md"])) >= FOREIGN


def test_every_field_of_a_request_is_documented_once_and_no_other() -> None:
    (table,) = re.findall(r"^\| field .*?\n\n", DOC["http-api.md"], flags=re.MULTILINE | re.DOTALL)
    assert first_cells(table) == list(TABLES["http-api.md"][0])


def test_limits_have_their_defaults() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| .* \|$", DOC["http-api.md"], flags=re.MULTILINE)
    limits = {name: default for name, default in rows if name in Settings.model_fields}
    assert len(limits) == 5
    assert limits == {name: default_text(Settings.model_fields[name]) for name in limits}


def test_config_py_is_as_shown() -> None:
    (code,) = blocks("configuration.md", "python")
    shown: dict[str, Any] = {}
    exec(code, shown)
    own = {name: getattr(config, name) for name in shown if name.isupper()}
    assert own | {"OTHER": {}} == {name: value for name, value in shown.items() if name.isupper()} | {"OTHER": {}}
    assert set(shown["OTHER"]) <= set(Settings.model_fields)


def test_chunk_sizes() -> None:
    from chatterbox_vllm.vocoder.schedule import ChunkSchedule

    settings = Settings()
    first, alone = settings.first_chunk_tokens, settings.lone_chunk_tokens
    schedule = ChunkSchedule(first, alone, settings.chunk_growth, settings.largest_chunk_tokens)
    for lonely in (False, True):
        sizes = schedule.sizes(alone=lonely)
        assert f"{', '.join(map(str, islice(sizes, 5)))}, ... tokens" in prose("configuration.md")


def test_routes_are_the_app_s() -> None:
    app = create_app(Settings(), FakeChatterbox())  # type: ignore[arg-type]
    table = DOC["http-api.md"].partition("## Routes")[2].partition("## ")[0]
    shown = set(re.findall(r"`(?:GET |POST )?(/[\w/{}.]+)`", table))
    assert shown == set(paths(app.routes))


def paths(routes: list[Any]) -> Iterator[str]:
    for route in routes:
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from paths(included.routes)
        else:
            yield route.path


def test_errors_are_those_of_faults() -> None:
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| `(\w+)` \|", DOC["http-api.md"], flags=re.MULTILINE)
    shown = {(int(status), kind, code) for status, kind, code in rows}
    ours = {tuple(fault) for _, fault in faults._FAULTS} | {tuple(faults._OURS)}
    assert shown == ours | {(status, *told) for status, told in faults._PLAIN.items()}


def test_formats_languages_and_voices_are_complete() -> None:
    from chatterbox_vllm.voices.library import OPENAI_VOICES

    for name, media_type in FORMATS.items():
        assert f"| `{name}` | `{media_type}` |" in DOC["http-api.md"]
    assert ", ".join(SUPPORTED_LANGUAGES) in prose("http-api.md")
    assert ", ".join(OPENAI_VOICES) in prose("http-api.md")
    first, last = sorted(SUPPORTED_LANGUAGES.values())[:-1], max(SUPPORTED_LANGUAGES.values())
    assert f"{', '.join(first)} and {last}" in prose("README.md")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(FakeChatterbox()) as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with recordings."""
    monkeypatch.chdir(tmp_path)
    for name in ("me", "anna"):
        (tmp_path / f"{name}.wav").write_bytes(wav(1.0))
    return tmp_path


def commands(name: str) -> list[list[str]]:
    lines = "\n".join(blocks(name, "(?:ba)?sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line.partition(" | ")[0], comments=True) for line in lines if line.strip()]


ALL_COMMANDS = [command for name in DOC for command in commands(name)]


@pytest.mark.parametrize("command", [command for command in ALL_COMMANDS if command[0] == "curl"], ids=" ".join)
def test_curl(server: Running, command: list[str]) -> None:
    options = dict(pairwise(command))
    (url,) = [word for word in command if word.startswith(SERVER)]
    headers = dict([options["-H"].split(": ", 1)]) if "-H" in options else {}
    method = "POST" if "-d" in options else "GET"
    answer = httpx.request(method, url.replace(SERVER, server.url), headers=headers, content=options.get("-d"))
    assert answer.status_code == 200
    if "-d" in options:
        asked = json.loads(options["-d"])
        assert answer.headers["content-type"] == FORMATS[asked["response_format"]]
        assert ("content-length" in answer.headers) is not asked.get("stream", False)


PROGRAMS = {"./start-api-server.sh": ["serve"], "chatterbox-vllm": []}
"""What stands in front of arguments of our command line."""


def our_commands() -> Iterator[list[str]]:
    for command in ALL_COMMANDS:
        program, *arguments = (word for word in command if not re.match(r"[A-Z_]+=", word))
        if program in PROGRAMS:
            yield [*PROGRAMS[program], *arguments]


@pytest.mark.parametrize("argv", our_commands(), ids=" ".join)
def test_commands_are_parsed(argv: list[str]) -> None:
    if argv[0] == "bench":
        import_module(f"chatterbox_vllm.bench.{argv[1]}").parser().parse_args(argv[2:])
    elif argv[0] in cli.COMMANDS:
        if argv[0] != "doctor":  # which makes its parser and reads its machine in one
            import_module(f"chatterbox_vllm.{cli.COMMANDS[argv[0]][0]}").parser().parse_args(argv[1:])
    else:
        cli._parser().parse_args(argv)


CLIENTS = [(name, code) for name in DOC for code in blocks(name, "python") if SERVER in code]


@pytest.mark.parametrize(("name", "code"), CLIENTS, ids=lambda text: text.strip().splitlines()[0])
@pytest.mark.usefixtures("folder")
def test_clients(server: Running, name: str, code: str) -> None:
    before = len(server.engine.requests)
    exec(compile(code.replace(SERVER, server.url), name, "exec"), {})
    assert len(server.engine.requests) == before + 1
    (made,) = [path for path in Path().iterdir() if path.suffix != ".wav"]
    assert made.stat().st_size > 1000


def test_the_error_and_the_health_shown_are_real(server: Running) -> None:
    error, health = (json.loads(code) for code in blocks("http-api.md", "json"))
    asked = {"input": "Hello.", "temperature": OPTION_RANGES["temperature"][1] + 1}
    assert httpx.post(f"{server.url}/v1/audio/speech", json=asked).json() == error
    real = httpx.get(f"{server.url}/health").json()
    assert list(real) == list(health)
    assert {key: real[key] for key in ("status", "live", "ready", "reason")} == {
        key: health[key] for key in ("status", "live", "ready", "reason")
    }


class Speaker(FakeChatterbox):
    """Answers all that ``ChatterboxTTS`` asks of an engine."""

    def __init__(self) -> None:
        super().__init__()
        self.languages = dict(SUPPORTED_LANGUAGES)
        self.voices: Any = self

    def get(self, voice_id: str | None = None) -> VoiceFeatures:
        from chatterbox_vllm.bench.workload import random_voice

        return random_voice(0)

    def from_audio(self, source: Any, *, param: str = "audio_prompt_path") -> VoiceFeatures:
        assert Path(source).exists()
        return self.get()

    async def enrolled(self, source: Any) -> VoiceFeatures:
        return self.from_audio(source)

    async def speech_tokens(self, request: SpeechRequest) -> list[int]:
        self.requests.append(request)
        return [1, 2, 3]

    async def synthesize(self, tokens: torch.Tensor, *_: Any, **__: Any) -> np.ndarray:
        return np.zeros(960 * len(tokens), np.float32)


@pytest.mark.usefixtures("folder")
def test_the_python_api(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All blocks in their order, with a real ``ChatterboxTTS`` over an engine that makes noise."""
    from chatterbox_vllm.engine import AsyncChatterbox

    signature, engines = inspect.signature(AsyncChatterbox.start), list[Speaker]()

    async def start(*arguments: Any, **engine: Any) -> Speaker:
        bound = signature.bind(*arguments, **engine)
        assert bound.arguments.get("engine_args", {}).keys() <= set(SPELLINGS)
        engines.append(Speaker())
        return engines[-1]

    monkeypatch.setattr(AsyncChatterbox, "start", start)
    scope: dict[str, Any] = {}
    for number, code in enumerate(blocks("python-api.md", "python"), start=1):
        exec(compile(code, f"python-api.md, block {number}", "exec"), scope)
    scope["tts"].shutdown()
    assert all(engine.dead and not engine.active for engine in engines)
    assert len(engines) == 5
    assert {scope[name].shape for name in ("wav", "hello", "bonjour")} == {(1, 19_200)}
    languages = [request.language for request in engines[2].requests]
    assert languages == ["fr", "de", "es"]
    printed = capsys.readouterr().out.splitlines()
    assert printed.count("0.2 seconds") == 8
    assert printed[-1].startswith("temperature ")


def test_arguments_of_the_python_api() -> None:

    from chatterbox_vllm.engine import AsyncChatterbox

    loading, _, speaking = DOC["python-api.md"].partition("## Speaking")
    own = set(inspect.signature(AsyncChatterbox.start).parameters) - {"model", "device", "engine_args"}
    assert set(first_cells(loading)) == own
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", speaking, flags=re.MULTILINE))
    for name, (low, high) in OPTION_RANGES.items():
        default, _, values = rows.pop(name).partition(" | ")
        assert default == str(getattr(SpeechOptions(), name))
        assert name in {"seed", "top_p"} or values.startswith(f"{low:g} to {high:g}")
    assert set(rows) == {"audio_prompt_path", "language_id", "progress"}


def test_numbers_of_the_architecture() -> None:
    from chatterbox_vllm.t3.positions import OVERHEAD, POSITIONS, VOICE_LENGTH, WEIGHT_STEPS
    from chatterbox_vllm.t3.prompt import STREAM_INTERVAL
    from chatterbox_vllm.vocoder.encoder import FRAMES_PER_TOKEN, LOOKAHEAD_TOKENS
    from chatterbox_vllm.vocoder.hift import REACH
    from chatterbox_vllm.vocoder.stage import MAX_FRAMES

    text = prose("architecture.md")
    held = LOOKAHEAD_TOKENS + REACH // FRAMES_PER_TOKEN
    assert f"{POSITIONS:,} x the guidance weight in steps of 1/{WEIGHT_STEPS:,}" in text
    assert f"T3 knows a voice by {VOICE_LENGTH} vectors" in text
    assert f"with its prompt: {OVERHEAD} positions" in text
    assert f"up to {MAX_FRAMES:,} mel frames" in text
    assert f"{LOOKAHEAD_TOKENS} tokens of the encoder's look-ahead, and {REACH} frames" in text
    assert f"that is {held} tokens" in text
    assert f"holds {held} tokens back" in prose("configuration.md")
    assert STREAM_INTERVAL == 5
    assert "five at a time" in text
