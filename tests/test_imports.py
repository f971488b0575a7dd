"""The direction of imports, and that what must start quickly does not drag torch in."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from chatterbox_vllm import _HOMES as HOMES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "chatterbox_vllm"
# A module imports its own level and those below it.
LEVELS = [
    {"types", "errors", "files", "garbage", "loop_thread", "memory", "mps", "quiet"},
    {"quantization"},
    {"settings", "sources"},
    {"text", "audio", "checkpoint", "demo_checkpoint", "upstream"},
    {"t3", "vocoder", "voices"},
    {
        "arguments",
        "budget",
        "costs",
        "engine",
        "loading",
        "parts",
        "quantization_config",
        "streaming",
        "tenancy",
        "tts",
    },
    {"api", "cli", "bench", "convert", "doctor", "evaluate"},
]
STAGES = {"t3", "vocoder", "voices"}
KNOW_VLLM = {"t3", "engine"}
READ_ENVIRONMENT = {"sources.py", "checkpoint.py", "bench/serve.py"}  # the last one: OpenAI's key of any server
# vLLM's own variables, numba's, and those of NVIDIA's MPS.
SET_ENVIRONMENT = {"engine.py", "mps.py", "vocoder/process.py", "t3/launch.py", "upstream/__init__.py"}
LIGHT = [
    "chatterbox_vllm",
    "chatterbox_vllm.api",
    "chatterbox_vllm.audio",
    "chatterbox_vllm.bench",
    "chatterbox_vllm.checkpoint",
    "chatterbox_vllm.cli",
    "chatterbox_vllm.doctor",
    "chatterbox_vllm.errors",
    "chatterbox_vllm.quantization",
    "chatterbox_vllm.quantization.policy",
    "chatterbox_vllm.quantization.spellings",
    "chatterbox_vllm.settings",
    "chatterbox_vllm.sources",
    "chatterbox_vllm.t3",
    "chatterbox_vllm.text",
    "chatterbox_vllm.types",
    "chatterbox_vllm.vocoder",
    "chatterbox_vllm.voices",
]


def sources() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


@cache
def imports(path: Path) -> list[str]:
    """Full names of every module that ``path`` imports, at its top, in a function or for types only."""
    found = []
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{HOMES.get(alias.name, alias.name)}" for alias in node.names]
            found += names if module == PACKAGE else [module]
    return found


def part(module: str) -> str:
    """``chatterbox_vllm.t3.model`` -> ``t3``; the package itself is the empty part."""
    return module.split(".")[1] if "." in module else ""


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py").replace("__init__", "")


def own_imports() -> Iterator[tuple[Path, str, str]]:
    """(file, its part, the part that it imports), without a part's imports of itself."""
    for path in sources():
        here = part_of(path)
        for module in imports(path):
            if here and module.startswith(f"{PACKAGE}.") and part(module) not in {here, "__version__"}:
                yield path, here, part(module)


def level(name: str) -> int:
    return next(number for number, parts in enumerate(LEVELS) if name in parts)


def shown(path: Path) -> str:
    return path.relative_to(ROOT / PACKAGE).as_posix()


def test_every_part_has_a_level() -> None:
    parts = {part_of(path) for path in sources()} - {"", "__main__"}
    assert parts <= set().union(*LEVELS)


def test_imports_point_down() -> None:
    up = [f"{shown(path)} imports {there}" for path, here, there in own_imports() if level(there) > level(here)]
    assert up == []


def test_stages_do_not_import_each_other() -> None:
    across = [
        f"{shown(path)} imports {there}" for path, here, there in own_imports() if here in STAGES and there in STAGES
    ]
    assert across == []


@pytest.mark.parametrize(
    ("module", "allowed"), [("vllm", KNOW_VLLM), ("vllm.model_executor", {"t3"}), ("config", set()), ("server", set())]
)
def test_who_knows_whom(module: str, allowed: set[str]) -> None:
    knowing = [
        f"{shown(path)} imports {name}"
        for path in sources()
        for name in imports(path)
        if (name == module or name.startswith(f"{module}.")) and part_of(path) not in allowed
    ]
    assert knowing == []


def environment_uses(path: Path) -> Iterator[ast.AST]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "environb"}:
            yield node
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (alias for alias in node.names if alias.name in {"environ", "getenv", "environb"})


def test_only_the_settings_read_the_environment() -> None:
    users = {shown(path) for path in sources() if any(environment_uses(path))}
    assert users <= READ_ENVIRONMENT | SET_ENVIRONMENT


def test_no_file_of_ours_is_unseen() -> None:
    """The checks above would pass over an empty list."""
    assert {"types.py", "t3/model.py"} <= {shown(path) for path in sources()}
    assert f"{PACKAGE}.errors" in imports(ROOT / PACKAGE / "types.py")


def test_light_modules_import_no_torch() -> None:
    """One process imports them all: the first heavy module that appears is blamed on the import before it."""
    apis = [f"{PACKAGE}.api.{path.stem}" for path in (ROOT / PACKAGE / "api").glob("*.py") if path.stem != "__init__"]
    script = f"""
import importlib, sys
for name in {LIGHT + apis!r}:
    importlib.import_module(name)
    heavy = {{"torch", "vllm", "transformers", "librosa"}} & set(sys.modules)
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    reply = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert reply.returncode == 0, reply.stderr
