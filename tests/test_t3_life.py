"""What the server knows of T3's progress, and who ends whom."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from chatterbox_vllm.errors import EngineError
from chatterbox_vllm.t3 import generator, orphans
from chatterbox_vllm.t3.generator import T3Generator


class Engine:
    """As much of vLLM's as that takes."""

    def __init__(self) -> None:
        self.unfinished = 0
        self.errored = False
        self.output_processor: Any = SimpleNamespace(
            process_outputs=lambda outputs: outputs, get_num_unfinished_requests=lambda: self.unfinished
        )
        config = SimpleNamespace(max_model_len=512)
        self.vllm_config = SimpleNamespace(model_config=config)

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        await asyncio.sleep(60)
        return []


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(generator.atexit, "register", lambda *_: None)
    return Engine()


def made(engine: Engine) -> T3Generator:
    return T3Generator(engine, SimpleNamespace(), SimpleNamespace(), method="none")  # type: ignore[arg-type]


def test_work_without_a_step_is_a_stall(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(generator.time, "monotonic", lambda: now)
    t3 = made(engine)
    now += 10 * generator.STALLED_SECONDS
    assert not t3.stalled, "nothing to do"
    engine.unfinished = 1
    assert t3.stalled
    assert engine.output_processor.process_outputs("these") == "these"
    assert not t3.stalled
    now += generator.STALLED_SECONDS + 1
    assert t3.stalled


def test_a_worker_that_does_not_answer_is_an_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "_ANSWER_SECONDS", 0.05)
    with pytest.raises(EngineError, match=r"has not answered for 0\.05 s"):
        asyncio.run(made(engine).call("t3_footprint"))


PARENT = f"""
import multiprocessing, os, time
from {orphans.__name__} import end_with_parent

def child():
    end_with_parent()
    print(multiprocessing.current_process().name, os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    for name in ("EngineCore", "another"):
        multiprocessing.get_context("spawn").Process(target=child, name=name).start()
    time.sleep(60)
"""


def test_the_engine_core_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """And nobody else does, be it that this package is loaded there, too."""
    program = tmp_path / "program.py"
    program.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = [parent.stdout.readline().split() for _ in range(2)]
        children = {psutil.Process(int(pid)): name for name, pid in lines}
        parent.kill()
    gone, left = psutil.wait_procs(children, timeout=3)
    for process in left:
        process.kill()
    assert [children[process] for process in gone] == ["EngineCore"]
    orphans.end_with_parent()  # in a process that nobody watches over
