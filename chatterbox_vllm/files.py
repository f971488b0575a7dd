"""Files that a command writes at its end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from chatterbox_vllm.errors import ConfigurationError


def write_whole(path: Path, content: bytes, param: str) -> None:
    """The whole file or none of it.

    Raises:
        ConfigurationError: it cannot be written; names it and the option ``param``.
    """
    # a pipe, a device or a link, such as /dev/stdout, is written to: another file in its place would replace it
    is_plain = not path.is_symlink() and (path.is_file() or not path.exists())
    part = path.with_name(f".{path.name}.{os.getpid()}") if is_plain else path
    try:
        part.write_bytes(content)
        if is_plain:
            part.replace(path)
    except OSError as error:
        raise ConfigurationError(
            f"{param}: cannot write {path}: {error.strerror}; name a file elsewhere, or make room", param=param
        ) from error
    finally:
        if is_plain:
            part.unlink(missing_ok=True)


def write_json(path: Path | None, content: Any) -> None:
    """What ``--json`` is given, where it is.

    Raises:
        ConfigurationError: see ``write_whole``.
    """
    if path is not None:
        write_whole(path, json.dumps(content, indent=1).encode(), "--json")
