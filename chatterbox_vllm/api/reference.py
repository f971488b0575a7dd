"""A recording inside a request: base64, or a data: URL of base64. Nothing is ever fetched."""

from __future__ import annotations

import base64
import binascii

from chatterbox_vllm.errors import InvalidAudio, TooLarge


def recording(text: str, *, max_bytes: int, param: str = "ref_audio") -> bytes:
    """The bytes of the file.

    Raises:
        TooLarge: more than ``max_bytes`` once decoded; found out before decoding.
        InvalidAudio: not base64.
    """
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise InvalidAudio(f"{param} must be a data: URL in base64", param=param)
    if len(text) // 4 * 3 > max_bytes + 2:
        raise TooLarge(f"{param} is larger than {max_bytes} bytes", param=param)
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InvalidAudio(f"{param} must be the base64 of an audio file; URLs are not fetched", param=param) from None
