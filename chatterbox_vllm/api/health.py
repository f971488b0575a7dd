"""Probes: open without a key, and each answers its own question.

/live: should this process be left alone?  /ready: should it get traffic?  /health: the whole state, 200 when ready.
"""

from __future__ import annotations

import time

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from chatterbox_vllm import __version__
from chatterbox_vllm.api.services import ServicesOf

router = APIRouter(tags=["probes"])


@router.head("/live", include_in_schema=False)
@router.get("/live")
async def live(services: ServicesOf) -> JSONResponse:
    """200 unless the engine is dead or could not start."""
    state = services.state()
    return JSONResponse(
        {"live": state.live, "reason": None if state.live else state.reason}, 200 if state.live else 503
    )


@router.head("/ready", include_in_schema=False)
@router.get("/ready")
async def ready(services: ServicesOf) -> JSONResponse:
    """200 once the engine is up, until it dies or the server drains."""
    state = services.state()
    return JSONResponse({"ready": state.ready, "reason": state.reason}, 200 if state.ready else 503)


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(services: ServicesOf) -> JSONResponse:
    """Everything the probes know."""
    state = services.state()
    content = state._asdict() | {
        "active_requests": services.admission.active,
        "request_limit": services.admission.limit,
        "uptime_seconds": round(time.time() - services.started, 1),
        "version": __version__,
    }
    return JSONResponse(content, 200 if state.ready else 503)
