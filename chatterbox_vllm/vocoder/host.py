"""Where a vocoder runs: on a thread of this process, or in a process of its own that is started anew when it dies."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Final, Protocol

from chatterbox_vllm.errors import EngineDead, EngineError
from chatterbox_vllm.vocoder.blueprint import Blueprint
from chatterbox_vllm.vocoder.service import Service
from chatterbox_vllm.vocoder.wire import (
    Build,
    Ended,
    Latest,
    Limits,
    Load,
    Logged,
    News,
    Order,
    Read,
    Ready,
    Refused,
    Spoken,
    Tell,
    framed,
    received,
)

logger: Final = logging.getLogger(__name__)

STARTS: Final = 5
"""So many starts in a row without a finished batch, and a process is given up."""
FIRST_PAUSE: Final = 0.25
"""Seconds before a process is started anew; each further start in a row waits twice as long."""
GRACE: Final = 5.0
"""Seconds that a process may take to end."""
PATIENCE: Final = 10.0
"""Seconds without a word about its work after which a vocoder on a GPU counts as hanging."""
PATIENCE_ON_CPU: Final = 120.0
"""There a batch may take that long."""
_LAST_WORDS: Final = 0.5
"""Seconds in which a process whose socket is closed may say how it ended; its work does not wait any longer."""
_LOOK: Final = 0.01
_READ_AHEAD: Final = 2**22
"""Bytes of a process's answers that are taken off its hands before somebody looks at them."""
_PROGRAM: Final = (
    "import sys; sys.path[:] = sys.argv[2:]; from chatterbox_vllm.vocoder.process import main; main(int(sys.argv[1]))"
)


class Host(Protocol):
    """Runs one ``Service``. All belongs to one event loop, in which ``tell`` is called."""

    patience: float
    """Seconds for which it may have work and tell nothing, before it counts as hanging."""

    def start(self, tell: Tell) -> None:
        """Begins to load what does not disturb T3's loading; tells ``Read`` then. To be called once."""

    def build(self) -> None:
        """Takes the device's memory; tells ``Ready`` then."""

    def send(self, order: Order) -> None:
        """Passes ``order`` on, if there is somebody to take it; ``Ended`` says when there was not."""

    def kill(self) -> None:
        """Ends what hangs, where that is possible; ``Ended`` tells of it."""

    async def end(self) -> None:
        """Ends it; what it has is not spoken. May be called again."""


class ThreadHost:
    """A thread of this process. It loads all at ``build``, and what ends it is final.

    T3 may load in this process, too, and meanwhile changes torch's defaults.
    """

    def __init__(self, blueprint: Blueprint, limits: Limits | None = None) -> None:
        self._blueprint = blueprint
        self.patience = _patience(blueprint)
        self._service = Service(self._tell, limits or Limits())
        self._thread = threading.Thread(target=self._run, name="vocoder", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, tell: Tell) -> None:
        self._loop, self._heard = asyncio.get_running_loop(), tell
        tell(Read())

    def build(self) -> None:
        self._thread.start()

    def send(self, order: Order) -> None:
        self._service.put(order)

    def kill(self) -> None:
        """A thread cannot be ended."""

    async def end(self) -> None:
        self._service.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            vocoder = self._blueprint.build(self._blueprint.read())
            self._tell(Ready(vocoder.footprint()))
            self._service.run(vocoder)
        except Exception as error:  # noqa: BLE001  # told to whoever waits
            self._tell(Ended(error, final=True))
        else:
            self._tell(Ended(EngineDead("the vocoder was closed"), final=True))

    def _tell(self, news: News) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self._heard, news)
        except RuntimeError:
            logger.debug("the event loop has ended; nobody hears of %s", type(news).__name__)


