"""What a run's line says of its steps: seconds, and which layers trained when."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from statistics import fmean
from typing import Any

from .clock import PHASES
from .recorder import Recorder


def times(recorder: Recorder, *, each: bool) -> dict[str, Any]:
    """Seconds and tokens: means over the quiet steps and, if asked for, the seconds of each step.

    Args:
        recorder: Of a run that has ended.
        each: Whether to give those of each step, a mean in place of one that isn't quiet.
    """
    quiet = recorder.quiet
    seconds = {
        kind: {phase: fmean([s["seconds"].get(phase, {}).get(kind, 0.0) for s in quiet]) for phase in PHASES}
        for kind in ("cpu", "wall")
    }
    wall = sum(seconds["wall"].values())
    return {
        "seconds": {
            **seconds,
            "before_training": dict(recorder.preparation),
            "first_step": _beyond_others(recorder.steps[0], seconds),
            **({"each": _each(recorder, seconds)} if each else {}),
        },
        "tokens_per_second": fmean([step["tokens"] for step in quiet]) / wall,
    }


def _each(recorder: Recorder, means: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    quiet = {step["step"] for step in recorder.quiet}
    return {
        kind: [
            sum(spent[kind] for spent in step["seconds"].values())
            if step["step"] in quiet
            else sum(of.values())
            for step in recorder.steps
        ]
        for kind, of in means.items()
    }


def _beyond_others(first: Mapping[str, Any], means: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds by which the first step's sampling and optimizer exceed those of the others.

    A basis that is kept for many steps is computed there, so a pace without it would be too good. Forward and backward
    do nothing once but to set kernels up.

    Args:
        first: The step.
        means: Of the other steps, by kind (``"cpu"``, ``"wall"``) and phase.
    """
    if "traced" in first:
        return dict.fromkeys(means, 0.0)
    parts, spent = ("sampling", "optimizer"), first["seconds"]
    return {
        kind: max(0.0, sum(spent.get(part, {}).get(kind, 0.0) - of[part] for part in parts))
        for kind, of in means.items()
    }


def layers_over_time(recorder: Recorder, names: list[str]) -> dict[str, Any]:
    """What trained when, how many layers did, and for how many steps each hasn't at the end.

    Args:
        recorder: Of a run that has ended.
        names: Of all layers.
    """
    steps = recorder.steps
    last = {index: step["step"] for step in steps for index in step["active"]}
    chances = [step["inclusion"] for step in steps]
    known = len(chances) if all(c is not None and len(c) == len(names) for c in chances) else 0
    spans = []
    for active, group in groupby(steps, key=lambda step: step["active"]):
        members = list(group)
        spans.append([members[0]["step"], members[-1]["step"], active])
    return {
        "layers": names,
        "active": spans,  # first step, last step, indices of the layers that trained
        "coverage": len(last) / len(names),
        "staleness": fmean([len(steps) - last.get(index, 0) for index in range(len(names))]),
        "inclusion_probabilities": [fmean(column) for column in zip(*chances, strict=True)]
        if known
        else None,
    }
