"""``GET /v1/audio/voices``."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from chatterbox_vllm.api.services import ServicesOf

router = APIRouter(tags=["voices"])


@router.get("/v1/audio/voices")
@router.get("/audio/voices", include_in_schema=False)
async def list_voices(services: ServicesOf, legacy: bool = False) -> dict[str, Any]:
    """The voices that ``voice`` may name; ``legacy=true`` gives plain strings."""
    names = await asyncio.to_thread(services.running_engine().voices.names)
    return {"voices": list(names) if legacy else [{"id": name, "name": name} for name in names]}
