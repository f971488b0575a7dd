"""Makes the environment the program runs in, and prints the path of its Python.

Standard library only: it runs before anything is installed. `scripts/setup.sh` finds a Python for it.

What is installed is a list of exact versions (requirements/), without their declared dependencies: upstream's wheels
pin versions that no resolver can have beside vLLM. A stamp written last says what the folder holds; without the right
one the environment is made anew, so an interrupted run never passes for a whole one.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
LISTS: Final = ROOT / "requirements"
Command = Sequence[str | Path]
DEVICES: Final = ("auto", "cpu", "cuda")
OLDEST_DRIVER: Final = 580
"""The CUDA 13 family's first driver; torch in requirements/cuda.txt is a CUDA 13 build."""
NEEDED_GB: Final = {"cpu": 4.0, "cuda": 12.0, "cpu, with PyPI's torch,": 8.0}
"""Free disk to start with, the packages' cache included."""
FULL_GB: Final = 0.5


class Failure(Exception):
    """One sentence that says what failed, and what mends it."""


@dataclass(frozen=True)
class Driver:
    """What is known of the GPU's driver: its version, or why that is not known.

    Args:
        has_gpu: a GPU is here although nvidia-smi did not say so: a container may have the one and not the other.
    """

    version: str | None
    problem: str | None = None
    has_gpu: bool = False

    @property
    def answers(self) -> bool:
        return self.version is not None or self.has_gpu


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and what it should hold."""

    folder: Path
    device: str

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def uv(self) -> Path:
        return self.folder / "bin" / "uv"

    @property
    def kernels(self) -> Path:
        """Where Triton is for ``tests/test_kernels.py``."""
        return self.folder / "kernels"

    def stamp(self, *, tests: bool) -> Path:
        return self.folder / ("chatterbox-tests.stamp" if tests else "chatterbox.stamp")

    def fingerprint(self, *, tests: bool) -> str:
        """Changes with anything that would make the installed environment differ."""
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        sha = hashlib.sha256(json.dumps([project["project"], project["build-system"]], sort_keys=True).encode())
        for name in [self.device, "cuda-runtime", "uv", *(["test", "triton"] if tests else [])]:
            sha.update((LISTS / f"{name}.txt").read_bytes())
        # Scripts in a virtual environment, and the link to this folder, hold absolute paths.
        return f"{self.device} {self.folder} {ROOT} {sha.hexdigest()}\n"

    def is_whole(self, *, tests: bool) -> bool:
        return self.stamped(tests=tests) == self.fingerprint(tests=tests) and os.access(self.python, os.X_OK)

    def stamped(self, *, tests: bool) -> str:
        """The fingerprint that the folder was finished with; empty when it never was."""
        try:
            return self.stamp(tests=tests).read_text(encoding="utf-8")
        except OSError:
            return ""

    def mark_whole(self, *, tests: bool) -> None:
        stamp = self.stamp(tests=tests)
        draft = stamp.with_suffix(".draft")
        draft.write_text(self.fingerprint(tests=tests), encoding="utf-8")
        draft.replace(stamp)


def say(message: str) -> None:
    print(f"[setup] {message}", file=sys.stderr, flush=True)


def ask_driver(root: Path = Path("/")) -> Driver:
    """Asks nvidia-smi for the driver, and the kernel where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return ask_kernel(root)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Driver(None, f"nvidia-smi did not answer ({error})")
    lines = reply.stdout.strip().splitlines()
    if reply.returncode != 0 or not lines:
        said = " ".join((reply.stdout + reply.stderr).split()) or f"exit code {reply.returncode}"
        return Driver(None, f"nvidia-smi found no usable GPU ({said:.200})")
    return Driver(lines[0].strip())


