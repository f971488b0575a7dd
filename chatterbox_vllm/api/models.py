"""``GET /v1/models``: the model that is loaded, and the OpenAI names it also answers to."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from chatterbox_vllm.api.services import Services, ServicesOf
from chatterbox_vllm.errors import InvalidRequest

ALIASES = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")
"""Clients send these; the speech route takes any model name and speaks with the one that is loaded."""

router = APIRouter(tags=["models"])


@router.get("/v1/models")
@router.get("/v1/audio/models", include_in_schema=False)
async def list_models(services: ServicesOf) -> dict[str, Any]:
    """OpenAI's list; Open WebUI reads ``models`` of the same answer."""
    models = [_model(name, services) for name in _names(services)]
    return {"object": "list", "data": models, "models": models}


@router.get("/v1/models/{name}")
async def get_model(name: str, services: ServicesOf) -> dict[str, Any]:
    """One of them."""
    if name not in _names(services):
        raise UnknownModel(f"no model is called {name!r:.80}", param="model")
    return _model(name, services)


class UnknownModel(InvalidRequest):
    """No model of that name is served."""


def _names(services: Services) -> tuple[str, ...]:
    multilingual = services.running_engine().checkpoint.variant.is_multilingual
    return ("chatterbox-multilingual" if multilingual else "chatterbox", *ALIASES)


def _model(name: str, services: Services) -> dict[str, Any]:
    return {
        "id": name,
        "name": name,
        "object": "model",
        "created": int(services.started),
        "owned_by": "chatterbox-vllm",
    }
