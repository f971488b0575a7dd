"""A comparison as a table, as JSON, as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from chatterbox_vllm.bench.report import save, wide_figure
from chatterbox_vllm.evaluate.compare import OfText, Summary
from chatterbox_vllm.evaluate.methods import Contender
from chatterbox_vllm.quantization.policy import Method

RANDOM: Final = (
    "These weights are random: the figures show that the programs work, and tell nothing about any method's quality."
)
_WIDTH: Final = 48


def described(of: Contender) -> str:
    """``demo, mixed: t3 bnb-4bit, flow_encoder bnb-8bit, ...``; networks that are not quantised are left out."""
    policy = of.policy
    parts = [f"{name} {method}" for name, method in policy.methods.items() if method != Method.NONE]
    told = ", ".join(parts) or "nothing quantised"
    strategy = f", {policy.strategy}" if policy.strategy else ""
    return f"{of.checkpoint.folder.name}{strategy}: {told}"


def table(a: Contender, b: Contender, found: Summary) -> str:
    """What is printed."""
    lines = [f"A  {described(a)}", f"B  {described(b)}", "", f"{'':{_WIDTH}} {'mean':>9} {'95%':>9}"]
    lines += [
        _row("T3: divergence of A from B, nats a token", *found.divergence, digits=5),
        _row("T3: the same first choice, share of tokens", found.agreement, digits=4),
        _row("vocoder: A's mel from B's, dB", *found.mel_db),
        _row("speaker: A's sound and B's, cosine", found.a_to_b),
        _row("speaker: A's sound and the voice, cosine", found.a_to_voice),
        _row("speaker: B's sound and the voice, cosine", found.b_to_voice),
    ]
    if found.wrong_b is not None:
        lines += [
            _row("words not understood, A, share", found.wrong_a),
            _row("words not understood, B, share", found.wrong_b),
        ]
    return "\n".join(lines)


def _row(name: str, *values: float | None, digits: int = 3) -> str:
    cells = ["-" if value is None else f"{value:.{digits}f}" for value in values]
    return f"{name:{_WIDTH}} " + " ".join(f"{cell:>9}" for cell in cells)


def as_json(
    arguments: Mapping[str, Any], a: Contender, b: Contender, found: Summary, texts: Sequence[OfText], *, is_demo: bool
) -> dict[str, Any]:
    """Everything: the arguments, both policies, the summary and each text."""
    return {
        "arguments": arguments,
        "random_weights": is_demo,
        "a": _told(a),
        "b": _told(b),
        "summary": asdict(found),
        "texts": [asdict(each) for each in texts],
    }


def _told(of: Contender) -> dict[str, str]:
    return {"checkpoint": str(of.checkpoint.folder), **of.policy.methods}


def plot(path: Path, a: Contender, b: Contender, texts: Sequence[OfText], *, is_demo: bool) -> None:
    """How many tokens diverge how far; the vocoder's distance and the speakers, by text.

    ``bench.report.check_plot`` first.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    figure = wide_figure(f"A: {described(a)}. B: {described(b)}." + (" Random weights." if is_demo else ""))
    nats, mels, speakers = figure.subplots(1, 3)
    nats.hist([value for each in texts for value in each.divergence], bins=50, log=True)
    nats.set(xlabel="divergence of A from B, nats", ylabel="tokens")
    numbers = range(1, len(texts) + 1)
    mels.bar(numbers, [each.mel_db for each in texts])
    mels.set(xlabel="text", ylabel="A's mel from B's, dB")
    # Marks that are seen through each other: often two of a text are in one place.
    for name, label, mark in (
        ("a_to_b", "A, B", "o"),
        ("a_to_voice", "A, voice", "x"),
        ("b_to_voice", "B, voice", "+"),
    ):
        known = [(number, getattr(each, name)) for number, each in zip(numbers, texts, strict=True)]
        drawn = [pair for pair in known if pair[1] is not None]
        speakers.plot([number for number, _ in drawn], [value for _, value in drawn], mark, label=label)
    speakers.set(xlabel="text", ylabel="similarity of speakers, cosine")
    speakers.legend()
    for panel in (mels, speakers):
        panel.xaxis.get_major_locator().set_params(integer=True)
    save(figure, path)
