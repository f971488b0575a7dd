"""Imports upstream's wheel (chatterbox-tts) piece by piece, beside libraries it was never pinned for.

Three things stand in the way of a plain ``import chatterbox.models.s3gen``:

- ``chatterbox/__init__.py`` imports everything the wheel has, web page included;
- torchaudio has no build for a CPU-only torch, and it must not be faked in ``sys.modules``:
  transformers and vLLM ask whether it is there and would believe it;
- Perth imports ``pkg_resources``, which setuptools 81 dropped.

So the modules of three packages, and no others, are run with an ``__import__`` that answers for these two
names itself. Nothing is put into ``sys.modules`` under a name that is not its own.

Upstream and we use librosa, whose functions numba keeps compiled, by default beside librosa's source or in the home:
where neither may be written to, importing librosa fails. So numba is given a folder in our cache.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import os
import shlex
import sys
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

from chatterbox_vllm.checkpoint import cache_dir, unusable_cache
from chatterbox_vllm.errors import MissingDependency

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

PACKAGES: Final = frozenset({"chatterbox", "s3tokenizer", "perth"})
PIP: Final = f"{shlex.quote(sys.executable)} -m pip"
"""The pip of the environment that runs; the one in PATH may be another's."""
INSTALL: Final = f"{PIP} install --no-deps chatterbox-tts==0.1.7 s3tokenizer==0.3.0"
_DISTRIBUTIONS: Final = {
    "PIL": "pillow",
    "attr": "attrs",
    "google": "protobuf",
    "perth": "resemble-perth",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "spacy_pkuseg": "spacy-pkuseg",
    "yaml": "PyYAML",
}
"""Of modules that upstream's packages import, those whose distribution has another name."""

os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))


def load(name: str) -> ModuleType:
    """The wheel's module ``chatterbox.models.<name>``, for instance ``s3gen`` or ``s3gen.xvector``.

    Raises:
        MissingDependency: the wheel, or a package it needs, is not installed.
    """
    return import_module(f"chatterbox.models.{name}")


def import_module(name: str) -> ModuleType:
    """Any module of ``PACKAGES`` by its full name, without running ``chatterbox/__init__.py``.

    Raises:
        MissingDependency: the package, or one it needs, is not installed.
        ConfigurationError: numba has no folder to write to.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise _missing(name, error.name or name) from error
    except RuntimeError as error:
        if "no locator available" in str(error):  # numba's words for having nowhere to write to
            raise unusable_cache(error) from error
        raise


def _missing(wanted: str, absent: str) -> MissingDependency:
    package = absent.partition(".")[0]
    if package in {"chatterbox", "s3tokenizer"}:
        return MissingDependency("chatterbox-tts", purpose="for upstream's network definitions", command=INSTALL)
    name = _DISTRIBUTIONS.get(package, package)
    return MissingDependency(name, purpose=f"by {wanted}", command=f"{PIP} install {name}")


class _Finder(MetaPathFinder):
    """Finds the modules of ``PACKAGES`` where they are, and has them run by ``_Loader``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "chatterbox":
            return  # a package with a path and nothing in it
        # exec() takes a module's builtins, __import__ among them, from here.
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


def _import(
    name: str,
    globals: dict[str, Any] | None = None,
    locals: dict[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    top, _, rest = name.partition(".")
    if level == 0 and top in _SUBSTITUTES:
        substitute = _SUBSTITUTES[top]()
        if isinstance(substitute, ModuleType):  # the real one
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        for part in rest.split(".") if rest and fromlist else ():
            substitute = getattr(substitute, part)
        return substitute
    return builtins.__import__(name, globals, locals, fromlist or (), level)


@cache
def _torchaudio() -> Any:
    """The real torchaudio where it works, and what chatterbox and Perth need of it where it does not."""
    try:
        return importlib.import_module("torchaudio")
    except (ImportError, OSError):  # OSError: a CUDA build's library beside a CPU torch
        return importlib.import_module("chatterbox_vllm.upstream.standin").torchaudio


def _pkg_resources() -> Any:
    def resource_filename(package: str, resource: str) -> str:
        return str(Path(str(sys.modules[package].__file__)).parent / resource)

    return SimpleNamespace(resource_filename=resource_filename)


_SUBSTITUTES: Final[dict[str, Callable[[], Any]]] = {"torchaudio": _torchaudio, "pkg_resources": _pkg_resources}
