"""A suite: the methods, task, seeds and budget of a benchmark, in one file; checked whole before any work."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from layersample.config import BUILTIN_MODEL, TrainConfig, make_config
from layersample.errors import ConfigError, unknown
from layersample.option_files import Options, make_options
from layersample.options import Role, names_with
from layersample.registry import PLUGIN_PREFIX, PROJECTIONS, create_sampler, list_samplers, load_plugin
from layersample.training.data import load_data

from ..methods.catalog import default_methods, get_method
from ..methods.method import Method
from .tasks import Splits, get_task, right_answers, split

ALL = "all"
_SUITES = Path(__file__).parent / "suites"
_USUAL_BASELINE = "full"
DEFAULT_RATES = (1e-4, 3e-4, 1e-3)
Stage = Literal["search", "final"]

# What may change from one call to the next: rows, rates and seeds are added, and the report reads the rest.
MAY_CHANGE = {
    "methods",
    "seeds",
    "learning_rates",
    "search_extensions",
    "baseline",
    "confidence",
    "plugin",
}

# What of the Trainer's own arguments the suite sets, or what is measured needs.
_TRAINER_SET_HERE = {
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "max_length",
    "seed",
    "data_seed",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
}

# What the benchmark sets itself, so that every method has the same.
_SET_HERE = names_with(TrainConfig, Role.SUITE)


class MethodEntry(Options):
    """A row of the table.

    Args:
        name: Its name; different in each row.
        method: A sampler, SAMPLER+PROJECTION, or a baseline; its name by default.
        options: Options of ``layersample train`` for this row alone.
        learning_rates: Its own learning rates, in place of the suite's.
    """

    name: str = Field(min_length=1, pattern=r"^[^/\s]+$")
    method: str = ""
    options: dict[str, Any] = {}
    learning_rates: list[float] | None = Field(None, min_length=1)

    @property
    def definition(self) -> Method:
        """The method behind the row."""
        return get_method(self.method or self.name)


def _entry(name: str) -> MethodEntry:
    get_method(name)  # says what is wrong with a name better than the pattern of names does
    return MethodEntry(name=name)


class Suite(Options):
    """All that decides what a benchmark measures."""

    model: str = Field(BUILTIN_MODEL, description="Built-in name, local folder or hub id.")
    task: str = Field("gsm_symbolic", description="Built-in task, or data as train takes it.")
    answer_marker: str | None = Field(None, description="Text that the answer follows, in data of your own.")
    other_text: str = Field("book", description="Text that isn't trained on, to see what is forgotten.")
    other_size: int = Field(8, ge=1, le=10**9, description="Pieces of that text.")
    methods: list[MethodEntry | str] = Field(
        [ALL],
        min_length=1,
        description="Rows; `all` stands for every sampler and baseline that needs no option.",
    )
    baseline: str | None = Field(
        None, description="The method that the others are compared with; default: full, or the first."
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="Seeds of data order, dropout and draws.")
    steps: int = Field(60, ge=1, le=10**9, description="Optimizer steps of a run.")
    batch_size: int = Field(4, ge=1, le=10**9, description="Examples of a step.")
    max_length: int = Field(256, ge=8, le=10**9, description="Tokens of an example, at most.")
    learning_rates: list[float] | None = Field(
        None,
        min_length=1,
        description="Tried first for each method; default: 1e-4, 3e-4, 1e-3; adapters 5 times that.",
    )
    search_extensions: int = Field(
        2,
        ge=0,
        le=10**9,
        description="Rates to try beyond those, at most, where the best is the lowest or highest.",
    )
    search_steps: int = Field(
        30, ge=1, le=10**9, description="Optimizer steps of a run that tries a learning rate."
    )
    validation_size: int = Field(
        32, ge=1, le=10**9, description="Problems that learning rates are chosen on."
    )
    test_size: int = Field(32, ge=1, le=10**9, description="Problems that the table is measured on.")
    answers: int = Field(16, ge=0, le=10**9, description="Test problems that are answered in full.")
    answer_tokens: int = Field(160, ge=1, le=10**9, description="Tokens of an answer, at most.")
    evaluations: int = Field(
        3, ge=1, le=10**9, description="Held-out losses along a run, after the first one."
    )
    trace_every: int = Field(10, ge=0, le=10**9, description="Steps between traces of memory; 0: never.")
    confidence: float = Field(
        0.95, gt=0, lt=1, description="Confidence of intervals, and of the test as a whole."
    )
    threads: int | None = Field(None, ge=1, le=10**9, description="Threads of a run; default: cores / jobs.")
    options: dict[str, Any] = Field({}, description="Options of `layersample train` for every method.")
    plugin: Path | None = Field(None, description="Python file with samplers or baselines of your own.")

    @property
    def entries(self) -> list[MethodEntry]:
        """The rows of the table."""
        rows: list[MethodEntry] = []
        for method in self.methods:
            names = default_methods() if method == ALL else [method]
            rows += [_entry(name) if isinstance(name, str) else name for name in names]
        return rows

    @property
    def reference(self) -> str:
        """The name of the method that the others are compared with."""
        names = [entry.name for entry in self.entries]
        return self.baseline or (_USUAL_BASELINE if _USUAL_BASELINE in names else names[0])

    def rates(self, entry: MethodEntry) -> list[float]:
        """The learning rates to try for a method."""
        if entry.learning_rates or self.learning_rates:
            return entry.learning_rates or self.learning_rates or []
        return [rate * entry.definition.rate_scale for rate in DEFAULT_RATES]

    def config(self, job: Job) -> TrainConfig:
        """The configuration of a run.

        Raises:
            ConfigError: If an option is unknown or out of bounds.
        """
        entry = next(e for e in self.entries if e.name == job.row)
        own = {
            "model": self.model,
            "seed": job.seed,
            "steps": job.steps,
            "learning_rate": job.learning_rate,
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "plugin": self.plugin,
        }
        name = f"method {entry.name}"
        return make_config(
            ("suite", self.options), (name, entry.definition.options), (name, entry.options), ("suite", own)
        )

    def check(self) -> None:
        """Check everything that can be checked without loading a model.

        Raises:
            ConfigError: If a method, baseline, task, option or seed can't be used.
        """
        if self.plugin is not None:
            load_plugin(self.plugin)
        get_task(self.task, self.answer_marker)
        names = [entry.name for entry in self.entries]
        for kind, values in (("seeds", list(map(str, self.seeds))), ("methods", names)):
            repeated = sorted({value for value in values if values.count(value) > 1})
            if repeated:
                raise ConfigError(f"{kind} must all be different, but {', '.join(repeated)} comes twice.")
        if wrong := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ConfigError(f"seeds must be between 0 and 2**32 - 1, but got {wrong[0]}.")
        for entry in self.entries:
            entry.definition.check_installed()
            for options in (self.options, entry.options):
                taken = _SET_HERE & options.keys()
                if isinstance(trainer := options.get("trainer"), Mapping):
                    taken |= _TRAINER_SET_HERE & trainer.keys()
                if taken:
                    raise ConfigError(
                        f"options of {entry.name!r} must leave out {', '.join(sorted(taken))}, which the suite sets "
                        "for every method alike."
                    )
            rates = self.rates(entry)
            if len(set(rates)) < len(rates) or (len(rates) > 1 and min(rates) <= 0):
                raise ConfigError(
                    f"learning_rates must all be different and, where there are several, above 0, but those of "
                    f"{entry.name!r} are {', '.join(map(str, rates))}."
                )
            for rate in rates:
                config = self.config(self.search_job(entry, rate))
            create_sampler(config.sampler, config.sampler_options)
            PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)

    def check_baseline(self) -> None:
        """Make sure that the others can be compared with the baseline.

        Raises:
            ConfigError: If no row has its name.
        """
        names = [entry.name for entry in self.entries]
        if self.baseline not in (None, *names):
            raise ConfigError(f"baseline: {unknown('method of this suite', str(self.baseline), names)}")

    def check_data(self) -> None:
        """Read the data once, so that what can't be used is found before any work.

        Raises:
            ConfigError: If the data or other text can't be read, is too small, or its answers can't be judged.
        """
        task = get_task(self.task, self.answer_marker)
        parts = split(
            task, validation_size=self.validation_size, test_size=self.test_size, train_size=1, seed=0
        )
        if task.has_answers:
            right_answers(task, self.problems(parts))
        load_data(self.other_text)

    def problems(self, parts: Splits) -> list[dict[str, Any]]:
        """The test problems that are answered in full."""
        return list(parts.test.select(range(min(self.answers, len(parts.test)))))

    def search_job(self, entry: MethodEntry, learning_rate: float) -> Job:
        """The run that tries a learning rate of a method, with the first seed."""
        return Job(entry.name, "search", self.seeds[0], learning_rate, self.search_steps)

    def final_jobs(self, entry: MethodEntry, learning_rate: float) -> list[Job]:
        """The runs of a method with its chosen learning rate, one a seed."""
        return [Job(entry.name, "final", seed, learning_rate, self.steps) for seed in self.seeds]


@dataclass(frozen=True)
class Job:
    """One run, in a process of its own.

    Args:
        row: Name of the method's row.
        stage: ``"search"`` for a learning rate, measured on the validation split, or ``"final"``.
        seed: Seed of data order, dropout and draws.
        learning_rate: The peak.
        steps: Optimizer steps.
    """

    row: str
    stage: Stage
    seed: int
    learning_rate: float
    steps: int

    @property
    def key(self) -> str:
        """Its name among all runs of a benchmark."""
        what = f"seed-{self.seed}" if self.stage == "final" else f"rate-{self.learning_rate:g}"
        return f"{self.stage}/{self.row}/{what}"


def make_suite(*layers: tuple[str, Mapping[str, Any]]) -> Suite:
    """Make a suite from several sources.

    Args:
        layers: Pairs of a source's name and its keys; a later one wins.

    Raises:
        ConfigError: If a key is unknown or a value can't be used; it names the source and the key.
    """
    return make_options(Suite, layers, "key of a suite")


def builtin_suites() -> list[str]:
    """Names of the suites that come with layersample."""
    return sorted(_suites())


def read_builtin(name: str) -> dict[str, Any]:
    """The keys of a suite that comes with layersample.

    Raises:
        ConfigError: If there is none of that name.
    """
    suites = _suites()
    if name not in suites:
        raise ConfigError(f"{unknown('suite', name, suites)} A YAML file will do too.")
    keys: dict[str, Any] = yaml.safe_load(suites[name])
    return keys


def _suites() -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in _SUITES.glob("*.yaml")}


def fingerprint(suite: Suite, entry: MethodEntry) -> str:
    """What decides the numbers of a method's runs, in a few letters, but for the learning rate and seed of each.

    The content of a data file and of the plug-in that a method comes from counts, that of a model's folder doesn't.
    """
    common = suite.model_dump(mode="json", exclude=MAY_CHANGE)
    definition = entry.definition
    own = {"method": definition.name, "options": {**definition.options, **entry.options}}
    files = [
        path for path in (Path(suite.task), _plugin_of(definition)) if path is not None and path.is_file()
    ]
    digests = [_digest(path, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([common, own, suite.seeds[0], *digests], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _digest(path: Path, changed: int) -> str:
    """Hash of a file's content, read once for all rows; ``changed`` is when it was written."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plugin_of(method: Method) -> Path | None:
    """The file of a user's that a method, or its sampler, comes from."""
    sampler = list_samplers().get(str(method.options.get("sampler")))
    names = {method.prepare.__module__, getattr(sampler, "__module__", "")}
    plugins = [sys.modules[name] for name in names if name.startswith(PLUGIN_PREFIX)]
    return Path(str(plugins[0].__file__)) if plugins else None
