"""The memory that this process may take: the machine's, or less where a control group (a container) sets a limit; what
torch has of a GPU; and amounts as people write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from chatterbox_vllm.errors import ConfigurationError

if TYPE_CHECKING:
    import torch

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
_UNITS: Final[Mapping[str, int]] = MappingProxyType(
    {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
    | {"kib": 2**10, "mib": 2**20, "gib": 2**30}
)


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


def parse_bytes(value: str | int, *, param: str = "vram_budget") -> int:
    """``2GiB``, ``2048MiB``, ``2g`` and 2147483648 are the same; ``2GB`` is 2,000,000,000.

    Raises:
        ConfigurationError: it is no amount of memory above 0.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    factor = _UNITS.get(match[2]) if match else None
    size = float(match[1]) * factor if match and factor else 0.0
    amount = int(size) if math.isfinite(size) else 0
    if isinstance(value, bool) or amount <= 0:
        raise ConfigurationError(f"{param}={value} is no amount of memory; write 2GiB, 2048MiB or bytes", param=param)
    return amount
