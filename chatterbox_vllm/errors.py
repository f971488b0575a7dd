"""Every error this package raises on purpose.

    ChatterboxError
    ├── InvalidRequest (ValueError)      the caller's input; names the field        -> HTTP 400
    │   ├── InvalidAudio                 a reference recording that cannot be used   -> HTTP 400
    │   ├── UnknownVoice                 no such voice                               -> HTTP 404
    │   └── TooLarge                     over a stated limit                         -> HTTP 413
    ├── ConfigurationError (ValueError)  an operator's setting; names the setting
    ├── CheckpointError                  a file or key of the weights is wrong
    ├── MissingDependency (ImportError)  names the package and the command that installs it
    ├── Overloaded                       try again later                             -> HTTP 429
    └── EngineError                      this server's fault                         -> HTTP 500
        └── EngineDead                   the engine is gone or shutting down         -> HTTP 503

The HTTP status is decided in ``chatterbox_vllm.api.faults`` and nowhere else.
"""

from __future__ import annotations


class ChatterboxError(Exception):
    """Base class. ``str(error)`` is one sentence that says what is wrong and what mends it."""


class InvalidRequest(ChatterboxError, ValueError):
    """A value of a request is unusable.

    Args:
        message: what is wrong with the value and which values work.
        param: name of the argument or field at fault, as the caller spelt it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidAudio(InvalidRequest):
    """A reference recording is empty, broken, silent, too short or too long."""


class UnknownVoice(InvalidRequest):
    """No voice of that name is enrolled."""


class TooLarge(InvalidRequest):
    """The input exceeds a stated limit."""


class ConfigurationError(ChatterboxError, ValueError):
    """A setting or engine argument is unusable; ``param`` names it."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class CheckpointError(ChatterboxError):
    """The weights' folder lacks a file, or a file has a missing, unexpected or misshapen key."""


class MissingDependency(ChatterboxError, ImportError):
    """An optional package is absent.

    Args:
        package: distribution name.
        purpose: what it is needed for.
        command: the command that installs it.
    """

    def __init__(self, package: str, *, purpose: str, command: str) -> None:
        super().__init__(f"{package} is needed {purpose}; install it with: {command}")
        self.package = package
        self.command = command


class Overloaded(ChatterboxError):
    """The server is at its limit; ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(ChatterboxError):
    """Speech could not be made for a reason that is not the request's."""


class EngineDead(EngineError):
    """The engine has stopped, or is stopping."""
