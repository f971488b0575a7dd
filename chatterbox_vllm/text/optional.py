"""A step of text processing that a package does, where it is installed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import Lock

TextStep = Callable[[str], str]
logger = logging.getLogger(__name__)


class OptionalStep:
    """``load()``'s function, or the text unchanged where that fails; the first failure is logged as a warning.

    Thread-safe: the package is loaded once, and called by one thread at a time, since none of them promises more.

    Args:
        load: imports the package and returns its function; called when the step is first used.
        does: what the step does, for the warning.
        install: the command that installs the package, for the warning.
    """

    def __init__(self, load: Callable[[], TextStep], *, does: str, install: str) -> None:
        self._load = load
        self._does = does
        self._install = install
        self._step: TextStep | None = None
        self._failed_to_load = False
        self._warned = False
        self._lock = Lock()

    def __call__(self, text: str) -> str:
        with self._lock:
            if self._failed_to_load:
                return text
            try:
                return self._loaded()(text)
            except Exception as error:  # noqa: BLE001 - whatever a package or its download raises, speech goes on
                self._failed_to_load = self._step is None
                self._warn(error)
                return text

    def _loaded(self) -> TextStep:
        if self._step is None:
            self._step = self._load()
        return self._step

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        if isinstance(error, ImportError):
            logger.warning("%s is skipped (%s); install it with: %s", self._does, error, self._install)
        else:
            logger.warning("%s is skipped: its package failed with %s: %s", self._does, type(error).__name__, error)
