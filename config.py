"""This deployment's choices: the file to edit. Only server.py (and so start-api-server.sh) reads it.

A value here beats a preset and the defaults of chatterbox_vllm/settings.py; a command-line flag, an environment
variable and the .env beside this file beat what is written here. None = not decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chatterbox_vllm.settings import Settings
from chatterbox_vllm.sources import load

# 4-bit T3 through bitsandbytes: needs an NVIDIA GPU and the package vllm-bnb-plugin. More kinds: see OTHER, as
# {"quantization_strategy": "mixed"}, and docs/VRAM_OPTIMIZATION.md.
USE_BNB_QUANTIZATION = False
BNB_QUANTIZATION = "bitsandbytes" if USE_BNB_QUANTIZATION else None

# Sampling of requests that ask for nothing else.
TEMPERATURE = 0.8
TOP_P = 1.0

# Any other setting by its name in chatterbox_vllm/settings.py, for example {"model": "multilingual", "port": 4123}.
OTHER: dict[str, Any] = {}


def settings(flags: Mapping[str, Any] | None = None) -> Settings:
    """This deployment's settings; ``flags`` are the command line's."""
    chosen = {"quantization": BNB_QUANTIZATION, "temperature": TEMPERATURE, "top_p": TOP_P}
    return load(flags, deployment=chosen | OTHER, env_file=Path(__file__).with_name(".env"))
