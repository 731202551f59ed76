"""The report's pictures, as SVG whose colours are CSS variables, so that one picture serves light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .analysis import Analysis, Row

# What is drawn in each of these colours follows the page's variable; on its own, a picture is light.
INK, MUTED, GRID = "#1b1f24", "#6b7280", "#d5d9df"
ACCENT, SECOND, PAPER = "#1f5fa8", "#c8501e", "#ffffff"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SECOND: "second", PAPER: "paper"}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layersample",  # the same picture, the same bytes
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
_NARROW, _SMALL = 5.0, 3.6  # inches: readable when a phone shows the picture at its own width


def differences(analysis: Analysis) -> str:
    """Each method's difference in held-out loss to the baseline, with its interval."""
    rows = [row for row in analysis.rows if row.difference is not None]
    rows.sort(key=lambda row: row.difference.mean if row.difference else 0.0)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=MUTED, linewidth=1)
        for place, row in enumerate(reversed(rows)):
            difference = row.difference
            assert difference is not None
            called = difference.verdict in ("lower", "higher")
            color = ACCENT if difference.verdict == "lower" else SECOND if called else MUTED
            if difference.low is not None and difference.high is not None:
                axes.plot([difference.low, difference.high], [place, place], color=color, linewidth=2)
            axes.plot(difference.mean, place, "o", color=color, markersize=6)
        axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("difference in held-out loss (nats a token)")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="x", linewidth=0.6)
        _zoom(axes, [row.difference.mean for row in rows if row.difference])

    return _svg(draw, (_NARROW, 0.9 + 0.3 * max(3, len(rows))), "Differences to the baseline")


def memory_and_loss(analysis: Analysis) -> str:
    """Peak memory against held-out loss, with the Pareto front."""
    points = {
        row.name: (row.memory_bytes / 2**20, row.loss.mean)
        for row in analysis.finished
        if row.memory_bytes is not None and row.loss is not None
    }
    front = [points[name] for name in analysis.front]

    def draw(axes: Axes) -> None:
        axes.step(*_columns(front), where="post", color=ACCENT, linewidth=1.2, alpha=0.6)
        names = [row.name for row in analysis.finished]
        for name, (x, y) in points.items():
            best = name in analysis.front
            color = SECOND if name == analysis.suite.reference else ACCENT if best else MUTED
            axes.plot(x, y, "o", color=color, markersize=7 if best else 5)
            label = f"{name}" if best or name == analysis.suite.reference else str(names.index(name) + 1)
            # Neighbours on the front may be close: above and below in turns.
            below = best and analysis.front.index(name) % 2
            place = (5, -11 if below else 4)
            axes.annotate(label, (x, y), xytext=place, textcoords="offset points", color=color, fontsize=9)
        axes.set(xlabel="peak memory (MiB)", ylabel="held-out loss (nats a token)")
        axes.margins(0.14)
        axes.grid(linewidth=0.6)

    return _svg(draw, (_NARROW, 3.9), "Memory against loss")


def all_curves(analysis: Analysis) -> str:
    """The held-out loss of every method along the run; the baseline and the Pareto front stand out."""

    def draw(axes: Axes) -> None:
        for row in analysis.finished:
            if row.name == analysis.suite.reference:
                draw_curve(axes, row, SECOND, row.name)
            elif row.name in analysis.front:
                draw_curve(axes, row, ACCENT, row.name)
            else:
                steps, losses = _columns([(step, e.mean) for step, e in row.curve])
                axes.plot(steps, losses, color=MUTED, linewidth=0.8, alpha=0.6)
        _finish_curve(axes)

    return _svg(draw, (_NARROW, 3.9), "Held-out loss of every method")


