"""What the start would refuse of the settings, each by itself in range, told without loading anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from chatterbox_vllm import checkpoint
from chatterbox_vllm.checkpoint import Variant
from chatterbox_vllm.doctor import packages
from chatterbox_vllm.doctor.finding import Finding, error, warn
from chatterbox_vllm.errors import CheckpointError, ConfigurationError, MissingDependency
from chatterbox_vllm.quantization.packing import Stored
from chatterbox_vllm.quantization.policy import (
    COMPONENTS,
    GPU_ONLY,
    VOCODER,
    Method,
    Policy,
    effective_method,
    without_gpu,
)
from chatterbox_vllm.settings import Settings

_BROKEN: Final = (ImportError, OSError)
"""Of packages that the checks need, and that are reported by name."""


def correct(param: str | None) -> str:
    """The remedy for a setting."""
    return f"correct {param or 'them'}, in the environment or in .env"


def refusals(settings: Settings, *, on_cpu: bool) -> Iterator[Finding]:
    """Findings about budget, quantisation and voices; none where they are as they should be.

    Args:
        on_cpu: the CPU build of vLLM is installed.
    """
    for name, check in (("VRAM budget", _budget), ("voices", _voices)):
        try:
            check(settings, on_cpu)
        except ConfigurationError as problem:
            yield error(name, str(problem), correct(problem.param))
    yield from _quantisation(settings, on_cpu)


def _budget(settings: Settings, on_cpu: bool) -> None:
    if settings.vram_budget is not None and on_cpu:
        raise ConfigurationError("vram_budget is a GPU's; leave it out on a CPU", param="vram_budget")


def _voices(settings: Settings, _on_cpu: bool) -> None:
    if settings.voices_dir is not None and not settings.voices_dir.is_dir():
        raise ConfigurationError(f"voices_dir: {str(settings.voices_dir)!r} is not a folder", param="voices_dir")


def _quantisation(settings: Settings, on_cpu: bool) -> Iterator[Finding]:
    """As the start does, with a weaker strategy where one does not work."""
    name, policy = "quantisation", settings.policy
    try:
        stored = _stored(settings)
    except CheckpointError as problem:
        yield error(name, str(problem), "get the file anew, or give another model")
        return
    on_cpus: tuple[str, ...] = COMPONENTS if on_cpu else ()
    if "cpu" in (settings.vocoder_device or ""):
        on_cpus = (*on_cpus, *VOCODER)
    while True:
        try:
            suited = policy.on_cpu(on_cpus, strict=settings.strict_quantization)
            _check(suited if stored is None else suited.of_file(stored), stored, on_cpu)
        except (ConfigurationError, MissingDependency) as problem:
            remedy = problem.command if isinstance(problem, MissingDependency) else correct(problem.param)
            weaker = policy.weaker()
            if weaker is None or settings.strict_quantization:
                yield error(name, str(problem), remedy)
                return
            told = f"the strategy {policy.strategy} does not work here, {weaker.strategy} takes its place: {problem}"
            yield warn(name, told, remedy)
            policy = weaker
        else:
            if suited.t3 not in frozenset(Method):
                told = f"quantization={suited.t3} is vLLM's own: many of these need a checkpoint made for them"
                yield warn(name, told, f"if the start refuses it, choose {', '.join(Method)}")
            return


def _check(policy: Policy, stored: Stored | None, on_cpu: bool) -> None:
    method = policy.t3 if stored is None else effective_method(stored, policy.t3)
    if on_cpu and method in GPU_ONLY:
        raise without_gpu(method, stored=True)  # ``Policy.on_cpu`` has refused what was asked for
    if method not in frozenset(Method) and (known := packages.vllm_methods()) and method not in known:
        raise ConfigurationError(
            f"quantization={method} is unknown to vLLM, too; there are {', '.join(Method)}",
            param="quantization",
        )
    if Method.BNB_4BIT in {method, policy.flow_encoder, policy.estimator, policy.voice_encoder}:
        absent, command = packages.lacking("ultra-low-vram")
        if absent:
            raise MissingDependency(" and ".join(absent), purpose=f"for {Method.BNB_4BIT}", command=command)


def _stored(settings: Settings) -> Stored | None:
    """How the checkpoint's T3 is quantised; None where that is not told without a download, or told already.

    Raises:
        CheckpointError: the file cannot be read, or says what this program does not know.
    """
    model, variant = settings.checkpoint
    if model.removeprefix("demo-") in {*Variant, "demo"}:
        return Stored()
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return None
    try:
        file = checkpoint.locate(folder, Variant(variant) if variant else None).t3
    except CheckpointError:  # which ``weights`` reports
        return None
    try:
        return Stored.of(file)
    except _BROKEN:
        return None
