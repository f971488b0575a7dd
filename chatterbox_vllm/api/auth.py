"""The API key. Attached to routers, never decided from a URL."""

from __future__ import annotations

import hmac

from fastapi import HTTPException, Request

from chatterbox_vllm.api.services import ServicesOf


async def require_key(request: Request, services: ServicesOf) -> None:
    """Refuses a request without the key, where one is set.

    Raises:
        HTTPException: 401.
    """
    key = services.settings.api_key
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Latin-1 gives back the very bytes; whitespace of other alphabets may be parts of their letters
    right = hmac.compare_digest(given.encode("latin-1").strip(), key.get_secret_value().encode())
    if scheme.lower() != "bearer" or not right:
        raise HTTPException(
            401,
            "this server needs its API key: send it as 'Authorization: Bearer <key>'",
            {"WWW-Authenticate": "Bearer"},
        )
