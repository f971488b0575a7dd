"""What the routes share: the settings, the engine once it is up, and the admission of requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast

from fastapi import Depends, Request

from chatterbox_vllm.api.admission import Admission
from chatterbox_vllm.errors import EngineDead
from chatterbox_vllm.settings import Settings

if TYPE_CHECKING:
    from chatterbox_vllm.engine import AsyncChatterbox


class State(NamedTuple):
    """The server's condition: ``status`` is one word, ``reason`` why it is not ready."""

    status: str
    live: bool
    ready: bool
    reason: str | None


@dataclass
class Services:
    """One server's state.

    Args:
        engine: None while it starts, be it again, and after it failed.
        failure: why its start failed, or that it keeps dying.
        on_failure: called when there is one.
    """

    settings: Settings
    admission: Admission
    engine: AsyncChatterbox | None = None
    failure: BaseException | None = None
    on_failure: Callable[[], None] = lambda: None
    started: float = field(default_factory=time.time)

    def engines_ended(self, engines: asyncio.Task[None]) -> None:
        """Takes what kept the engine from starting, or from living, from a finished task."""
        if not engines.cancelled() and (failure := engines.exception()) is not None:
            self.failure, self.engine = failure, None
            self.on_failure()

    def state(self) -> State:
        if self.failure is not None:
            return State("failed", False, False, "the engine could not start, or does not stay alive")
        if self.engine is None:
            return State("starting", True, False, "the engine is starting")
        health = self.engine.health()
        if not health.live:
            return State("dead", False, False, health.reason or "the engine has stopped")
        if self.admission.draining:
            return State("draining", True, False, "the server is shutting down")
        return State("ready" if health.ready else "stalled", True, health.ready, health.reason)

    def running_engine(self) -> AsyncChatterbox:
        """The engine.

        Raises:
            EngineDead: it is not up.
        """
        state = self.state()
        if self.engine is None or not state.live:
            raise EngineDead(f"no speech now: {state.reason}")
        return self.engine


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesOf = Annotated[Services, Depends(_services)]
"""A route's parameter type that brings the services."""
