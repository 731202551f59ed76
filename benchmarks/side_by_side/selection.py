"""A report of some of a benchmark's rows and seeds: its suite and its runs without the others."""

from __future__ import annotations

from collections.abc import Sequence

from layersample.errors import ConfigError, unknown

from .stored_lines import Line
from .suite import ALL, Suite


def select(
    suite: Suite, lines: Sequence[Line], *, seeds: Sequence[int] | None, methods: Sequence[str] | None
) -> tuple[Suite, list[Line]]:
    """A suite of some rows and seeds alone, with the runs that are theirs; a search for rates is a row's whole.

    Args:
        suite: The whole one.
        lines: Its runs.
        seeds: Those that are kept; all by default.
        methods: Names of the rows that are kept, in any order; all by default, or where one is ``all``.

    Raises:
        ConfigError: If a seed or a method isn't one of the suite, or a row is left out that the others are compared
            with or matched to, or has none of the seeds.
    """
    if seeds is not None:
        suite = _of_seeds(suite, seeds)
    if methods is not None and ALL not in methods:
        suite = _of_methods(suite, methods)
    seeds_of = {entry.name: suite.seeds_of(entry) for entry in suite.entries}
    kept = [
        line
        for line in lines
        if line["method"] in seeds_of
        and (line["stage"] != "final" or line["seed"] in seeds_of[line["method"]])
    ]
    return suite, kept


def _of_seeds(suite: Suite, seeds: Sequence[int]) -> Suite:
    there = suite.all_seeds
    other = next((seed for seed in seeds if seed not in there), None)
    if other is not None:
        raise ConfigError(
            f"seeds must be among those of the benchmark, {', '.join(map(str, there))}, but got {other}."
        )
    kept = {row.name: [seed for seed in suite.seeds_of(row) if seed in seeds] for row in suite.entries}
    if lacking := sorted(name for name in _needed(suite) if not kept[name]):
        raise ConfigError(
            f"seeds must hold some of {' and '.join(lacking)}, which the others are compared with or matched to, but "
            f"got {', '.join(map(str, seeds))}."
        )
    # A row that has none of these seeds isn't shown, and counts as no comparison.
    rows = [row.model_copy(update={"seeds": kept[row.name]}) for row in suite.entries if kept[row.name]]
    return suite.model_copy(update={"methods": rows, "seeds": [seed for seed in there if seed in seeds]})


def _of_methods(suite: Suite, methods: Sequence[str]) -> Suite:
    names = [entry.name for entry in suite.entries]
    for name in methods:
        if name not in names:
            raise ConfigError(f"methods: {unknown('method of this suite', name, names)}")
    if missing := sorted(_needed(suite) - {*methods}):
        raise ConfigError(
            f"methods must hold {' and '.join(missing)}, which the others are compared with or matched to, but got "
            f"{', '.join(methods) or 'none'}."
        )
    return suite.model_copy(update={"methods": [entry for entry in suite.entries if entry.name in methods]})


def _needed(suite: Suite) -> set[str]:
    """The rows that the others are compared with or matched to."""
    return {suite.reference} | ({suite.match_to} if suite.match != "steps" else set())
