"""A benchmark whose rows are searched for first, and then confirmed beside the others."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from layersample.errors import ConfigError
from layersample.files import check_output

from .entries import MethodEntry
from .pool import BenchmarkProgress
from .recipes import RecipeSearch, make_study
from .results import SEARCHES, Results
from .runner import run_suite, threads_of
from .suite import Suite
from .tried import read_tried


def run_recipes(
    suite: Suite,
    folder: Path,
    *,
    jobs: int = 1,
    command: str | None = None,
    progress: BenchmarkProgress | None = None,
) -> Results:
    """Search each recipe of a suite on the validation split; then run them with the other rows, on fresh seeds.

    Args:
        suite: What to run; its ``recipes`` say what is searched.
        folder: Where the results are, and in it what was tried.
        jobs: Runs at a time.
        command: What was typed, for the report.
        progress: Shows all runs.

    Raises:
        ConfigError: If the suite or the folder can't be used, Optuna isn't installed, or no try came to its end.
    """
    threads = threads_of(suite, jobs)
    suite = suite.model_copy(update={"methods": _without_chosen(suite, folder)})
    check_recipes(suite)
    suite.check()
    suite.check_data()
    check_output(folder)
    # What can't be used is said before hours of search.
    _check_same_searches(suite, folder)
    chosen = []
    # Held all along: no other benchmark may run beside what is timed alone, or take the folder before the end.
    with closing(Results(folder, suite).open()) as results:
        results.check_threads(threads)
        for name, space in suite.recipes.items():
            search = RecipeSearch(
                name,
                space,
                suite,
                folder / SEARCHES / name,
                jobs=jobs,
                threads=threads,
                progress=progress,
            )
            chosen.append(search.run())
            if progress is not None:
                progress.say(f"{name}: {_words(chosen[-1])}")
    whole = suite.model_copy(update={"methods": [*suite.methods, *chosen]})
    return run_suite(whole, folder, jobs=jobs, command=command, progress=progress)


def check_recipes(suite: Suite) -> None:
    """Make sure that the searches of a suite can be run.

    Raises:
        ConfigError: If there are none, one has a seed or name of the suite's, or Optuna isn't installed.
    """
    if not suite.recipes:
        raise ConfigError("recipes must hold at least one search, but the suite has none.")
    make_study(0)
    if taken := sorted(suite.recipes.keys() & {entry.name for entry in suite.entries}):
        raise ConfigError(
            f"recipes: a search must have a name that no row has, since it becomes a row, but {taken[0]} is among the "
            "methods too."
        )
    for name, space in suite.recipes.items():
        both = sorted(set(space.seeds_of(space.rungs - 1)) & set(suite.all_seeds))
        if both:
            raise ConfigError(
                f"recipes: the seeds of {name} must be none of the suite's, on which the choice is confirmed, but "
                f"{both[0]} is one of them."
            )
        row = MethodEntry(name=name, method=space.method or name, options=space.options)
        suite.model_copy(update={"methods": [row], "baseline": name, "match": "steps"}).check()


def _check_same_searches(suite: Suite, folder: Path) -> None:
    """Make sure that a search that has ended is still the same: the page shows what was tried for its winner."""
    asked = {name: space.model_dump(mode="json") for name, space in suite.recipes.items()}
    for search in read_tried(folder):
        if asked.get(search["name"], search["space"]) != search["space"]:
            raise ConfigError(
                f"{folder} holds a search {search['name']!r} over another space, whose winner is a row. Choose "
                "another name for the search, or another --output."
            )


def _without_chosen(suite: Suite, folder: Path) -> list[MethodEntry | str]:
    """The rows but for those that searches have ended as, which a stored suite holds."""
    chosen = [MethodEntry(**search["chosen"]) for search in read_tried(folder)]
    return [
        row
        for row in suite.methods
        if isinstance(row, str)
        or row.model_copy(update={"seeds": None}) not in chosen  # more may have been run
    ]


def _words(row: MethodEntry) -> str:
    rate = (row.learning_rates or [0.0])[0]
    return ", ".join([*(f"{key} {value}" for key, value in row.options.items()), f"learning rate {rate:g}"])
