"""What a level of load came to: as a row, as JSON, as a plot."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from chatterbox_vllm.bench.client import Answer
from chatterbox_vllm.bench.observers import ServerView
from chatterbox_vllm.errors import ConfigurationError, MissingDependency
from chatterbox_vllm.files import write_whole

PLOTS: Final = (".png", ".svg", ".pdf")
_LABEL_SHARE: Final = 0.1
"""Of a plot's axis, for one number."""


@dataclass(frozen=True)
class Level:
    """One level of load. Times are milliseconds, and None where no request succeeded or nobody could tell.

    Args:
        load: concurrent clients, or requests a second.
        ok, failed: requests.
        reasons: failure -> requests.
        seconds: from the first request to the last answer's end.
        first_byte_p50: first sample.
        first_audio_p50, first_audio_p95, first_audio_p99: first sample that is not zero.
        rtf_p50, rtf_p95: seconds from request to end for each second of sound.
        underruns: answers in which a player that starts at the first sample runs dry.
        worst_gap, worst_dry: the longest single silence, and the most silence in one answer.
        audio_rate: seconds of sound a second, of all clients together.
        audio_seconds: mean length of an answer.
        gpu_busy: NVML's utilisation, 0 to 1.
        server: what the server's own counters say.
        client_lag: how late this program's own event loop was at worst.
    """

    load: float
    ok: int
    failed: int
    reasons: dict[str, int]
    seconds: float
    first_byte_p50: float | None
    first_audio_p50: float | None
    first_audio_p95: float | None
    first_audio_p99: float | None
    rtf_p50: float | None
    rtf_p95: float | None
    underruns: int
    worst_gap: float
    worst_dry: float
    audio_rate: float
    audio_seconds: float
    gpu_busy: float | None
    server: ServerView | None
    client_lag: float

    @property
    def holds(self) -> bool:
        """Everybody was answered and nobody heard a gap."""
        return self.ok > 0 and self.failed == 0 and self.underruns == 0


def summary(
    load: float, answers: Sequence[Answer], *, gpu_busy: float | None, server: ServerView | None, client_lag: float
) -> Level:
    """The figures of a level; ``client_lag`` in seconds."""
    good = [each for each in answers if each.failure is None]
    played = [each.playback for each in good if each.playback is not None]
    seconds = max(each.ended for each in answers) - min(each.sent for each in answers)
    audio = sum(each.audio_seconds for each in good)
    first = [1000 * each.first_audible for each in good]
    rtfs = [each.rtf for each in good]
    return Level(
        load=load,
        ok=len(good),
        failed=len(answers) - len(good),
        reasons=dict(Counter(each.failure for each in answers if each.failure is not None)),
        seconds=seconds,
        first_byte_p50=_percentile([1000 * each.first_byte for each in good], 50),
        first_audio_p50=_percentile(first, 50),
        first_audio_p95=_percentile(first, 95),
        first_audio_p99=_percentile(first, 99),
        rtf_p50=_percentile(rtfs, 50),
        rtf_p95=_percentile(rtfs, 95),
        underruns=sum(each.ran_dry for each in played),
        worst_gap=1000 * max((each.worst_gap for each in played), default=0.0),
        worst_dry=1000 * max((each.dry_seconds for each in played), default=0.0),
        audio_rate=audio / seconds,
        audio_seconds=audio / max(1, len(good)),
        gpu_busy=gpu_busy,
        server=server,
        client_lag=1000 * client_lag,
    )


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


_COLUMNS: Final = (
    *("load", "ok", "fail", "byte p50", "first p50", "p95", "p99 ms", "RTF p50", "p95", "underruns", "gap ms"),
    *("audio s/s", "GPU %", "wait ms", "batch", "voc %", "lag ms"),
)


def heading() -> str:
    """The table's first line. ``wait``, ``batch`` and ``voc`` are the vocoder's, by the server's counters."""
    return " ".join(f"{column:>9}" for column in _COLUMNS)


