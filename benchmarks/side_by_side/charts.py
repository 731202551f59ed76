"""The report's pictures, as SVG whose colours are CSS variables, so that one picture serves light and dark.

Each colour has one meaning in all of them: black is the method that the others are compared with, blue is better,
orange is worse, and grey is a difference that isn't shown.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .analysis import Analysis
from .label_places import find_places
from .rows import Row

# What is drawn in each of these colours follows the page's variable; on its own, a picture is light.
INK, MUTED, GRID = "#1b1f24", "#6b7280", "#d5d9df"
BETTER, WORSE, PAPER = "#1f5fa8", "#c8501e", "#ffffff"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", BETTER: "better", WORSE: "worse", PAPER: "paper"}

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "layersample",  # the same picture, the same bytes
    "font.size": 11,
    "text.parse_math": False,  # a row's name may hold dollars
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
_HOVER = "hover:"


def color_of(row: Row, analysis: Analysis) -> str:
    """The colour of a method, by what was found of it."""
    if row.name == analysis.suite.reference:
        return INK
    verdict = row.difference.verdict if row.difference else ""
    return {"lower": BETTER, "higher": WORSE}.get(verdict, MUTED)


def differences(analysis: Analysis) -> str:
    """Each method's difference in held-out loss to the baseline, with its interval; ``""`` where there is none."""
    rows = [row for row in analysis.rows if row.difference is not None]
    if not rows:
        return ""
    rows.sort(key=lambda row: row.difference.mean if row.difference else 0.0)

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=INK, linewidth=1)
        for place, row in enumerate(reversed(rows)):
            difference = row.difference
            assert difference is not None
            color = color_of(row, analysis)
            if difference.low is not None and difference.high is not None:
                axes.plot([difference.low, difference.high], [place, place], color=color, linewidth=2)
            (point,) = axes.plot(difference.mean, place, "o", color=color, markersize=6)
            _name(point, row.name, f"{row.name}: {difference.mean:+.3f} nats")
        axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_xlabel("difference in held-out loss (nats a token)")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="x", linewidth=0.6)
        _zoom(axes, [row.difference.mean for row in rows if row.difference])

    return _svg(draw, (_NARROW, 0.9 + 0.3 * max(3, len(rows))), "Differences to the baseline")


def memory_and_loss(analysis: Analysis) -> str:
    """Peak memory against held-out loss, with the Pareto front."""
    points = {row.name: row.memory_bytes / 2**20 for row in analysis.finished if row.memory_bytes is not None}
    return _against(analysis, points, analysis.front, "peak memory (MiB)", "MiB", "Memory against loss")


def time_and_loss(analysis: Analysis) -> str:
    """Seconds of training against held-out loss, with the Pareto front; ``""`` where they are of several machines."""
    if not analysis.seconds_compare:
        return ""
    points = {
        row.name: seconds
        for row in analysis.finished
        if (seconds := row.training_seconds(analysis.clock)) is not None
    }
    label = f"{'CPU' if analysis.clock == 'cpu' else 'wall'} seconds of training"
    return _against(analysis, points, analysis.fast_front, label, "s", "Time against loss")


def _against(
    analysis: Analysis, costs: dict[str, float], front: Sequence[str], label: str, unit: str, title: str
) -> str:
    losses = {
        row.name: row.standing for row in analysis.finished if row.standing is not None and not row.failed
    }
    rows = [row for row in analysis.finished if row.name in costs and row.name in losses]
    points = {row.name: (costs[row.name], losses[row.name]) for row in rows}
    if not points:
        return ""
    means = {row.name: row.loss.mean for row in rows if row.loss is not None}
    ranked = any(abs(means[name] - loss) > 1e-9 for name, (_, loss) in points.items())
    by = f", by the seeds shared with {analysis.suite.reference}" if ranked else ""

    def draw(axes: Axes) -> None:
        axes.step(*_columns([points[name] for name in front if name in points]), where="post", color=GRID)
        for row in rows:
            x, y = points[row.name]
            mark = "D" if row.name == analysis.suite.reference else "o"
            size = 7 if row.name in front else 5
            (point,) = axes.plot(x, y, mark, color=color_of(row, analysis), markersize=size)
            _name(point, row.name, f"{row.name}: {means[row.name]:.3f} nats, {x:,.0f} {unit}")
        axes.set(xlabel=label, ylabel=f"held-out loss (nats a token{by})")
        axes.margins(0.14)
        axes.grid(linewidth=0.6)
        # What can't be labelled without an overlap has its name on hover and its number in the table.
        urgent = sorted(rows, key=lambda row: row.name not in (*front, analysis.suite.reference))
        _label(axes, [(row.name, *points[row.name], color_of(row, analysis)) for row in urgent])

    return _svg(draw, (_NARROW, 3.9), title)


