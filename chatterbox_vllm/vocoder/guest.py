"""A vocoder on a thread of T3's engine process, whose CUDA context it shares.

A context takes some hundreds of megabytes of a card, which on a small one is what everything else takes. And the
kernels of one process run side by side, those of two take turns. The price: a fault of the device in one stage ends
the other, too, and both share one interpreter.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

import torch

from chatterbox_vllm.errors import ChatterboxError
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.host import ProcessHost
from chatterbox_vllm.vocoder.process import logged_through, served
from chatterbox_vllm.vocoder.wire import Channel, Limits, Load, Read, Tell

CONNECT_SECONDS: Final = 10.0
"""Within which the engine's process has to be at the other end."""
Admit = Callable[[str], Awaitable[None]]
"""Has the engine's process call ``serve`` with the path of a Unix socket."""


class GuestHost(ProcessHost):
    """Runs a ``Service`` in the engine's process, which is let in by ``admit`` once it is there."""

    def __init__(self, blueprint: Blueprint, limits: Limits | None = None) -> None:
        super().__init__(blueprint, limits)
        self._admit: asyncio.Future[Admit] | None = None

    def start(self, tell: Tell) -> None:
        self._admit = asyncio.get_running_loop().create_future()
        super().start(tell)
        tell(Read())  # the process may not be there before T3 is up

    def admit(self, admit: Admit) -> None:
        """Tells how to get into the engine's process, which is up."""
        assert self._admit is not None
        self._admit.set_result(admit)

    async def _one_process(self) -> str:
        """A stay in the process; says how it ended."""
        assert self._admit is not None
        admit = await self._admit
        try:
            end = await _connected(admit)
        except (ChatterboxError, OSError, TimeoutError) as error:
            return f"could not be reached: {error}"
        with end:
            await self._talk(end)
        return "ended"


async def _connected(admit: Admit) -> socket.socket:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder) / "vocoder")
        listener.bind(path)
        listener.listen(1)
        listener.setblocking(False)
        await admit(path)
        async with asyncio.timeout(CONNECT_SECONDS):
            end, _ = await asyncio.get_running_loop().sock_accept(listener)
        return end


def serve(path: str) -> None:
    """In the engine's process: connects to a Unix socket and serves it on a thread of its own; returns at once."""
    end = socket.socket(socket.AF_UNIX)
    end.connect(path)
    threading.Thread(target=_serve, args=(end,), name="vocoder", daemon=True).start()


def _serve(end: socket.socket) -> None:
    channel = Channel(end)
    try:
        load: Load = channel.receive()
        with logged_through(channel, load.log_level, "chatterbox_vllm.vocoder"):
            _speak(load, channel)
    finally:
        channel.close()  # however it ends, somebody waits


def _speak(load: Load, channel: Channel) -> None:
    device = torch.device(load.blueprint.device)
    if device.type == "cpu":
        served(load, channel)
    else:
        torch.set_num_threads(1)  # see ``process.main``; T3 computes nothing on the CPU that more would help
        with torch.cuda.stream(torch.cuda.Stream(device)):  # not T3's, so that neither waits for the other's kernels
            served(load, channel)
