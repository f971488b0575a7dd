"""All five at once."""

from __future__ import annotations

from typing import Any

import pytest

from chatterbox_vllm.checkpoint import Checkpoint
from tests.promises.support import Started


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"use_bnb_quantization": True}, {"quantization": "bitsandbytes"}),
        ({"use_bnb_quantization": True}, {"use_int8_quantization": True}),
        ({"use_quantization": True}, {"quantization_strategy": "conservative"}),
        ({"quantization": "int8"}, {"quantization_strategy": "mixed"}),
    ],
    ids=str,
)
def test_spellings_that_disagree_are_named(
    first: dict[str, Any], second: dict[str, Any], demo: Checkpoint, started: Started
) -> None:
    from chatterbox_vllm.tts import ChatterboxTTS

    with pytest.raises(ValueError, match="disagree about t3; keep one") as refused:
        ChatterboxTTS.from_local(demo, **first, **second)
    assert all(name in str(refused.value) for name in (*first, *second))
    assert started.attempts == []
