"""Figures as inline SVG in the text color of the page, so that they are readable on light and on dark pages."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from edgedetr.evaluation.verdict import ArtifactVerdict, Verdict
from edgedetr.printable import one_line
from edgedetr.quantization.search.search_report import SearchReport
from edgedetr.quantization.sensitivity import Sensitive

# Placeholder colors in the SVG, replaced by CSS colors of the page.
INK, FAINT = "#010203", "#040506"
# Okabe and Ito 2008: distinguishable with every common color blindness.
COLORS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")
GOOD, BAD, DOUBT, SOFT = "#009e73", "#d55e00", "#e69f00", "#8a939f"

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable
    "font.family": "sans-serif",
    "font.size": 10.5,
    "text.parse_math": False,  # a class may be called "$x"
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def drops(verdict: Verdict) -> str:
    """The drop of each artifact with its one-sided bound, and the tolerance."""
    tolerance = verdict.tolerance
    rows = [artifact for artifact in reversed(verdict.artifacts) if not artifact.is_reference]
    with matplotlib.rc_context(_style("drops")):
        figure, axes = _axes(6.2, 1.0 + 0.42 * max(len(rows), 1))
        for y, row in enumerate(rows):
            color = GOOD if row.passed else DOUBT if row.drop <= tolerance else BAD
            upper = row.drop_upper95
            axes.plot([row.drop, upper], [y, y], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot([upper, upper], [y - 0.18, y + 0.18], color=color, linewidth=2)
            axes.plot(row.drop, y, "o", color=color, markersize=8)
        axes.axvline(tolerance, color=BAD, linewidth=1.4, linestyle="--")
        axes.axvline(0, color=INK, linewidth=0.8)
        label = {"color": BAD, "va": "bottom", "ha": "left", "xytext": (4, 0), "textcoords": "offset points"}
        axes.annotate(f"tolerance {tolerance:g}", (tolerance, len(rows) - 0.42), **label)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.2)
        low, high = axes.get_xlim()
        axes.set_xlim(low, max(high, tolerance + 0.25 * (max(high, tolerance) - low)))
        axes.set_xlabel("AP points lost: measured, and upper 95 % bound")
        axes.grid(visible=False, axis="y")
        return _svg(figure, "AP points lost by each artifact, with the tolerance")


def latency(artifacts: Sequence[ArtifactVerdict]) -> str | None:
    """Latency against AP, one point for each artifact that was timed; None where none was."""
    # Numbered before the untimed ones are removed, so that an artifact has one color on the whole page.
    timed = [(n, artifact) for n, artifact in enumerate(artifacts) if artifact.p50_ms is not None]
    if not timed:
        return None
    with matplotlib.rc_context(_style("latency")):
        figure, axes = _axes(6.2, 3.4)
        for number, artifact in timed:
            color = COLORS[number % len(COLORS)]
            if artifact.p99_ms is not None:
                span = [artifact.p50_ms, artifact.p99_ms]
                axes.plot(span, [artifact.ap] * 2, color=color, linewidth=1.6, alpha=0.6)
            axes.plot(artifact.p50_ms, artifact.ap, "o", color=color, markersize=9, label=artifact.label)
        values = [artifact.ap for _, artifact in timed]
        pad = max(0.5, 0.6 * (max(values) - min(values)))
        axes.set_ylim(min(values) - pad, max(values) + pad)
        axes.set_xlim(left=0)
        axes.set_xlabel("latency of one image, ms: median, line to p99")
        axes.set_ylabel("AP, points")
        figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)
        return _svg(figure, "Latency against AP of each artifact")


def class_drops(names: Sequence[str], losses: Mapping[str, Sequence[float | None]], most: int = 20) -> str | None:
    """AP points that each class loses, one bar for each artifact; the `most` classes with the largest change.

    losses  artifact label -> points lost per class, in the order of `names`; None where a class has no ground truth
    """
    order = [n for n in range(len(names)) if any(values[n] is not None for values in losses.values())]
    order.sort(key=lambda n: -max(abs(values[n] or 0.0) for values in losses.values()))
    order = order[:most]
    if not order or not losses:
        return None
    with matplotlib.rc_context(_style("classes")):
        figure, axes = _axes(6.2, 1.2 + (0.13 * len(losses) + 0.14) * len(order))
        height = 0.8 / len(losses)
        for index, (label, values) in enumerate(losses.items()):
            shown = [values[n] if values[n] is not None else 0.0 for n in order]
            y = np.arange(len(order)) + (index - (len(losses) - 1) / 2) * height
            axes.barh(y, shown, height * 0.88, color=COLORS[(index + 1) % len(COLORS)], label=label)
        axes.set_yticks(range(len(order)), [_short(names[n]) for n in order])
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("AP points lost against PyTorch (left of 0: gained)")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "AP points lost by each class")


def precision_recall(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], recall: np.ndarray) -> str:
    """Mean precision over recall at IoU 0.50 (full lines) and 0.75 (dashed). curves: label -> the two, [101] each."""
    with matplotlib.rc_context(_style("precision")):
        figure, axes = _axes(6.2, 3.9)
        for number, (label, (loose, tight)) in enumerate(curves.items()):
            color = COLORS[number % len(COLORS)]
            width = 2.6 if number == 0 else 1.4
            axes.plot(recall, loose, color=color, linewidth=width, label=label)
            axes.plot(recall, tight, color=color, linewidth=width, linestyle=(0, (4, 2)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall (full line: IoU 0.50, dashed: IoU 0.75)")
        axes.set_ylabel("precision, mean over classes")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "Precision over recall of each artifact")


def sensitivity_bars(rows: Sequence[Sensitive], most: int = 40) -> str:
    """What INT8 in one group of layers alone does, a bar each, colored by the layers' role; the `most` first rows."""
    shown = rows[:most]
    roles = sorted({row.role for row in shown})  # layers without a role, the backbone and the encoder, come first
    with matplotlib.rc_context(_style("sensitivity")):
        figure, axes = _axes(6.2, 1.4 + 0.2 * len(shown))
        for number, role in enumerate(roles):
            places = [y for y, row in enumerate(shown) if row.role == role]
            bars = [shown[y] for y in places]
            axes.barh(
                places,
                [row.distance for row in bars],
                0.7,
                xerr=[row.error for row in bars],
                color=COLORS[number % len(COLORS)],
                error_kw={"ecolor": INK, "elinewidth": 0.8},
                label=role or "backbone, encoder",
            )
        axes.set_yticks(range(len(shown)), [_short(_end_of(row.name)) for row in shown], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.set_xlabel("distance from the float detections, ± standard error")
        axes.grid(visible=False, axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "What INT8 in each group of layers alone does to the detections")


def search_candidates(report: SearchReport) -> str | None:
    """Latency against AP lost, one point for each placement that a search compared; None where no latency is known.

    A full point was judged on verify images and has its bound, a hollow one was compared on search images alone.
    """
    timed = [candidate for candidate in report.candidates if candidate.float_ms]
    shown = [candidate for candidate in timed if report.looked_at(candidate) or candidate.search_drop is not None]
    if not shown:
        return None
    with matplotlib.rc_context(_style("search")):
        figure, axes = _axes(6.2, 3.6)
        for candidate in shown:
            color = GOOD if candidate.name == report.accepted else INK if candidate.faster else SOFT
            ratio = candidate.int8_ms / candidate.float_ms
            if report.looked_at(candidate):
                look = report.last_look(candidate)
                drop = look.drop
                axes.plot([ratio, ratio], [drop, look.upper], color=color, linewidth=2, solid_capstyle="butt")
                axes.plot(ratio, drop, "o", color=color, markersize=8)
            else:
                drop = candidate.search_drop or 0.0
                axes.plot(ratio, drop, "o", color=color, markersize=7, fillstyle="none")
            offset = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": 8.5}
            axes.annotate(_short(candidate.name), (ratio, drop), **offset)
        axes.axhline(report.budget, color=BAD, linewidth=1.4, linestyle="--")
        label = {"color": BAD, "va": "bottom", "ha": "right", "xycoords": ("axes fraction", "data")}
        axes.annotate(f"budget {report.budget:g}", (1.0, report.budget), **label)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.margins(x=0.12, y=0.1)
        axes.set_xlabel(f"latency on {report.target}, relative to the float graph")
        axes.set_ylabel("AP points lost, line to the bound")
        return _svg(figure, "Latency against AP lost of each placement that the search compared")


def _end_of(name: str, most: int = 28) -> str:
    """The end of a long node name, which tells layers apart: the operator and "/detector/" are left out."""
    words = [word for word in name.split("/") if word and word != "detector"]
    text = "/".join(words[:-1] if len(words) > 2 else words)
    return text if len(text) <= most else "…" + text[1 - most :]


def _style(salt: str) -> Any:
    """Settings of one figure; `salt` makes the ids of its parts unique on the page."""
    return {**_STYLE, "svg.hashsalt": salt}


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure without pyplot, whose global state depends on a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, description: str) -> str:
    """The figure as an <svg> element without fixed size, background or date."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    head, rest = text.split(">", 1)
    box = head[head.index('viewBox="') :].split('"')[1]
    head = (
        f'<svg viewBox="{box}" role="img" aria-label="{description}" xmlns="http://www.w3.org/2000/svg" '
        'xmlns:xlink="http://www.w3.org/1999/xlink"'
    )
    return (head + ">" + rest).replace(INK, "currentColor").replace(FAINT, "var(--faint)")


def _short(name: str, most: int = 28) -> str:
    name = one_line(name[: most + 1])
    shown = name if len(name) <= most else name[: most - 1] + "…"
    return shown.replace("$", r"\$")  # two of them would begin a formula
