"""Starts the server with this deployment's config.py; takes the flags of `chatterbox-vllm serve`."""

from __future__ import annotations

import sys

import config
from chatterbox_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]], settings=config.settings))
