"""``POST /v1/audio/speech``."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Final

from fastapi import APIRouter, Request, Response

from chatterbox_vllm.api.body import read_json
from chatterbox_vllm.api.delivery import SpokenAnswer
from chatterbox_vllm.api.metrics import CountedRoute, record_of
from chatterbox_vllm.api.schemas import SpeechBody, parse
from chatterbox_vllm.api.services import ServicesOf
from chatterbox_vllm.audio.encode import FORMATS
from chatterbox_vllm.errors import TooLarge
from chatterbox_vllm.settings import Settings
from chatterbox_vllm.text.frontend import check_text
from chatterbox_vllm.text.languages import check_language

router = APIRouter(tags=["speech"], route_class=CountedRoute)

_DOCUMENTED: Final[dict[str, Any]] = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SpeechBody.model_json_schema()}},
    }
}
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The sound: one file, or pieces of it as they are made.",
        "content": {name: {} for name in [*FORMATS.values(), "text/event-stream"]},
    }
}


@router.post("/v1/audio/speech", openapi_extra=_DOCUMENTED, responses=_ANSWERS, response_class=Response)
@router.post("/audio/speech", include_in_schema=False)
async def speech(request: Request, services: ServicesOf) -> Response:
    """Speaks a text: as one whole file, or as it is made with ``stream`` or ``stream_format``."""
    engine = services.running_engine()
    with ExitStack() as place:
        place.enter_context(services.admission.slot())
        record_of(request.scope).admitted = True
        body = parse(await read_json(request, max_bytes=_largest_body(services.settings)))
        _check(body, services.settings)
        return SpokenAnswer(body, engine, services, place.pop_all())


def _check(body: SpeechBody, settings: Settings) -> None:
    """What is wrong with the text or its language, said before any work is done."""
    limit = settings.max_input_characters
    if len(body.input) > limit:
        raise TooLarge(f"input has {len(body.input)} characters; {limit} are the most", param="input")
    check_text(body.input, param="input")
    if body.spoken_language is not None:
        check_language(body.spoken_language, param="language" if body.language_id is None else "language_id")


def _largest_body(settings: Settings) -> int:
    """A recording in base64, the longest text in JSON's longest spelling, and room for the rest."""
    return settings.max_upload_bytes * 4 // 3 + settings.max_input_characters * 12 + 2**20
