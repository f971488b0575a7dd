"""The machine: Python, system, processor, memory, GPUs. Everything is read, nothing is imported that is heavy."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from chatterbox_vllm.doctor.finding import Finding, error, ok, warn
from chatterbox_vllm.memory import memory as ask_memory

OLDEST_DRIVER: Final = 580
"""The first driver of the CUDA 13 family, which the CUDA build of torch is made with."""
NEWER_DRIVER: Final = f"update the driver to {OLDEST_DRIVER} or newer: torch is a CUDA 13 build"
OLDEST_CAPABILITY: Final = 7.5
BF16_CAPABILITY: Final = 8.0
LEAST_MEMORY_GB: Final = 4.0
LEAST_GPU_MEMORY_GB: Final = 2.0


def python() -> Finding:
    version, name = platform.python_version(), "Python"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return error(name, f"{version} at {sys.executable}", "install Python 3.11, 3.12 or 3.13, which vLLM needs")
    return ok(name, f"{version} at {sys.executable}")


def system() -> Finding:
    name, detail = "system", f"{platform.platform()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return warn(name, f"{detail}: untested", "use Linux on x86-64, in a virtual machine or container if need be")
    return ok(name, detail)


def processor() -> Finding:
    """Cores that this process may use, and the vector instructions that vLLM's CPU kernels look for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags = _processor_flags()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return ok("processor", f"{cores} cores; {', '.join(known) or 'no vector instructions that vLLM uses'}")


def _processor_flags(path: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), []))


def memory() -> Finding:
    total, available = ask_memory()
    detail = f"{available / 1e9:.1f} of {total / 1e9:.1f} GB free"
    if available / 1e9 < LEAST_MEMORY_GB:
        return warn("memory", detail, f"end other programs, or give the server {LEAST_MEMORY_GB:.0f} GB")
    return ok("memory", detail)


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; memory in GB."""

    name: str
    driver: str
    capability: float
    memory: float
    free: float


def hidden_driver(root: Path = Path("/")) -> str | None:
    """The version of a GPU's driver, by the kernel; None where the GPU's device is not here."""
    if not (root / "dev/nvidiactl").exists():
        return None
    try:
        said = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        said = ""
    version = re.search(r"\s(\d+\.\d[\d.]*)\s", said)
    return version[1] if version else "of unknown version"


def ask_gpus() -> list[Gpu] | str:
    """The NVIDIA GPUs, or why there are none."""
    if shutil.which("nvidia-smi") is None:
        return "nvidia-smi is not installed"
    query = "--query-gpu=name,driver_version,compute_cap,memory.total,memory.free"
    try:
        reply = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as problem:
        return f"nvidia-smi did not answer ({problem})"
    if reply.returncode != 0 or not reply.stdout.strip():
        return " ".join(f"nvidia-smi failed: {reply.stdout} {reply.stderr}".split())
    return [_parse_gpu(line) for line in reply.stdout.strip().splitlines()]


def _parse_gpu(line: str) -> Gpu:
    name, driver, capability, total, free = (part.strip() for part in line.rsplit(",", 4))
    return Gpu(name, driver, _number(capability), _number(total) * 2**20 / 1e9, _number(free) * 2**20 / 1e9)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:  # "[N/A]", on GPUs that share the machine's memory
        return 0.0


def gpus(found: list[Gpu] | str, *, cuda_build: bool, hidden: str | None = None) -> Iterator[Finding]:
    """What the GPUs mean for the build of vLLM that is installed.

    Args:
        hidden: ``hidden_driver()``; counts where nvidia-smi names no GPU.
    """
    if isinstance(found, str):
        yield _unnamed(found, hidden) if cuda_build else _unneeded(found, hidden)
    elif cuda_build:
        yield from map(_judge, found)
    else:
        yield _unused(found[0].name)


def _unused(name: str) -> Finding:
    remedy = "CHATTERBOX_DEVICE=cuda ./start-api-server.sh, or pip install '.[cuda]' in a new environment"
    return warn("GPU", f"{name} is not used: this is the CPU build of vLLM", remedy)


def _unneeded(why: str, hidden: str | None) -> Finding:
    if hidden:
        return _unused(f"an NVIDIA GPU, driver {hidden},")
    return ok("GPU", f"none ({why}); the CPU build needs none")


def _unnamed(why: str, hidden: str | None) -> Finding:
    """A container may have the GPU without the driver's utilities."""
    if hidden is None:
        remedy = "install NVIDIA's driver, or the CPU build: CHATTERBOX_DEVICE=cpu ./start-api-server.sh"
        return error("GPU", f"none ({why}), and this is the CUDA build of vLLM", remedy)
    if 0 < _number(hidden.partition(".")[0]) < OLDEST_DRIVER:
        return error("GPU", f"driver {hidden}", NEWER_DRIVER)
    remedy = "a container gets the driver's utilities, which vLLM calls, by NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    return warn("GPU", f"one is here, driver {hidden}, but cannot be asked: {why}", remedy)


def _judge(gpu: Gpu) -> Finding:
    detail = f"{gpu.name}, driver {gpu.driver}, capability {gpu.capability}, {gpu.free:.1f} of {gpu.memory:.1f} GB free"
    if _number(gpu.driver.partition(".")[0]) < OLDEST_DRIVER:
        return error("GPU", detail, NEWER_DRIVER)
    if gpu.capability < OLDEST_CAPABILITY:
        return error("GPU", detail, f"use a GPU of compute capability {OLDEST_CAPABILITY} (Turing, 2018) or newer")
    if gpu.memory and gpu.free < LEAST_GPU_MEMORY_GB:
        return warn("GPU", detail, "end the programs that nvidia-smi lists, or start with --ultra-low-vram")
    if gpu.capability < BF16_CAPABILITY:
        return ok("GPU", f"{detail}; it has no bf16, so fp16 is used")
    return ok("GPU", detail)


def compiler() -> Finding:
    """Triton compiles the code that launches its kernels, at run time, on the machine that it runs on."""
    name = "C compiler"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None:
        return error(name, "none, and Triton's kernels need one", "apt-get install gcc")
    if not header.is_file():
        remedy = f"apt-get install python{sys.version_info[0]}.{sys.version_info[1]}-dev"
        return error(name, f"{found}, but {header} is missing, which Triton's kernels need", remedy)
    return ok(name, found)
