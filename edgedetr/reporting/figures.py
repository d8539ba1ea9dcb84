"""Figures as inline SVG that takes the page's own text color, so that it reads on light and on dark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from edgedetr.printable import one_line
from edgedetr.reporting.tables import is_reference

# Stand-ins in the SVG, replaced by CSS that follows the page's colors.
INK, FAINT = "#010203", "#040506"
# Okabe and Ito 2008: told apart with every common color blindness.
COLORS = ("#0072b2", "#009e73", "#d55e00", "#cc79a7", "#e69f00", "#56b4e9")
GOOD, BAD, DOUBT = "#009e73", "#d55e00", "#e69f00"

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


def drops(rows: Sequence[Mapping[str, Any]], budget: float) -> str:
    """Each stage's drop with its one-sided bound, against the budget. rows: the verdict's stages."""
    rows = [row for row in rows if not is_reference(row)]
    with matplotlib.rc_context(_style("drops")):
        figure, axes = _axes(6.2, 1.0 + 0.42 * max(len(rows), 1))
        for place, row in enumerate(reversed(rows)):
            color = GOOD if row["passed"] else DOUBT if row["drop"] <= budget else BAD
            upper = row["drop"] if row.get("drop_upper95") is None else row["drop_upper95"]
            axes.plot([row["drop"], upper], [place, place], color=color, linewidth=3, solid_capstyle="butt")
            axes.plot([upper, upper], [place - 0.18, place + 0.18], color=color, linewidth=2)
            axes.plot(row["drop"], place, "o", color=color, markersize=8)
        axes.axvline(budget, color=BAD, linewidth=1.4, linestyle="--")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.text(budget, len(rows) - 0.42, f" budget {budget:g}", color=BAD, va="bottom", ha="left")
        axes.set_yticks(range(len(rows)), [f"{row['name']} ({row['backend']})" for row in reversed(rows)])
        axes.set_ylim(-0.6, len(rows) - 0.2)
        low, high = axes.get_xlim()
        axes.set_xlim(low, max(high, budget + 0.22 * (max(high, budget) - low)))
        axes.set_xlabel("AP points lost against PyTorch: point, and upper 95 % bound")
        axes.grid(visible=False, axis="y")
        return _svg(figure, "AP points lost by each stage, with the budget")


def latency(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Latency against AP, one point for each stage that was timed; None when none was."""
    # Numbered before the untimed ones go, so that a stage has one color on the whole page.
    timed = [(n, row) for n, row in enumerate(rows) if row.get("p50_ms") is not None and row.get("ap") is not None]
    if not timed:
        return None
    with matplotlib.rc_context(_style("latency")):
        figure, axes = _axes(6.2, 3.4)
        for place, row in timed:
            color = COLORS[place % len(COLORS)]
            if row.get("p99_ms") is not None:
                axes.plot([row["p50_ms"], row["p99_ms"]], [row["ap"]] * 2, color=color, linewidth=1.6, alpha=0.6)
            label = f"{row['name']} ({row['backend']})"
            axes.plot(row["p50_ms"], row["ap"], "o", color=color, markersize=9, label=label)
        values = [row["ap"] for _, row in timed]
        pad = max(0.5, 0.6 * (max(values) - min(values)))
        axes.set_ylim(min(values) - pad, max(values) + pad)
        axes.set_xlim(left=0)
        axes.set_xlabel("latency of one image, ms: median, line to p99")
        axes.set_ylabel("AP, points")
        figure.legend(loc="outside lower center", ncols=2, handletextpad=0.3)
        return _svg(figure, "Latency against AP of each stage")


def class_drops(names: Sequence[str], losses: Mapping[str, Sequence[float | None]], most: int = 20) -> str | None:
    """AP points each class loses, one bar for each stage; the `most` classes with the largest change.

    losses  stage label -> points lost per class, in the order of `names`; None where a class has no ground truth
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
            place = np.arange(len(order)) + (index - (len(losses) - 1) / 2) * height
            axes.barh(place, shown, height * 0.88, color=COLORS[(index + 1) % len(COLORS)], label=label)
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
        for place, (label, (loose, tight)) in enumerate(curves.items()):
            color = COLORS[place % len(COLORS)]
            width = 2.6 if place == 0 else 1.4
            axes.plot(recall, loose, color=color, linewidth=width, label=label)
            axes.plot(recall, tight, color=color, linewidth=width, linestyle=(0, (4, 2)))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall (full line: IoU 0.50, dashed: IoU 0.75)")
        axes.set_ylabel("precision, mean over classes")
        figure.legend(loc="outside lower center", ncols=2)
        return _svg(figure, "Precision over recall of each stage")


def _style(salt: str) -> Any:
    """Settings of one figure; `salt` keeps the ids of its parts apart from those of the other figures on the page."""
    return {**_STYLE, "svg.hashsalt": salt}


def _axes(width: float, height: float) -> tuple[Figure, Any]:
    """A figure of its own: no global state of pyplot, so nothing depends on a display."""
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