def row(level: Level) -> str:
    """The table's line of a level, and under it the failures."""
    cells = [
        f"{level.load:g}",
        str(level.ok),
        str(level.failed),
        _cell(level.first_byte_p50),
        _cell(level.first_audio_p50),
        _cell(level.first_audio_p95),
        _cell(level.first_audio_p99),
        _cell(level.rtf_p50, 3),
        _cell(level.rtf_p95, 3),
        str(level.underruns),
        _cell(level.worst_gap),
        _cell(level.audio_rate, 1),
        _cell(None if level.gpu_busy is None else 100 * level.gpu_busy),
        *_server_cells(level.server),
        _cell(level.client_lag, 1),
    ]
    line = " ".join(f"{cell:>9}" for cell in cells)
    told = ", ".join(f"{count} x {reason}" for reason, count in sorted(level.reasons.items()))
    return f"{line}\n{'':>9} failed: {told}" if told else line


def _server_cells(server: ServerView | None) -> list[str]:
    if server is None:
        return ["-", "-", "-"]
    return [_cell(server.vocoder_wait_ms, 1), _cell(server.vocoder_batch, 1), _cell(100 * server.vocoder_busy)]


def _cell(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def as_json(level: Level, answers: Sequence[Answer]) -> dict[str, Any]:
    """A level with each of its requests; their times in seconds, ``sent`` from the level's start."""
    began = min(each.sent for each in answers)
    requests = [
        {
            "sent": each.sent - began,
            "failure": each.failure,
            "total": each.total,
            "first_byte": each.first_byte,
            "first_audible": each.first_audible,
            "audio_seconds": each.audio_seconds,
            "dry_seconds": each.playback.dry_seconds if each.playback else 0.0,
            "worst_gap": each.playback.worst_gap if each.playback else 0.0,
        }
        for each in answers
    ]
    return {**asdict(level), "requests": requests}


def check_plot(path: Path) -> None:
    """Raises before anything is measured what ``plot`` would raise after it.

    Raises:
        ConfigurationError: the name's ending is none that can be drawn.
        MissingDependency: matplotlib is not installed.
    """
    if path.suffix not in PLOTS:
        raise ConfigurationError(f"--plot must end in {', '.join(PLOTS)}, not {path.name!r}", param="plot")
    _matplotlib()


def _matplotlib() -> Any:
    try:
        return import_module("matplotlib.figure")  # the extra `bench` brings it
    except ImportError as error:
        command = "pip install matplotlib"
        raise MissingDependency("matplotlib", purpose="for --plot", command=command) from error


def save(figure: Any, path: Path) -> None:
    """Draws the whole file or none of it; ``check_plot`` first.

    Raises:
        ConfigurationError: it cannot be written.
    """
    drawing = io.BytesIO()
    figure.savefig(drawing, format=path.suffix.removeprefix("."))
    write_whole(path, drawing.getvalue(), "--plot")


def wide_figure(title: str) -> Any:
    """A ``matplotlib.figure.Figure`` for three panels side by side.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    figure = _matplotlib().Figure(figsize=(12, 3.6), layout="constrained")
    figure.suptitle(title)
    return figure


def tick_labels(loads: Sequence[float]) -> list[str]:
    """Labels of ascending ``loads`` on a logarithmic axis: none where the next label would cover it."""
    labels, next_one = list[str](), math.inf
    for load in reversed(loads):
        is_apart = next_one / load >= (loads[-1] / loads[0]) ** _LABEL_SHARE
        next_one = load if is_apart else next_one
        labels.append(f"{load:g}" if is_apart else "")
    return labels[::-1]


def plot(path: Path, levels: Sequence[Level], *, title: str, axis: str) -> None:
    """First audio, throughput and underruns over the load."""
    figure = wide_figure(title)
    first, rate, gaps = figure.subplots(1, 3)
    drawn = sorted((level for level in levels if level.ok), key=lambda level: level.load)
    loads = [level.load for level in drawn]
    for name, label in (("p50", "median"), ("p95", "95%"), ("p99", "99%")):
        first.plot(loads, [getattr(level, f"first_audio_{name}") for level in drawn], "o-", label=label)
    first.legend()
    rate.plot(loads, [level.audio_rate for level in drawn], "o-")
    gaps.plot(loads, [100 * level.underruns / level.ok for level in drawn], "o-")
    panels = ((first, "first audio, ms"), (rate, "seconds of sound a second"), (gaps, "answers that ran dry, %"))
    for panel, label in panels:
        panel.set(xlabel=axis, ylabel=label, xscale="log", ylim=(0, None))
        panel.set_xticks(loads, tick_labels(loads))
        panel.minorticks_off()  # a logarithmic axis labels them
        panel.grid(visible=True, alpha=0.3)
    gaps.set_ylim(0, 100)
    save(figure, path)
