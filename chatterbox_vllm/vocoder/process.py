"""The program of a vocoder's own process; ``host.ProcessHost`` starts it.

It knows nothing of vLLM, nor of the program that started it. It ends with the socket that it is given, so that however
the server ends, it is not left behind.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Final, NoReturn

import torch

from chatterbox_vllm.errors import CheckpointError, ConfigurationError, EngineError
from chatterbox_vllm.garbage import keep_what_is_loaded
from chatterbox_vllm.vocoder.service import DEVICE_LOST, Service
from chatterbox_vllm.vocoder.stage import Vocoder
from chatterbox_vllm.vocoder.wire import Build, Channel, Load, Logged, Read, Ready, Refused

logger: Final = logging.getLogger(__name__)

_FAILED: Final = 1
_NAME_BYTES: Final = 15
"""What Linux keeps of a process's name."""


def main(end: int) -> None:
    """Serves the socket of that file descriptor until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever has the other end gets them, too, and ends in order
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    channel = Channel(socket.socket(fileno=end))
    load: Load = channel.receive()
    # Where NVIDIA's MPS shares the GPU, T3's kernels go first: they are small, and everybody waits for them.
    os.environ["CUDA_MPS_CLIENT_PRIORITY"] = "1"
    if load.blueprint.max_frames is not None:
        # Memory is short: cuBLAS' workspace of each stream is 8 MiB, as on other cards, in place of a Hopper's 32.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    if load.blueprint.device != "cpu":
        # All that is computed on the CPU is copies. Many threads take longer to meet than one takes for a copy: on an
        # H200's host 130 ms of a batch's 300.
        torch.set_num_threads(1)
    _take_name(f"vocoder {load.blueprint.device}")
    with logged_through(channel, load.log_level):
        # In the middle of a batch, too: nobody waits for it.
        if not served(load, channel, ended=lambda: os._exit(0)):
            _leave(channel)


def served(load: Load, channel: Channel, *, ended: Callable[[], object] | None = None) -> bool:
    """Loads a vocoder and takes orders until the other end of ``channel`` is gone, or the device.

    Args:
        ended: is called when nobody gives orders any more; by default the batch under way is finished.

    Returns:
        Whether the vocoder was there to the end; if not, why was told.
    """
    service, may_build = Service(channel.send, load.limits), threading.Event()
    listening = (channel, service, may_build, ended or service.close)
    threading.Thread(target=_listen, args=listening, name="vocoder-in", daemon=True).start()
    try:
        vocoder = _loaded(load, channel, may_build)
    except Exception as error:  # noqa: BLE001  # told to whoever waits
        channel.send(Refused(_portable(error)))
        return False
    keep_what_is_loaded()
    try:
        channel.send(Ready(vocoder.footprint()))
        service.run(vocoder)
    except DEVICE_LOST:
        return False
    except Exception:
        logger.exception("the vocoder ends by an error outside of its batches")
        return False
    return True


def _loaded(load: Load, channel: Channel, may_build: threading.Event) -> Vocoder:
    networks = load.blueprint.read()
    channel.send(Read())
    may_build.wait()
    return load.blueprint.build(networks)


def _listen(channel: Channel, service: Service, may_build: threading.Event, ended: Callable[[], object]) -> None:
    """Takes orders, while a batch runs, too."""
    try:
        while True:
            message = channel.receive()
            if isinstance(message, Build):
                may_build.set()
            else:
                service.put(message)
    except EOFError:
        may_build.set()
        ended()


def _leave(channel: Channel) -> NoReturn:
    """Ends once everything is told. A device that was lost may not let the interpreter end in order."""
    channel.close()
    os._exit(_FAILED)


def _portable(error: Exception) -> Exception:
    """An error that can be sent and that says all by itself."""
    if isinstance(error, CheckpointError | ConfigurationError):
        return error
    return EngineError(f"the vocoder could not be loaded: {type(error).__name__}: {error}")


def _take_name(name: str) -> None:
    with suppress(OSError):  # not Linux
        Path("/proc/self/comm").write_text(name[:_NAME_BYTES], encoding="utf-8")


class _Sender(QueueHandler):
    """Has what this process logs logged by the one that started it."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)  # type: ignore[arg-type]  # only ``enqueue`` uses it
        self._channel = channel

    def enqueue(self, record: logging.LogRecord) -> None:
        self._channel.send(Logged(record))


@contextmanager
def logged_through(channel: Channel, level: int, name: str = "") -> Iterator[None]:
    """Has what the logger ``name``, by default every one, is told meanwhile logged at the other end of ``channel``."""
    log, sender = logging.getLogger(name), _Sender(channel)
    log.addHandler(sender)
    logging.getLogger("chatterbox_vllm").setLevel(level)
    try:
        yield
    finally:
        log.removeHandler(sender)
