"""Pictures: which layers of a run trained when, its loss, the profile of a model, and a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layersample.files import whole_file

_STYLE: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150}
_COLORS = ("#1f5fa8", "#c8501e", "#2f8f4e", "#7a4fa3", "#8a6d1f", "#555555", "#b0558f")
_MARKERS, _DASHES = "osD^", ("-", "--", "-.", ":")


def plot_active_layers(
    path: Path,
    layers: Sequence[str],
    active: Sequence[tuple[int, Sequence[int]]],
    title: str,
    *,
    unit: str = "layer",
) -> None:
    """Draw the layers that trained at each step.

    Args:
        path: The PNG to write.
        layers: Names of the layers, from the input to the output.
        active: Pairs of an optimizer step, from 1, and the indices of the layers that trained in it.
        title: Above the picture.
        unit: What one of them is.
    """
    with matplotlib.rc_context(_STYLE):
        height = min(max(2.0, 0.14 * len(layers)), 14.0)  # hundreds of tensors get thin lines
        figure = Figure(figsize=(8, 0.8 + height), layout="constrained")
        axes = figure.subplots()
        for step, indices in active:
            for index in indices:
                axes.broken_barh([(step - 0.5, 1)], (index - 0.5, 1), color="#1f5fa8", linewidth=0)
        axes.set(xlabel="optimizer step", ylabel=unit, title=title)
        axes.set_xlim(0.5, max((step for step, _ in active), default=1) + 0.5)
        axes.set_ylim(-0.5, len(layers) - 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.3, alpha=0.5)
        _save(figure, path)


def plot_loss(
    path: Path, train: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]], title: str
) -> None:
    """Draw the training loss of each step and the held-out losses.

    Args:
        path: The PNG to write.
        train: Pairs of an optimizer step and the mean loss over its tokens, in nats a token.
        held_out: The same for the held-out data.
        title: Above the picture.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(*_columns(train), color="#1f5fa8", linewidth=1, alpha=0.8, label="training")
        style = "o-" if len(held_out) > 2 else "o"  # a line between two points would say too much
        axes.plot(*_columns(held_out), style, color="#c8501e", linewidth=1.5, label="held out")
        for step, loss in held_out:
            axes.annotate(f"{loss:.3f}", (step, loss), textcoords="offset points", xytext=(0, 8), ha="center")
        axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title=title)
        axes.margins(x=0.05, y=0.15)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(linewidth=0.3, alpha=0.5)
        axes.legend(frameon=False)
        _save(figure, path)


def plot_profile(path: Path, rows: Sequence[Mapping[str, Any]], title: str, *, unit: str = "layer") -> None:
    """Draw what was measured on each layer, and the probability each sampler gives it.

    Args:
        path: The PNG to write.
        rows: Of ``Profile.to_rows``, one a layer. A series without any value is left out, and a panel without
            any series too; the sizes of the layers are drawn where nothing else is left.
        title: Above the picture.
        unit: What a row is of.
    """
    samplers = [key for key in rows[0] if key.startswith("probability:")]
    panels = [
        ("exponent", {"alpha": "alpha", "hill": "Hill"}),
        ("stable rank", {"stable_rank": "stable rank"}),
        ("outliers (%)", {"outlier_percent": "outliers"}),
        ("LoRA ratio", {"lora_ratio": "LoRA ratio"}),
        ("probability", {key: key.partition(":")[2] for key in samplers}),
    ]
    series = [(name, {k: v for k, v in keys.items() if _has(rows, k)}) for name, keys in panels]
    drawn = [(name, keys) for name, keys in series if keys] or [("parameters", {"parameters": "parameters"})]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 0.9 + 1.9 * len(drawn)), layout="constrained")
        all_axes = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, keys) in zip(all_axes, drawn, strict=True):
            for number, (key, label) in enumerate(keys.items()):
                values = [float("nan") if row[key] is None else row[key] for row in rows]
                # Lines that lie on one another stay visible by their markers and dashes.
                style: Any = {"color": _COLORS[number % len(_COLORS)], "marker": _MARKERS[number % 4]}
                axes.plot(range(len(rows)), values, _DASHES[number % 4], **style, ms=4, lw=1.3, label=label)
            axes.set_ylabel(name)
            axes.margins(y=0.15)
            axes.grid(linewidth=0.3, alpha=0.5)
            if len(keys) > 1 or name == "probability":
                axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.97), ncols=4, fontsize=9)
        all_axes[-1].set_ylim(bottom=0)
        all_axes[-1].set_xlabel(unit)
        all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.align_ylabels()
        figure.suptitle(title, fontsize=12)
        _save(figure, path)


def plot_plan(path: Path, planned: Mapping[str, Any], title: str) -> None:
    """Draw what a run and the usual ways to train hold at their peak, by kind.

    Args:
        path: The PNG to write.
        planned: A plan as ``Plan.to_json`` gives it.
        title: Above the picture.
    """
    sets = planned["sets"]
    bars = {
        "this run, worst set": sets["worst"],
        "this run, typical set": sets["typical"],
        **planned["baselines"],
    }
    kinds = [kind for kind in sets["worst"]["parts"] if any(bar["parts"][kind] for bar in bars.values())]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 1.3 + 0.45 * len(bars)), layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(bars)
        for number, kind in enumerate(kinds):
            widths = [bar["parts"][kind] / 2**30 for bar in bars.values()]
            color = _COLORS[number % len(_COLORS)]
            axes.barh(list(bars), widths, left=left, color=color, label=kind.replace("_", " "))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for row, (end, bar) in enumerate(zip(left, bars.values(), strict=True)):
            axes.annotate(f" {bar['peak_bytes'] / 2**30:.1f}", (end, row), va="center")
        axes.invert_yaxis()
        axes.set(xlabel="GiB on each GPU", xlim=(0, 1.1 * max(left)))
        figure.legend(frameon=False, loc="outside lower center", ncols=4, fontsize=9)
        figure.suptitle(title, fontsize=12)
        _save(figure, path)


def _has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def _save(figure: Figure, path: Path) -> None:
    with whole_file(path) as scratch:
        figure.savefig(scratch, format="png")