def _label(axes: Axes, wanted: Sequence[tuple[str, float, float, str]]) -> None:
    """Write names beside points, where there is room."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    width, height = (inches * 72 for inches in figure.get_size_inches())
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    # Axis labels and ticks take about a sixth of the picture; places are in points.
    scale = (0.84 * width / (right - left), 0.82 * height / (top - bottom))
    points = [((x - left) * scale[0], (y - bottom) * scale[1]) for _, x, y, _ in wanted]
    room = (0.84 * width, 0.82 * height)
    places = find_places([name for name, *_ in wanted], points, room, size=9)
    for (name, x, y, color), place in zip(wanted, places, strict=True):
        if place is not None:
            axes.annotate(name, (x, y), xytext=place, textcoords="offset points", color=color, fontsize=9)


def all_curves(analysis: Analysis) -> str:
    """The held-out loss of every method along the run; the page names a line that is pointed at.

    Nothing, where it was measured at the end alone.
    """
    if not any(map(_has_curve, analysis.finished)):
        return ""
    by_time = analysis.suite.matches_time and analysis.seconds_compare

    def draw(axes: Axes) -> None:
        for row in reversed(analysis.finished):
            is_baseline = row.name == analysis.suite.reference
            points = [
                (row.seconds_at(step, analysis.clock) if by_time else step, e.mean) for step, e in row.curve
            ]
            (line,) = axes.plot(
                *_columns(points),
                color=color_of(row, analysis),
                linewidth=2.0 if is_baseline else 1.2,
                alpha=1.0 if is_baseline or row.name in analysis.front else 0.6,
            )
            last = row.loss.mean if row.loss else float("nan")
            _name(line, row.name, f"{row.name}: {last:.3f} at the end")
        _finish_curve(axes)
        if by_time:
            axes.set(xlabel="CPU seconds" if analysis.clock == "cpu" else "wall seconds")

    return _svg(draw, (_NARROW, 3.9), "Held-out loss of every method")


def curve(row: Row, baseline: Row | None, color: str = BETTER) -> str:
    """A method's held-out loss along the run, beside the baseline's; nothing, where it was measured once."""
    if not _has_curve(row):
        return ""

    def draw(axes: Axes) -> None:
        if baseline is not None and baseline is not row:
            draw_curve(axes, baseline, INK, baseline.name)
        draw_curve(axes, row, color, row.name)
        _finish_curve(axes)
        axes.legend(frameon=False, fontsize=10, labelcolor=INK)

    return _svg(draw, (_SMALL, 2.5), f"Held-out loss of {row.name}")


def _has_curve(row: Row) -> bool:
    return len(row.curve) > 1


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
                range(len(chances)), chances, where="mid", color=INK, linewidth=1.6, label="probability"
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
        axes.broken_barh(spans, (index - 0.5, 1), color=MUTED, linewidth=0)
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


def _name(artist: Artist, name: str, text: str) -> None:
    """Name what is drawn: the page shows the text where it is pointed at."""
    artist.set_gid(f"{_HOVER}{name}|{text}")


def _svg(draw: Callable[[Axes], None], size: tuple[float, float], title: str) -> str:
    """Draw a figure with one pair of axes, and give its SVG element, ready to be put into a page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<(metadata|style).*?</\1>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(rf'<g id="{_HOVER}([^"|]*)\|([^"]*)">', r'<g data-name="\1"><title>\2</title>', text)
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
