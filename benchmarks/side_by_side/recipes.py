"""The search for a recipe: options that win on the validation split, and are then confirmed on fresh seeds."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layersample.errors import ConfigError
from layersample.files import write_json

from .entries import MethodEntry
from .jobs import Job
from .matching import Matching
from .pool import BenchmarkProgress, Pool
from .recipe_space import RATE, Range, RecipeSpace
from .results import Results
from .stored_lines import last_loss
from .suite import Suite
from .tried import TRIED

if TYPE_CHECKING:
    import optuna


@dataclass
class Try:
    """A recipe that is tried.

    Args:
        number: Its place among the tries.
        chosen: Its value of each option of the space.
        entry: The row that it is.
        losses: Loss on the validation split at the end of each rung that it came to, the mean over the rung's seeds.
        error: Why it came no further.
    """

    number: int
    chosen: dict[str, Any]
    entry: MethodEntry
    losses: list[float] = field(default_factory=list)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Its JSON."""
        return {
            "number": self.number,
            "row": self.entry.name,
            "chosen": self.chosen,
            "losses": self.losses,
            "error": self.error,
        }


class RecipeSearch:
    """One search, in a folder of its own; stopped at any time, it goes on.

    Each try is a run of its own on each rung, and several on the last, with its schedule over that rung's steps. What
    Optuna asks for follows from the seed and from what the tries measured, so a search that goes on asks for the same
    again and finds it stored.

    Args:
        name: Its name, and the row's that it ends as.
        space: What to choose from.
        suite: The benchmark that it is for.
        folder: Where its runs are kept.
        jobs: Runs at a time.
        threads: Threads of a run.
        progress: Shows them.

    References:
        Jamieson, Talwalkar, Non-stochastic best arm identification and hyperparameter optimization, 2016 (1502.07943).
    """

    def __init__(
        self,
        name: str,
        space: RecipeSpace,
        suite: Suite,
        folder: Path,
        *,
        jobs: int,
        threads: int,
        progress: BenchmarkProgress | None = None,
    ) -> None:
        self._name = name
        self._space = space
        self._suite = suite
        self._folder = folder
        self._jobs = jobs
        self._threads = threads
        self._progress = progress
        self._tries: list[Try] = []

    def run(self) -> MethodEntry:
        """Search, and give the best recipe as a row with its learning rate.

        Raises:
            ConfigError: If Optuna isn't installed, or no try came to the end.
        """
        study = make_study(self._space.seed)
        waves = min(self._space.waves, self._space.tries)
        for wave in range(waves):
            count = self._space.tries // waves + (wave < self._space.tries % waves)
            asked = [(trial := study.ask(), self._ask(trial)) for _ in range(count)]
            self._tries += [one for _, one in asked]
            self._halve([one for _, one in asked])
            for trial, one in asked:
                tell(study, trial, one, self._space.rungs)
        write_json(self._folder / TRIED, self.to_json())
        return self.best

    @property
    def best(self) -> MethodEntry:
        """The recipe with the lowest loss of those that came to the last rung."""
        ended = [one for one in self._tries if len(one.losses) == self._space.rungs]
        if not ended:
            why = next((one.error for one in self._tries if one.error), "none was tried")
            raise ConfigError(f"No recipe of {self._name} could be run to its end: {why}")
        best = min(ended, key=lambda one: one.losses[-1])
        return best.entry.model_copy(update={"name": self._name})

    def to_json(self) -> dict[str, Any]:
        """What was tried, from the best to the worst of the rung that each came to."""
        order = sorted(self._tries, key=lambda one: (-len(one.losses), one.losses[-1:] or [0.0]))
        return {
            "name": self._name,
            "space": self._space.model_dump(mode="json"),
            "tries": [one.to_json() for one in order],
            "chosen": self.best.model_dump(mode="json"),
        }

    def _ask(self, trial: optuna.Trial) -> Try:
        chosen: dict[str, Any] = {}
        for key, values in self._space.space.items():
            if isinstance(
                values, list
            ):  # by its place: Optuna's choices are plain values, options needn't be
                chosen[key] = values[int(trial.suggest_categorical(key, list(range(len(values)))))]
            else:
                chosen[key] = _from_range(trial, key, values)
        rate = float(f"{chosen[RATE]:.3g}")
        options = self._space.options_of(chosen)
        # Named by what it is, so that a stored run is never taken for that of another recipe.
        digest = hashlib.sha256(json.dumps([options, rate], sort_keys=True).encode()).hexdigest()[:8]
        entry = MethodEntry(
            name=f"{self._name}-{digest}",
            method=self._space.method or self._name,
            options=options,
            learning_rates=[rate],
        )
        return Try(trial.number, {**chosen, RATE: rate}, entry)

    def _halve(self, tries: Sequence[Try]) -> None:
        """Run tries on the first rung, the best of them on the next one, and so on."""
        left = self._that_can_be_used(tries)
        for rung in range(self._space.rungs):
            self._run_rung(rung, left)
            left = sorted((one for one in left if one.error is None), key=lambda one: one.losses[-1])
            left = left[: max(1, len(left) // self._space.keep)]

    def _that_can_be_used(self, tries: Sequence[Try]) -> list[Try]:
        usable = []
        for one in tries:
            try:
                self._suite_of([one]).check()
            except ConfigError as error:  # options that don't go together are a try that failed
                one.error = str(error)
            else:
                usable.append(one)
        return usable

    def _run_rung(self, rung: int, tries: Sequence[Try]) -> None:
        unique = list({one.entry.name: one for one in tries}.values())
        if not unique:
            return
        suite = self._suite_of(unique)
        with closing(Results(self._folder, suite).open()) as results:
            # What fits is confirmed on the seeds of the benchmark, so on their examples.
            matching = Matching(suite, results, data_of=self._suite)
            with closing(Pool(results, self._threads, self._jobs, self._progress)) as pool:
                matching.run(pool)
                jobs = {one.entry.name: self._jobs_of(one, rung, matching) for one in unique}
                pool.run(chain.from_iterable(jobs.values()))
            for one in tries:
                self._read(one, [results.get(job) for job in jobs[one.entry.name]], matching)

    def _jobs_of(self, one: Try, rung: int, matching: Matching) -> list[Job]:
        """A try's runs on a rung; none where it can't be matched."""
        given = matching.given(one.entry)
        if given is None:
            return []
        steps, rate = self._space.steps(rung, given.steps), (one.entry.learning_rates or [0.0])[0]
        return [
            Job(one.entry.name, "rung", seed, rate, steps, given.options)
            for seed in self._space.seeds_of(rung)
        ]

    def _read(self, one: Try, lines: Sequence[Mapping[str, Any] | None], matching: Matching) -> None:
        runs = [line for line in lines if line is not None]
        failed = next((line["error"] for line in runs if "error" in line), None)
        if not runs:
            one.error = matching.why_not(one.entry)
        elif failed is not None:
            one.error = str(failed)
        else:
            one.losses.append(statistics.fmean(map(last_loss, runs)))

    def _suite_of(self, tries: Iterable[Try]) -> Suite:
        """The suite with tries for rows, beside the one that they are matched to."""
        entries = [one.entry for one in tries]
        if self._suite.match != "steps":
            entries += [entry for entry in self._suite.entries if entry.name == self._suite.match_to]
        return self._suite.model_copy(
            update={
                "methods": entries,
                "seeds": [self._space.seed],
                "learning_rates": None,
                "baseline": entries[0].name,
                # A try is timed once: what is reported is timed anew in the confirmation.
                "timing_rounds": min(1, self._suite.rounds),
                "timing_whole": False,
                "recipes": {},
            }
        )


def make_study(seed: int) -> optuna.Study:
    """A study whose proposals follow from a seed and from what it is told.

    Raises:
        ConfigError: If Optuna isn't installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError('A search for recipes needs Optuna: pip install "layersample[search]".') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # At random until there is something to follow.
    return optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=8))


def tell(study: optuna.Study, trial: optuna.Trial, one: Try, rungs: int) -> None:
    """Tell a study how a try went: its losses by rung, and whether it came to the last one."""
    import optuna

    for rung, loss in enumerate(one.losses):
        trial.report(loss, step=rung)
    if len(one.losses) == rungs:
        study.tell(trial, one.losses[-1])
    else:
        state = optuna.trial.TrialState.PRUNED if one.losses else optuna.trial.TrialState.FAIL
        study.tell(trial, state=state)


def _from_range(trial: optuna.Trial, name: str, values: Range) -> float | int:
    if values.whole:
        return trial.suggest_int(name, round(values.low), round(values.high), log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)