def ask_kernel(root: Path) -> Driver:
    """The device's file says that a GPU is here; the version's alone does not, as it is the host's in any container."""
    if not (root / "dev/nvidiactl").exists():
        return Driver(None)
    try:
        said = (root / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        said = ""
    version = re.search(r"\s(\d+\.\d[\d.]*)\s", said)
    return Driver(version[1] if version else None, None if version else "nvidia-smi was not found", has_gpu=True)


def choose_device(wanted: str, driver: Driver) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes ``cuda`` where the driver answers.

    Raises:
        Failure: the wish is unknown or cannot be had.
    """
    if re.fullmatch(r"cuda:\d+", wanted):  # which of the GPUs is the server's business
        wanted = "cuda"
    if wanted not in DEVICES:
        raise Failure(f"CHATTERBOX_DEVICE must be one of {', '.join(DEVICES)}, not {wanted!r}.")
    if wanted == "cpu" or (wanted == "auto" and not driver.answers):
        if wanted == "auto" and driver.problem:
            say(f"{driver.problem}: taking the CPU build. Mend the driver and run again to have the GPU's.")
        return "cpu"
    if driver.version is None:
        why = driver.problem or "nvidia-smi was not found"
        say(f"{why}: taking the CUDA build without knowing the driver, which must be {OLDEST_DRIVER} or newer.")
    elif int(driver.version.split(".")[0]) < OLDEST_DRIVER:
        raise Failure(
            f"the NVIDIA driver is {driver.version}; the CUDA 13 build of torch needs {OLDEST_DRIVER} or newer."
            " Update the driver, or set CHATTERBOX_DEVICE=cpu."
        )
    return "cuda"


def free_gb(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9


def check_disk(folder: Path, build: str) -> None:
    free, needed = free_gb(folder), NEEDED_GB[build]
    if free < needed:
        raise Failure(
            f"{folder.parent} has {free:.1f} GB free, and the {build} build needs {needed:.0f}."
            " Free some, or put the environment elsewhere: CHATTERBOX_VENV=/path/on/a/larger/disk."
        )


def check_machine(environment: Environment) -> None:
    """Refuses what cannot work before anything is written."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        raise Failure(
            f"the lists in requirements/ are for Linux on x86-64, and this is {platform.system()} on"
            f" {platform.machine()}. docs/install.md says how to install with pip."
        )
    check_disk(environment.folder, environment.device)