def curve(row: Row, baseline: Row | None) -> str:
    """A method's held-out loss along the run, beside the baseline's."""

    def draw(axes: Axes) -> None:
        if baseline is not None and baseline is not row:
            draw_curve(axes, baseline, SECOND, baseline.name)
        draw_curve(axes, row, ACCENT, row.name)
        _finish_curve(axes)
        axes.legend(frameon=False, fontsize=10, labelcolor=INK)

    return _svg(draw, (_SMALL, 2.5), f"Held-out loss of {row.name}")


def layers(row: Row) -> str:
    """Which layers trained at which step, with the first seed."""
    return _svg(lambda axes: draw_layers(axes, row), (_SMALL, 2.5), f"Layers that trained: {row.name}")


def probabilities(row: Row) -> str:
    """Each layer's chance to train, computed, beside its share of the steps in these runs."""

    def draw(axes: Axes) -> None:
        shares, chances = row.shares, row.probabilities
        axes.bar(range(len(shares)), shares, width=0.8, color=GRID, label="share of steps")
        if chances is not None:
            axes.step(
                range(len(chances)), chances, where="mid", color=ACCENT, linewidth=1.6, label="probability"
            )
        axes.set(xlabel="layer", ylabel="chance to train")
        axes.set_ylim(0, max([*shares, *(chances or [])], default=1) * 1.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9, ncols=2, labelcolor=INK, loc="upper left")

    return _svg(draw, (_SMALL, 2.2), f"Chance of each layer to train: {row.name}")


def draw_curve(axes: Axes, row: Row, color: str, label: str) -> None:
    """Draw a method's mean loss with its band."""
    steps = [step for step, _ in row.curve]
    means = [e.mean for _, e in row.curve]
    axes.plot(steps, means, color=color, linewidth=1.6, label=label)
    if all(e.half_width is not None for _, e in row.curve):
        # A wide interval of few seeds must not flatten the curves: the axis follows the means.
        low = [e.mean - (e.half_width or 0) for _, e in row.curve]
        high = [e.mean + (e.half_width or 0) for _, e in row.curve]
        axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)


def draw_layers(axes: Axes, row: Row) -> None:
    """Draw the layers that trained at each step of the first seed."""
    run = row.runs[0]
    for index in range(len(run["layers"])):
        spans = [(first - 0.5, last - first + 1) for first, last, active in run["active"] if index in active]
        axes.broken_barh(spans, (index - 0.5, 1), color=ACCENT, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel="layer")
    axes.set_xlim(0.5, len(run["training_loss"]) + 0.5)
    axes.set_ylim(-0.5, len(run["layers"]) - 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _finish_curve(axes: Axes) -> None:
    means = [float(y) for line in axes.get_lines() for y in line.get_ydata()]  # type: ignore[union-attr,arg-type]
    if means:
        margin = 0.08 * (max(means) - min(means) or 1)
        axes.set_ylim(min(means) - margin, max(means) + margin)
    axes.set(xlabel="optimizer step", ylabel="held-out loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.grid(linewidth=0.6)


def _zoom(axes: Axes, means: Sequence[float]) -> None:
    """Show all means; an interval of few seeds that is many times as wide runs out of the picture."""
    low, high = min([0.0, *means]), max([0.0, *means])
    room = 3 * (high - low or 1)
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, low - room), min(right, high + room))


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], title: str) -> str:
    """Draw a figure with one pair of axes, and give its SVG element, ready to be put into a page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    used = set(re.findall(r'#([^")]+)[")]', text))  # a page has many pictures, and each id only once
    text = re.sub(r' id="([^"]*)"', lambda found: found.group() if found.group(1) in used else "", text)
    opening = f'<svg role="img" aria-label="{html.escape(title)}"'
    return re.sub(
        r'<svg((?:(?!width=|height=)[^>])*?)(?: (?:width|height)="[^"]*")+', rf"{opening}\1", text, count=1
    )


def themed(svg: str) -> str:
    """The picture with the page's colours."""
    return re.sub(
        "|".join(VARIABLES), lambda found: f"var(--{VARIABLES[found.group()]})", svg, flags=re.IGNORECASE
    )
