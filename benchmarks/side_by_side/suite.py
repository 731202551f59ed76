"""A suite: the methods, task, seeds and budget of a benchmark, in one file; checked whole before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from layersample.config import BUILTIN_MODEL, TrainConfig, make_config
from layersample.errors import ConfigError, repeated, unknown
from layersample.option_files import Options, make_options
from layersample.registry import PROJECTIONS, create_sampler, load_plugin
from layersample.training.data import load_data

from ..methods.catalog import default_methods
from .entries import MethodEntry, named_entry
from .jobs import Given, Job, Stage
from .recipe_space import RecipeSpace
from .seeds import as_seeds, check_seeds
from .suite_keys import DECIDES_NOTHING, HARNESS, MATCHING, SET_HERE, TRAINER_SET_HERE
from .tasks import Splits, get_task, right_answers, split

ALL = "all"
_USUAL_BASELINE = "full"
DEFAULT_RATES = (1e-4, 3e-4, 1e-3)
Match = Literal["steps", "time", "memory", "both"]
# A folder's name, and with a digest of 9 letters behind it that of a row.
SearchName = Annotated[str, StringConstraints(min_length=1, max_length=91, pattern=r"^[^/\s|<>.][^/\s|<>]*$")]


class Suite(Options):
    """All that decides what a benchmark measures."""

    model: str = Field(BUILTIN_MODEL, description="Built-in name, local folder or hub id.")
    attention: Literal["sdpa", "eager"] | None = Field(
        None,
        description="Attention of every run; default: transformers' choice. In bf16 on a CPU `eager` has the "
        "cheaper backward pass below some 200 tokens.",
    )
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
    seeds: Annotated[list[int], BeforeValidator(as_seeds)] = Field(
        [0, 1, 2],
        min_length=1,
        description="Seeds of data order, dropout and draws; a number: as many, from 0 on.",
    )
    steps: int = Field(
        60, ge=1, le=10**9, description="Optimizer steps of a run; where time is matched, of the reference's."
    )
    match: Match = Field(
        "steps", description="What all methods are given alike: steps, or the time, memory or both of one."
    )
    match_to: str = Field("lora", description="The method whose time and memory the others are given.")
    time_share: float = Field(
        1.0, gt=0, le=100, description="Part of the reference's time that the others are given."
    )
    memory_share: float = Field(
        1.0, gt=0, le=100, description="Part of the reference's peak that others are given."
    )
    timing_rounds: int | None = Field(
        None,
        ge=0,
        le=1000,
        description="Runs a method, in turns and alone, to measure a step; default: 3 where time is matched.",
    )
    timing_steps: int = Field(11, ge=2, le=10**9, description="Optimizer steps of such a run.")
    timing_whole: bool = Field(
        True,
        description="Whether a whole run a method follows where time is matched, and its steps are counted by that.",
    )
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
    search_seed: int | None = Field(
        None,
        ge=0,
        lt=2**31,
        description="First seed of the search for rates; default: the first that is measured.",
    )
    search_seeds: int = Field(
        1,
        ge=1,
        le=1000,
        description="Seeds of the search: the first for all rates, the others for the best two, whose means "
        "decide, and for those beyond an edge that these choose.",
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
    lm_eval: list[str] = Field(
        [],
        description="Tasks of lm-evaluation-harness that the trained models are scored on, by the harness.",
    )
    lm_eval_tasks: Path | None = Field(None, description="Folder with task files of your own for it.")
    lm_eval_limit: int | None = Field(None, ge=1, le=10**9, description="Examples of such a task, at most.")
    evaluations: int = Field(
        3, ge=0, le=10**9, description="Held-out losses along a run, after the first one; 0: the last alone."
    )
    trace_every: int = Field(10, ge=0, le=10**9, description="Steps between traces of memory; 0: never.")
    confidence: float = Field(
        0.95, gt=0, le=0.9999, description="Confidence of intervals, and of the test as a whole."
    )
    equivalence: float = Field(
        0.02,
        gt=0,
        le=100,
        description="Nats a token that two losses may differ by and still be called equal.",
    )
    threads: int | None = Field(None, ge=1, le=10**9, description="Threads of a run; default: cores / jobs.")
    options: dict[str, Any] = Field({}, description="Options of `layersample train` for every method.")
    recipes: dict[SearchName, RecipeSpace] = Field(
        {}, description="Searches for the best options of a method, by `layersample benchmark recipes`."
    )
    plugin: Path | None = Field(None, description="Python file with samplers or baselines of your own.")

    @property
    def entries(self) -> list[MethodEntry]:
        """The rows of the table."""
        rows: list[MethodEntry] = []
        for method in self.methods:
            names = default_methods() if method == ALL else [method]
            rows += [named_entry(name) if isinstance(name, str) else name for name in names]
        return rows

    def seeds_of(self, entry: MethodEntry) -> list[int]:
        """The seeds of a row."""
        return self.seeds if entry.seeds is None else entry.seeds

    @property
    def all_seeds(self) -> list[int]:
        """The seeds that a row has, of whichever row."""
        own = (seed for row in self.entries for seed in self.seeds_of(row))
        return list(dict.fromkeys([*self.seeds, *own]))

    @property
    def reference(self) -> str:
        """The name of the method that the others are compared with."""
        names = [entry.name for entry in self.entries]
        return self.baseline or (_USUAL_BASELINE if _USUAL_BASELINE in names else names[0])

    @property
    def matches_time(self) -> bool:
        """Whether methods are given the reference's seconds."""
        return self.match in ("time", "both")

    @property
    def matches_memory(self) -> bool:
        """Whether methods are given the reference's bytes."""
        return self.match in ("memory", "both")

    @property
    def rounds(self) -> int:
        """Runs that measure a method's step."""
        return (3 if self.matches_time else 0) if self.timing_rounds is None else self.timing_rounds

    def identity(self) -> dict[str, Any]:
        """What decides the numbers of all methods."""
        left_out = DECIDES_NOTHING | (MATCHING if self.match == "steps" else set())
        left_out |= set() if self.lm_eval else HARNESS
        if self.attention is None:  # runs may be stored from before it was a key
            left_out |= {"attention"}
        if not (self.matches_time and self.timing_whole):  # here too
            left_out |= {"timing_whole"}
        return self.model_dump(mode="json", exclude=left_out)

    def rates(self, entry: MethodEntry) -> list[float]:
        """The learning rates to try for a method."""
        if entry.learning_rates or self.learning_rates:
            return entry.learning_rates or self.learning_rates or []
        return [rate * entry.definition.rate_scale for rate in DEFAULT_RATES]

    def entry(self, name: str) -> MethodEntry:
        """The row of a name."""
        return next(entry for entry in self.entries if entry.name == name)

    def config(self, job: Job, entry: MethodEntry | None = None) -> TrainConfig:
        """The configuration of a run.

        Args:
            job: The run.
            entry: Its row; one of this suite's by default.

        Raises:
            ConfigError: If an option is unknown or out of bounds.
        """
        entry = entry or self.entry(job.row)
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
            ("suite", self.options),
            (name, entry.definition.options),
            (name, entry.options),
            ("match", job.options),
            ("suite", own),
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
        if twice := repeated(names):
            raise ConfigError(f"methods must all be different, but {', '.join(twice)} comes twice.")
        for seeds in (self.seeds, *map(self.seeds_of, self.entries)):
            check_seeds(seeds)
        first = self.search_seed
        searched = () if first is None else range(first, first + self.search_seeds)
        if both := sorted({*searched} & {*self.all_seeds}):
            raise ConfigError(
                f"search_seed must begin seeds of which none is measured, but {both[0]} is among both: give another."
            )
        for entry in self.entries:
            entry.definition.check_installed()
            for options in (self.options, entry.options):
                taken = SET_HERE & options.keys()
                if isinstance(trainer := options.get("trainer"), Mapping):
                    taken |= TRAINER_SET_HERE & trainer.keys()
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
            if entry.definition.adapter_rank is None:
                PROJECTIONS.resolve_optional(config.projection, config.projection_arguments)

        if self.matches_time and self.rounds < 1:
            raise ConfigError(
                f"timing_rounds must be at least 1 where match is {self.match!r}, but got {self.rounds}."
            )

    def check_references(self) -> None:
        """Make sure that the rows are there that others are compared with or matched to.

        Raises:
            ConfigError: If no row has such a name.
        """
        names = [entry.name for entry in self.entries]
        if self.baseline not in (None, *names):
            raise ConfigError(f"baseline: {unknown('method of this suite', str(self.baseline), names)}")
        if self.match != "steps" and self.match_to not in names:
            raise ConfigError(f"match_to: {unknown('method of this suite', self.match_to, names)}")

    def check_data(self) -> None:
        """Read the data and the model's configuration once, so that what can't be used is found before any work.

        Raises:
            ConfigError: If the model can't be had; if an option of the Trainer is none; if the data or other text
                can't be read, is too small, or its answers can't be judged.
        """
        # Seconds of imports, and an extra: reports and the command's help need neither.
        from layersample.lengths import positions_of
        from layersample.training.arguments import training_arguments
        from layersample.training.models import load_config

        from .harness import check_tasks

        shape = load_config(self.model)
        for entry in self.entries:
            if (config := self.final_config(entry)).trainer:
                training_arguments(config, Path("unused"))
        task = get_task(self.task, self.answer_marker)
        parts = split(
            task, validation_size=self.validation_size, test_size=self.test_size, train_size=1, seed=0
        )
        if task.has_answers:
            right_answers(task, self.problems(parts))
        load_data(self.other_text)
        positions = None if shape is None else positions_of(shape)
        check_tasks(self.lm_eval, self.lm_eval_tasks, self.lm_eval_limit, positions)

    def problems(self, parts: Splits) -> list[dict[str, Any]]:
        """The test problems that are answered in full."""
        return list(parts.test.select(range(min(self.answers, len(parts.test)))))

    def final_config(self, entry: MethodEntry) -> TrainConfig:
        """The configuration of a row's final runs, but for the rate and what a match gives."""
        return self.config(self.final_jobs(entry, self.rates(entry)[0])[0], entry)

    def timing_jobs(self, entry: MethodEntry, options: Mapping[str, Any]) -> list[Job]:
        """The runs that measure a step of a method, one a round."""
        job = self._short_job(entry, "timing", 0, options)
        return [replace(job, seed=turn) for turn in range(self.rounds)]

    def whole_job(self, entry: MethodEntry, steps: int, options: Mapping[str, Any]) -> Job:
        """The run that measures a method's steps from the first to the last: they needn't all cost the same."""
        # The lowest rate is the likeliest to end well, and takes as long as the others; a pace needs two steps.
        return Job(entry.name, "whole", self.seeds[0], min(self.rates(entry)), max(2, steps), options)

    def peak_job(self, entry: MethodEntry) -> Job:
        """The run that measures a method's memory, where it can't be planned."""
        return self._short_job(entry, "peak", self.seeds[0], {})

    def _short_job(self, entry: MethodEntry, stage: Stage, seed: int, options: Mapping[str, Any]) -> Job:
        """A run that measures what a method takes; a rate of the middle will do."""
        rates = self.rates(entry)
        # A default period follows from the steps of a run, which here are fewer.
        given = {**options, "period": self.final_config(entry).run_period}
        return Job(entry.name, stage, seed, rates[len(rates) // 2], self.timing_steps, given)

    def search_job(self, entry: MethodEntry, learning_rate: float, given: Given | None = None) -> Job:
        """The run that tries a learning rate of a method, with the search's first seed."""
        given = given or Given(self.steps, self.search_steps)
        seed = self.seeds[0] if self.search_seed is None else self.search_seed
        return Job(entry.name, "search", seed, learning_rate, given.search_steps, given.options)

    def runoff_jobs(self, entry: MethodEntry, learning_rate: float, given: Given | None) -> list[Job]:
        """The runs that try a learning rate of a method with more seeds."""
        first = self.search_job(entry, learning_rate, given)
        return [
            replace(first, stage="runoff", seed=first.seed + more) for more in range(1, self.search_seeds)
        ]

    def final_jobs(self, entry: MethodEntry, learning_rate: float, given: Given | None = None) -> list[Job]:
        """The runs of a method with its chosen learning rate, one a seed."""
        given = given or Given(self.steps, self.search_steps)
        first = Job(entry.name, "final", 0, learning_rate, given.steps, given.options)
        return [replace(first, seed=seed) for seed in self.seeds_of(entry)]


def make_suite(*layers: tuple[str, Mapping[str, Any]]) -> Suite:
    """Make a suite from several sources.

    Args:
        layers: Pairs of a source's name and its keys; a later one wins.

    Raises:
        ConfigError: If a key is unknown or a value can't be used; it names the source and the key.
    """
    return make_options(Suite, layers, "key of a suite")
