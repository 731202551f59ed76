"""What is known of one method of a benchmark: a row of its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from .comparison import Difference, Estimate, Margin
from .stored_lines import Line, machine_of, once_seconds, run_seconds, step_seconds


@dataclass(frozen=True)
class Trial:
    """A learning rate that was tried: its mean loss on the validation split, ``None`` where a run failed."""

    rate: float
    loss: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """What is known of a method. Estimates are over seeds; ``None`` where nothing was measured.

    Args:
        name: The method.
        summary: What it does.
        trials: The learning rates that were tried.
        rate: The one that was chosen.
        errors: Which runs failed, and why.
        runs: Its final runs that ended well, one a seed.
        failed: Seeds whose final run failed. The others would flatter it, so it isn't compared then.
        loss: Held-out loss at the end, in nats a token.
        standing: What it is ranked by: the baseline's mean loss plus the difference, which is of the same seeds, or
            else its own mean loss.
        as_trained: The same with the weights that it trained with, where those aren't what is saved.
        difference: Difference of the loss to the baseline's.
        right: Share of right answers, from 0 to 1.
        right_difference: Difference of the right answers to the baseline's.
        margin: Whether its loss is as good as the baseline's, but for the suite's ``equivalence``.
        timings: Its runs that measured steps alone: the whole one where there is, or else the short ones.
        given: What a match gave it: its lines of the stages ``memory`` and ``time``, by stage.
        forgotten: Loss on other text after training minus before, in nats a token.
        curve: Held-out loss along the run: pairs of a step and an estimate.
    """

    name: str
    summary: str
    trials: tuple[Trial, ...]
    rate: float | None
    errors: tuple[tuple[str, str], ...]
    runs: tuple[Line, ...]
    failed: tuple[int, ...]
    loss: Estimate | None
    standing: float | None
    as_trained: Estimate | None
    difference: Difference | None
    right: Estimate | None
    right_difference: Difference | None
    margin: Margin | None
    timings: tuple[Line, ...]
    given: dict[str, Line]
    forgotten: Estimate | None
    curve: tuple[tuple[int, Estimate], ...]

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest of several, so that a better one may lie outside."""
        rates = [trial.rate for trial in self.trials]
        return len(rates) > 1 and self.rate in (min(rates), max(rates))

    def mean(self, read: Callable[[Line], float | None]) -> float | None:
        """The mean of something over the seeds; ``None`` if it wasn't measured in all of them."""
        values = [read(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    @property
    def memory_bytes(self) -> float | None:
        """What the front is drawn on: all live tensors, which repeat from run to run, or else the process."""
        tensors = self.tensor_bytes()
        return self.process_bytes if tensors is None else tensors

    @property
    def process_bytes(self) -> float | None:
        """Most bytes of the process in a training step, the mean over seeds."""
        return self.mean(lambda run: run["peak_bytes"]["process"])

    @property
    def device_bytes(self) -> float | None:
        """Most bytes on the GPU in a training step, the mean over seeds; ``None`` without one."""
        return self.mean(lambda run: run["peak_bytes"].get("device"))

    def tensor_bytes(self, kind: str | None = None) -> float | None:
        """Bytes of all live tensors when they were most; or of a kind at that moment."""

        def read(run: Line) -> float | None:
            peak = run["peak_bytes"]["tensors"]
            return None if peak is None else float(peak["total"] if kind is None else peak["at_peak"][kind])

        return self.mean(read)

    def seconds(self, kind: str, phase: str | None = None) -> float | None:
        """Seconds a step of a kind (``"cpu"``, ``"wall"``), as they were timed: in all, over the steps of its runs.

        Those of a part are a mean over all timed steps, which may be more: what a part took isn't known step by step.
        """
        if not self.timed:
            return None
        if phase is not None or not self.runs:
            return fmean(step_seconds(run, kind, phase) for run in self.timed)
        steps = len(self.runs[0]["training_loss"])
        return fmean(run_seconds(run, kind, steps) - once_seconds(run, kind) for run in self.timed) / steps

    def once_seconds(self, kind: str) -> float | None:
        """Seconds of what a run does once: what its sampler measures first, and what its first step does besides."""
        values = [once_seconds(run, kind) for run in self.timed]
        return fmean(values) if values else None

    @property
    def timed(self) -> tuple[Line, ...]:
        """The runs that its seconds are of: its timings where there are, or else its final ones."""
        return self.timings or self.runs

    @property
    def run_machines(self) -> frozenset[str]:
        """Those of its final runs; its seconds may be of another one."""
        return frozenset(machine_of(run) for run in self.runs)

    @property
    def timed_elsewhere(self) -> bool:
        """Whether its seconds are of another machine than its losses."""
        return not self.run_machines <= {machine_of(run) for run in self.timed}

    @property
    def timed_alone(self) -> bool | None:
        """Whether no other run of the benchmark was beside those that its seconds are of; ``None``: not noted."""
        noted = [run.get("runs_at_once") for run in self.timed]
        return None if None in noted else all(count == 1 for count in noted)

    def training_seconds(self, kind: str) -> float | None:
        """Seconds of a run's training: of what it does once, and of its steps, both as they were timed."""
        return self.seconds_at(len(self.runs[0]["training_loss"]), kind) if self.runs else None

    def seconds_at(self, step: int, kind: str) -> float:
        """Seconds until the end of a step, with what a run does once, as they were timed."""
        return fmean(run_seconds(run, kind, step) for run in self.timed)

    def used_seconds(self, kind: str) -> float | None:
        """Seconds that its final runs took, whatever was beside them, the mean over seeds.

        ``None`` where they were on another machine than its timings, whose seconds these can't be compared with.
        """
        return None if self.timed_elsewhere else self.mean(lambda run: run_seconds(run, kind))

    def used_beside(self, other: Row, kind: str) -> float | None:
        """How many times the seconds of another row its final runs took, the median over seeds on one machine."""
        if self.timed_elsewhere:
            return None
        theirs = {(run["seed"], machine_of(run)): run_seconds(run, kind) for run in other.runs}
        own = {(run["seed"], machine_of(run)): run_seconds(run, kind) for run in self.runs}
        shares = [seconds / theirs[place] for place, seconds in own.items() if place in theirs]
        return median(shares) if shares else None

    @property
    def scores(self) -> dict[tuple[str, str], list[float]]:
        """What the harness scored, one number a seed, by task and metric; nothing that isn't there of all seeds."""
        found: dict[tuple[str, str], list[float]] = {}
        for run in self.runs:
            for task, metrics in run.get("lm_eval", {}).items():
                for metric, value in metrics.items():
                    if "_stderr" not in metric:
                        found.setdefault((task, metric), []).append(value)
        return {column: values for column, values in found.items() if len(values) == len(self.runs)}

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens that go through a step in a second, as its seconds are timed."""
        own = self.seconds("wall")
        if not own:
            return None
        return fmean(run["tokens_per_second"] * step_seconds(run, "wall") for run in self.timed) / own

    @property
    def probabilities(self) -> list[float] | None:
        """Each layer's computed chance to be active, the mean over a run and seeds; ``None`` if not known."""
        columns = [run["inclusion_probabilities"] for run in self.runs]
        if not columns or any(column is None for column in columns):
            return None
        return [sum(values) / len(values) for values in zip(*columns, strict=True)]

    @property
    def shares(self) -> list[float]:
        """Each layer's share of the steps in which it trained, the mean over seeds."""
        if not self.runs:
            return []
        counts = [0.0] * len(self.runs[0]["layers"])
        for run in self.runs:
            steps = len(run["training_loss"])
            for first, last, active in run["active"]:
                for index in active:
                    counts[index] += (last - first + 1) / steps / len(self.runs)
        return counts
