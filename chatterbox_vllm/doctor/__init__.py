"""``chatterbox-vllm doctor``: the whole state, what is wrong with it, and the command that mends it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Final

from chatterbox_vllm.doctor import machine, packages
from chatterbox_vllm.doctor.finding import Finding, Level, error, ok
from chatterbox_vllm.errors import ConfigurationError
from chatterbox_vllm.upstream import PIP

MARKS: Final = {Level.OK: "ok   ", Level.WARN: "warn ", Level.ERROR: "ERROR"}


def examine(model: str | None = None) -> Iterator[Finding]:
    """Every check, in the order of the report.

    Args:
        model: what CHATTERBOX_MODEL would say; None uses the settings.
    """
    build = packages.build()
    yield machine.python()
    yield machine.system()
    yield machine.processor()
    yield machine.memory()
    yield from machine.gpus(machine.ask_gpus(), cuda_build=build == "cuda", hidden=machine.hidden_driver())
    if build == "cuda":
        yield machine.compiler()
    yield packages.vllm(build)
    yield from packages.declared(build)
    yield packages.wheels()
    yield packages.plugin()
    yield from packages.optional()
    if packages.version("torch"):
        yield from packages.imports(cuda_build=build == "cuda")
    yield from _deployment(model, on_cpu=build == "cpu")


def _deployment(model: str | None, *, on_cpu: bool) -> Iterator[Finding]:
    """What depends on the settings; a package that reading them needs may be missing, which is reported above."""
    try:
        from chatterbox_vllm import sources
        from chatterbox_vllm.doctor import start, weights
    except ImportError as problem:
        yield error("settings", f"cannot be read: {problem}", f"{PIP} install the packages reported above")
        return
    try:
        chosen = sources.load({"model": model})
    except ConfigurationError as problem:
        yield error("settings", str(problem), start.correct(problem.param))
        return
    yield ok("settings", f"model {chosen.model}, preset {chosen.preset or 'none'}, device {chosen.device}")
    yield from weights.weights(chosen)
    yield from start.refusals(chosen, on_cpu=on_cpu)
    yield weights.disk()
    yield weights.port(chosen)


def text(finding: Finding) -> str:
    """One finding for a reader; the remedy on a line of its own."""
    line = f"{MARKS[finding.level]}  {finding.name:<18}  {finding.detail}"
    return f"{line}\n{'':27}-> {finding.remedy}" if finding.remedy else line


def verdict(findings: Sequence[Finding]) -> str:
    errors = [finding.name for finding in findings if finding.level is Level.ERROR]
    if errors:
        return f"This cannot serve yet: {', '.join(errors)}. The arrows above say what mends it."
    warnings = sum(finding.level is Level.WARN for finding in findings)
    return "Ready to serve." if not warnings else f"Ready to serve, with {warnings} warning{'s' * (warnings > 1)}."


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0 if the server can serve, 1 if not."""
    parser = argparse.ArgumentParser(prog="chatterbox-vllm doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--model", help="the model to look for, in place of CHATTERBOX_MODEL")
    options = parser.parse_args(argv)
    findings = []
    for finding in examine(options.model):
        findings.append(finding)
        if not options.json:
            print(text(finding), flush=True)
    healthy = all(finding.level is not Level.ERROR for finding in findings)
    if options.json:
        report = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"can_serve": healthy, "findings": report}, indent=2))
    else:
        print(f"\n{verdict(findings)}")
    return 0 if healthy else 1