@contextmanager
def only_one(environment: Environment) -> Iterator[int]:
    """Holds the environment's lock. Our children hold it too: one that outlives us must not meet a second installer.

    Raises:
        Failure: the folder holds something else, which making the environment would delete.
    """
    folder = environment.folder
    path = folder.with_name(f"{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run is making {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        # What an interrupted run of ours left need not look like an environment.
        marked = bool(file.read())
        ours = marked or (folder / "pyvenv.cfg").exists()
        if not ours and folder.exists() and any(folder.iterdir()):
            raise Failure(
                f"{folder} is no virtual environment, and would be emptied."
                " Name another folder: CHATTERBOX_VENV=/path/to/a/new/folder."
            )
        if not marked:
            file.write("scripts/environment.py makes the folder beside this file\n")
            file.flush()
        yield file.fileno()


class Installer:
    """The steps that fill one environment."""

    def __init__(self, environment: Environment, lock: int) -> None:
        self.environment = environment
        self.lock = lock
        self.variables = uv_variables(os.environ)

    def run(self, what: str, command: Command, *, remedy: str = "", quietly: bool = False) -> bool:
        """Runs one step, its output on our stderr. ``quietly`` answers False instead of failing."""
        sink = subprocess.DEVNULL if quietly else sys.stderr
        done = subprocess.run(
            command, stdout=sink, stderr=sink, env=self.variables, pass_fds=(self.lock,), cwd=ROOT, check=False
        )
        if done.returncode != 0 and not quietly:
            raise Failure(f"{what} failed; the lines above say why. {remedy or self.advice()}")
        return done.returncode == 0

    def advice(self) -> str:
        cache = Path(self.variables.get("UV_CACHE_DIR") or Path.home() / ".cache" / "uv")
        for folder, variable in ((self.environment.folder, "CHATTERBOX_VENV"), (cache, "UV_CACHE_DIR")):
            if free_gb(folder) < FULL_GB:
                return f"The disk of {folder} is full: free some, or set {variable} to a folder on another."
        return (
            "If they speak of the network, check the connection (and HTTPS_PROXY, SSL_CERT_FILE, UV_DEFAULT_INDEX where"
            " you need them) and run the same command again: what was downloaded is kept."
        )

    def install(self, what: str, *arguments: str | Path) -> None:
        say(what)
        self.run(what, self.uv_install(*arguments))

    def uv_install(self, *arguments: str | Path) -> list[str | Path]:
        uv = self.environment.uv
        quiet = [] if sys.stderr.isatty() else ["--quiet"]  # a log needs no progress bars; errors still show
        return [uv, "pip", "install", *quiet, "--no-deps", "--python", self.environment.python, *arguments]

    def make(self) -> None:
        folder = self.environment.folder
        version = platform.python_version()
        say(f"making {folder}: Python {version}, {self.environment.device} build of vLLM")
        self.run(
            "making a virtual environment",
            [sys.executable, "-m", "venv", "--clear", folder],
            remedy="On Debian and Ubuntu its module comes with: apt-get install python3-venv. Or name another Python:"
            " PYTHON=/path/to/python3.12.",
        )
        say("uv, which installs the rest")
        pip: Command = [self.environment.python, "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        self.run("installing uv", [*pip, "-r", LISTS / "uv.txt"])
        if self.environment.device == "cuda":
            self.install("vLLM, torch and CUDA (several GB)", "-r", LISTS / "cuda.txt")
        else:
            self.install_cpu()
        self.install("this project, as an editable package", "--editable", ROOT)
        self.compile()

    def install_cpu(self) -> None:
        lines = (LISTS / "cpu.txt").read_text(encoding="utf-8").splitlines()
        torch = next(line for line in lines if line.startswith("torch=="))
        self.install_cpu_torch(torch)
        others = self.environment.folder / "cpu-without-torch.txt"
        others.write_text("\n".join(line for line in lines if line != torch), encoding="utf-8")
        self.install("vLLM and the other packages", "-r", others)

    def install_cpu_torch(self, torch: str) -> None:
        """The first way that works: a local wheel, PyTorch's own index (uv knows it), PyPI's CUDA build."""
        links = os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS") or ""
        local = ["--find-links", ",".join(links.replace(",", " ").split()), "--offline"]
        if links and self.can_install(*local, torch):
            self.install(f"{torch} from the local folder {links}", *local, torch)
        elif self.can_install("--torch-backend", "cpu", torch):
            self.install(f"{torch} from PyTorch's index", "--torch-backend", "cpu", torch)
        else:
            say("PyTorch's index of CPU builds does not answer")
            check_disk(self.environment.folder, "cpu, with PyPI's torch,")
            plain = torch.removesuffix("+cpu")
            runtime: Command = ["-r", LISTS / "cuda-runtime.txt"]
            self.install(f"{plain} from PyPI: its CUDA build runs on a CPU too, but is larger", plain, *runtime)

    def can_install(self, *arguments: str) -> bool:
        return self.run("looking for torch", [*self.uv_install(*arguments), "--dry-run"], quietly=True)

    def compile(self) -> None:
        """Byte-compiles what was installed: where Python may not write .pyc files, each start would do it again."""
        say("byte-compiling")
        site = next((self.environment.folder / "lib").glob("python3*/site-packages"))
        command: Command = [self.environment.python, "-m", "compileall", "-q", "-j", "0", site]
        self.run("byte-compiling", command, quietly=True)  # some packages ship files for other Pythons

    def add_test_tools(self) -> None:
        self.install("the test tools", "-r", LISTS / "test.txt")
        if self.environment.device == "cpu":
            # In a folder of its own, because vLLM's CPU build warns in every process that finds it.
            what = "Triton, whose interpreter tests the GPU's kernels"
            self.install(what, "--target", self.environment.kernels, "-r", LISTS / "triton.txt")


def uv_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: a folder of local wheels is for the CPU torch alone, and pip's mirror counts."""
    variables = {name: value for name, value in environ.items() if name not in {"UV_FIND_LINKS", "VIRTUAL_ENV"}}
    if "PIP_INDEX_URL" in variables and not {"UV_DEFAULT_INDEX", "UV_INDEX_URL"} & set(variables):
        variables["UV_DEFAULT_INDEX"] = variables["PIP_INDEX_URL"]
    return variables


def ensure(environment: Environment, *, tests: bool) -> None:
    """Makes the environment hold what it should; does nothing when it does."""
    if environment.is_whole(tests=False) and (not tests or environment.is_whole(tests=True)):
        return
    check_machine(environment)
    started = time.monotonic()
    with only_one(environment) as lock:
        installer = Installer(environment, lock)
        if not environment.is_whole(tests=False):
            environment.stamp(tests=False).unlink(missing_ok=True)
            installer.make()
            environment.mark_whole(tests=False)
        if tests and not environment.is_whole(tests=True):
            installer.add_test_tools()
            environment.mark_whole(tests=True)
    say(f"ready after {time.monotonic() - started:.0f} s")


def wish(environ: Mapping[str, str], flags: Sequence[str], env_file: Path) -> str:
    """The device asked for, where the server looks too: its flag, the environment, ``.env``."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--device")
    try:
        flagged = parser.parse_known_args(flags)[0].device
    except argparse.ArgumentError:  # a flag without its value, which the server will name
        flagged = None
    return flagged or environ.get("CHATTERBOX_DEVICE") or written(env_file, "CHATTERBOX_DEVICE") or "auto"


def written(env_file: Path, name: str) -> str | None:
    """The value of one variable in a .env file."""
    try:
        text = env_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    found = re.findall(rf"^[ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*([^#\s]*)", text, flags=re.MULTILINE)
    return found[-1].strip("'\"") if found else None


def planned(environ: Mapping[str, str], flags: Sequence[str] = (), env_file: Path = ROOT / ".env") -> Environment:
    """The environment to have.

    Raises:
        Failure: as ``choose_device``; or a driver that does not answer would cost an environment of many GB.
    """
    folder = Path(environ.get("CHATTERBOX_VENV") or ROOT / ".venv").absolute()
    wanted, driver, present = wish(environ, flags, env_file), ask_driver(), Environment(folder, "cuda")
    if wanted == "auto" and not driver.answers and present.stamped(tests=False).startswith("cuda "):
        why = driver.problem or "nvidia-smi was not found"
        if not present.is_whole(tests=False):
            raise Failure(
                f"{why}, and {folder} holds an older CUDA build, which making the CPU build would delete."
                " Mend the driver, or say which it shall be: CHATTERBOX_DEVICE=cpu or CHATTERBOX_DEVICE=cuda."
            )
        say(f"{why}: keeping the CUDA build in {folder}. CHATTERBOX_DEVICE=cpu replaces it by the CPU build.")
        return present
    return Environment(folder, choose_device(wanted, driver))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/setup.sh", description="Makes the environment; prints its Python.")
    parser.add_argument("--tests", action="store_true", help="with the test tools")
    parser.add_argument("--check", action="store_true", help="make nothing; exit code 0 if it is there")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="the server's flags; --device counts here too")
    options = parser.parse_args(argv)
    try:
        environment = planned(os.environ, options.flags)
        if options.check and not environment.is_whole(tests=options.tests):
            return 1
        ensure(environment, tests=options.tests)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error}. Name folders that you may write to: CHATTERBOX_VENV=/path/to/a/new/folder for the"
            " environment, and UV_CACHE_DIR=/path for what is downloaded.",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the next run starts this step over, with what was downloaded", file=sys.stderr)
        return 130
    print(environment.python)
    return 0


if __name__ == "__main__":
    sys.exit(main())
