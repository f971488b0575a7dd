"""The application: routes, errors, and the engine's life; and the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import uvicorn
from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute

from chatterbox_vllm import __version__
from chatterbox_vllm.api import faults, health, introspection, metrics, models, speech, voices
from chatterbox_vllm.api.admission import Admission
from chatterbox_vllm.api.auth import require_key
from chatterbox_vllm.api.drain import DrainingServer
from chatterbox_vllm.api.request_id import RequestId
from chatterbox_vllm.api.services import Services
from chatterbox_vllm.errors import ConfigurationError, EngineDead
from chatterbox_vllm.garbage import keep_what_is_loaded
from chatterbox_vllm.quantization.policy import Method
from chatterbox_vllm.settings import Settings

if TYPE_CHECKING:
    from chatterbox_vllm.engine import AsyncChatterbox

logger = logging.getLogger(__name__)

_PASSED_ON: Final = (
    "max_batch_size",
    "max_model_len",
    "gpu_memory_utilization",
    "strict_quantization",
    "vram_budget",
    "vocoder_device",
    "vocoder_process",
    "vocoder_dtype",
    "mps",
    "mask_invalid_tokens",
    "watermark",
    "voices_dir",
    "max_chunk_length",
)
"""Settings that are arguments of ``AsyncChatterbox.start`` by the same name."""
_LOOK: Final = 0.2
"""Seconds between looks whether the engine lives."""
_SOON: Final = 60.0
"""Seconds that an engine has to live for its death not to count as one in a row."""
_DEATHS: Final = 3
"""In a row, after which the server ends."""
_ACCESS: Final = logging.getLogger("uvicorn.access")
_PROBES: Final = frozenset(
    route.path for part in (health, metrics) for route in part.router.routes if isinstance(route, APIRoute)
)


def create_app(settings: Settings, engine: AsyncChatterbox | None = None) -> FastAPI:
    """The ASGI application; ``app.state.services`` is its state, ``app.state.metrics`` its figures.

    Args:
        engine: speaks; it stays the caller's to shut down. None: the app starts one of its own beside serving, so that
            the probes answer from the beginning.
    """
    app = FastAPI(
        title="Chatterbox",
        version=__version__,
        lifespan=_lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # it would name the host that the request did, whoever that is
    )
    app.state.services = Services(settings, Admission(settings.max_concurrent_requests), engine)
    app.state.metrics = metrics.Metrics(app.state.services)
    app.include_router(health.router)
    for part in (speech, models, voices, introspection, metrics):
        app.include_router(part.router, dependencies=[Depends(require_key)])
    app.get("/openapi.json", include_in_schema=False, dependencies=[Depends(require_key)])(_schema_of(app))
    app.add_middleware(RequestId)
    faults.install(app)
    return app


def serve(settings: Settings) -> None:
    """Serves until a signal ends it; requests in hand are finished first.

    Raises:
        ConfigurationError: the address cannot be listened on.
        Exception: what kept the engine from starting, or from living.
    """
    log_to_stderr(settings)
    listener = _listen(settings)
    app = create_app(settings)
    services: Services = app.state.services
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,  # longer than proxies and clients keep idle connections, so that it is they who close
        timeout_graceful_shutdown=5,
    )
    server = DrainingServer(config, services.admission, settings.drain_timeout)
    services.on_failure = server.stop
    logger.info("listening on http://%s:%d; loading the model", settings.host, listener.getsockname()[1])
    server.run(sockets=[listener])
    if services.failure is not None:
        raise services.failure


def log_to_stderr(settings: Settings) -> None:
    """What a command logs: neither text nor sound."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")  # others' warnings
    for name in ("chatterbox_vllm", "uvicorn"):
        logging.getLogger(name).setLevel(settings.effective_log_level.upper())
    _ACCESS.addFilter(_is_worth_a_line)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Not a probe that was content: probes and scrapers ask every few seconds, for weeks."""
    match record.args:
        case (_, _, str(path), _, int(status)):
            return path.partition("?")[0] not in _PROBES or status >= 400 or _ACCESS.isEnabledFor(logging.DEBUG)
    return True


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigurationError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror or error}); choose another one",
            param="port",
        ) from error
    # Connections inherit it: the kernel cuts a reader that takes nothing, also of bytes we have no hand on any more.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.stalled_reader_timeout))
    return listener


def _schema_of(app: FastAPI) -> Callable[[], Any]:
    def schema() -> dict[str, Any]:
        return app.openapi()

    return schema


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Runs the app's own engine beside serving and shuts it down at the end."""
    services: Services = app.state.services
    if services.engine is not None:
        yield
        return
    engines = asyncio.create_task(_engines(services))
    engines.add_done_callback(services.engines_ended)
    try:
        yield
    finally:
        services.admission.drain()
        engines.cancel()
        await asyncio.wait([engines])


async def _engines(services: Services) -> None:
    """Starts an engine, and another one when it has died, for as long as the server runs.

    Raises:
        EngineDead: one after the other died soon.
        Exception: what kept one from starting.
    """
    deaths = 0
    while deaths < _DEATHS:
        engine = await _engine(services.settings)
        keep_what_is_loaded()
        services.engine, up = engine, time.monotonic()
        try:
            while (health := engine.health()).live:  # noqa: ASYNC110 (it is told by nobody)
                await asyncio.sleep(_LOOK)
            services.engine = None
            logger.error("%s; starting the engine again", health.reason)
        finally:
            await engine.shutdown()
        deaths = deaths + 1 if time.monotonic() - up < _SOON else 1
    raise EngineDead(f"the engine died {deaths} times in a row; what it logged says why")


async def _engine(settings: Settings) -> AsyncChatterbox:
    engine = await asyncio.to_thread(import_module, "chatterbox_vllm.engine")  # imports torch and vLLM: seconds
    started: AsyncChatterbox = await engine.AsyncChatterbox.start(**engine_arguments(settings))
    if started.policy.t3 == Method.BNB_4BIT:
        logger.info("Using bitsandbytes quantization to reduce VRAM consumption")
    logger.info("ready to speak")
    return started


def engine_arguments(settings: Settings) -> dict[str, Any]:
    """The arguments of ``AsyncChatterbox.start``. ``engine_args`` adds to them and may not repeat one.

    Raises:
        ConfigurationError: ``engine_args`` names an argument that has a setting of its own, or ``language`` is none.
    """
    from chatterbox_vllm.checkpoint import Variant
    from chatterbox_vllm.text.languages import SUPPORTED_LANGUAGES

    if settings.language not in SUPPORTED_LANGUAGES:
        known = ", ".join(SUPPORTED_LANGUAGES)
        raise ConfigurationError(f"language must be one of {known}, not {settings.language!r}", param="language")

    model, variant = settings.checkpoint
    arguments: dict[str, Any] = {name: getattr(settings, name) for name in _PASSED_ON}
    arguments |= {"model": model, "variant": Variant(variant) if variant else None, "schedule": _schedule(settings)}
    arguments["quantization"] = settings.policy
    arguments["device"] = None if settings.device == "auto" else settings.device
    if settings.dtype != "auto":
        arguments["dtype"] = settings.dtype
    for name in settings.engine_args:
        if name in arguments:
            raise ConfigurationError(f"engine_args: {name} has a setting of its own", param="engine_args")
    return arguments | settings.engine_args


def _schedule(settings: Settings) -> Any:
    from chatterbox_vllm.vocoder.schedule import ChunkSchedule

    return ChunkSchedule(
        first=settings.first_chunk_tokens,
        growth=settings.chunk_growth,
        largest=settings.largest_chunk_tokens,
        alone=settings.lone_chunk_tokens,
    )