class ProcessHost:
    """A process of its own, which reads the checkpoint by itself.

    It is started as a program, not with ``multiprocessing``, which would run the caller's script again in it, unless
    that is hidden, for all threads, while a process starts.
    """

    def __init__(self, blueprint: Blueprint, limits: Limits | None = None) -> None:
        self._blueprint = blueprint
        self._limits = limits or Limits()
        self.patience = _patience(blueprint)
        self._may_build = False
        self._writer: asyncio.StreamWriter | None = None
        self._sent = Latest()
        self._life: asyncio.Task[None] | None = None
        self._refusal: Exception | None = None
        self._was_ready = False
        self._fruitless = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.pid: int | None = None

    def start(self, tell: Tell) -> None:
        self._heard = tell
        self._life = asyncio.get_running_loop().create_task(self._live())

    def build(self) -> None:
        self._may_build = True
        self._send(Build())

    def send(self, order: Order) -> None:
        self._send(order)

    def kill(self) -> None:
        if self._process is not None and self._writer is not None:
            logger.error("the vocoder's process hangs; killing it")
            self._process.kill()
            self._writer.transport.abort()  # one that hangs in a driver may not end for all that

    async def end(self) -> None:
        if self._life is not None:
            self._life.cancel()
            await asyncio.wait([self._life])
            await self._bury()  # which may be what was cancelled

    async def _live(self) -> None:
        """Keeps a process running."""
        try:
            while True:
                error = await self._one_end()
                self._fruitless += 1
                final = self._fruitless >= STARTS or (self._refusal is not None and not self._was_ready)
                self._heard(Ended(error, final=final))
                if final:
                    return
                await self._bury()  # the next one needs its memory
                await asyncio.sleep(FIRST_PAUSE * 2 ** (self._fruitless - 1))
        finally:
            await self._bury()

    async def _one_end(self) -> Exception:
        """Runs a process until it ends, or cannot be started or understood, and says why."""
        self._refusal = None
        try:
            how = await self._one_process()
        except Exception as error:
            # Whatever it is, many wait to be told of it.
            logger.exception("the vocoder's process cannot be kept")
            how = f"failed: {type(error).__name__}: {error}"
        return self._refusal or EngineError(f"the vocoder's process {how}")

    async def _one_process(self) -> str:
        """Starts a process and passes on what it tells; says what became of it, as far as that is known soon."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._process = _started(theirs.fileno())
            self.pid = self._process.pid
            await self._talk(ours)
        code = await _exit_code(self._process, _LAST_WORDS)
        if code is None:
            return "is ending"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    async def _talk(self, end: socket.socket) -> None:
        """Passes on what the process tells, until it closes its end."""
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=_READ_AHEAD)
        self._writer, self._sent, voices = writer, Latest(), Latest()
        try:
            level = logging.getLogger("chatterbox_vllm").getEffectiveLevel()
            self._send(Load(self._blueprint, self._limits, level))
            if self._may_build:
                self._send(Build())
            with suppress(EOFError, ConnectionError):
                while True:
                    self._listen(await received(reader, voices))
        finally:
            self._writer = None
            writer.transport.abort()

    async def _bury(self) -> None:
        """Waits for the end of a process whose socket is closed, if there is one."""
        process = self._process
        if process is not None and await _exit_code(process, GRACE) is None:
            process.kill()
            await _exit_code(process, GRACE)
        self._process = None

    def _send(self, message: Load | Build | Order) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.writelines(framed(message, self._sent))

    def _listen(self, news: News | Refused) -> None:
        match news:
            case Refused(error):
                self._refusal = error
            case Logged(record):
                logging.getLogger(record.name).handle(record)
            case _:
                if isinstance(news, Ready):
                    self._was_ready = True
                if isinstance(news, Spoken):
                    self._fruitless = 0
                self._heard(news)


def _started(end: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, str(end), *sys.path],
        pass_fds=[end],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for those at the terminal
    )


async def _exit_code(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """A process's exit code, or minus the signal that killed it; None if it has not ended in time."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:  # noqa: ASYNC110  # ``wait`` does so, too, on a thread
        await asyncio.sleep(_LOOK)
    return process.returncode


def _patience(blueprint: Blueprint) -> float:
    return PATIENCE_ON_CPU if blueprint.device == "cpu" else PATIENCE
