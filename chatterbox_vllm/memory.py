"""The memory that this process may take: the machine's, or less where a control group (a container) sets a limit; and
what torch has of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int


def memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> Memory:
    """What there is, and what is free or can be freed."""
    total, available = _machine(proc)
    for group in _groups(proc, cgroup):
        limit = _number(group / "memory.max") or _number(group / "memory.limit_in_bytes")
        if limit:
            used = _number(group / "memory.current") or _number(group / "memory.usage_in_bytes") or 0
            total = min(total, limit)
            available = min(available, max(limit - used + _page_cache(group), 0))
    return Memory(total, min(available, total))


class TorchMemory(NamedTuple):
    """Bytes of a GPU that torch has allocated now and at its peak, and that it has reserved; 0 on a CPU."""

    allocated: int
    peak: int
    reserved: int


def torch_memory(device: torch.device | None = None) -> TorchMemory:
    """By default of the current GPU."""
    from torch import cuda

    if not cuda.is_available() or (device is not None and device.type != "cuda"):
        return TorchMemory(0, 0, 0)
    return TorchMemory(cuda.memory_allocated(device), cuda.max_memory_allocated(device), cuda.memory_reserved(device))


def _machine(proc: Path) -> Memory:
    try:
        lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        import psutil

        whole = psutil.virtual_memory()
        return Memory(whole.total, whole.available)
    sizes = {line.partition(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith(" kB")}
    return Memory(sizes["MemTotal"], sizes["MemAvailable"])


def _groups(proc: Path, cgroup: Path) -> Iterator[Path]:
    """This process's control groups, v2 and v1, with those that they are in: a limit counts for all below it."""
    yield from (cgroup, cgroup / "memory")
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, inside = line.split(":", 2)
        if controllers in {"", "memory"}:
            top = cgroup / controllers
            group = top / inside.strip("/")
            while group != top:  # a container sees its own group as the top one, and the others not at all
                yield group
                group = group.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _page_cache(group: Path) -> int:
    """Bytes of files that the group has read and that are dropped when memory is short."""
    try:
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    sizes = dict(line.split(maxsplit=1) for line in lines)
    return int(sizes.get("total_inactive_file") or sizes.get("inactive_file") or 0)
