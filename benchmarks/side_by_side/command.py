"""Compare samplers and baselines side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import TaskID

from layersample.cli.display import make_bar, plain
from layersample.cli.groups import PanelGroup
from layersample.errors import ConfigError
from layersample.files import check_output
from layersample.option_files import parse_pairs, read_yaml

from ..methods.catalog import list_baselines
from .suite import ALL, Job, MethodEntry, Suite, builtin_suites, make_suite, read_builtin

_FLAGS = {
    "methods",
    "plugin",
    "model",
    "task",
    "answer_marker",
    "seeds",
    "steps",
    "learning_rates",
    "search_steps",
    "baseline",
    "options",
}
_OTHER_KEYS = ", ".join(key for key in Suite.model_fields if key not in _FLAGS)
app = typer.Typer(
    cls=PanelGroup,
    help="Samplers and baselines side by side, measured and tested.",
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode=None,
    epilog="layersample benchmark --suite quick\n"
    "layersample benchmark --methods lisa,owlore,lora --steps 60 --seeds 3\n"
    "layersample benchmark report runs/benchmark",
)
console = Console()


@app.callback()
def benchmark(
    context: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            help="YAML file of a suite, or default, sarcasm, quick. Without it: that of the output, or default."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Samplers, SAMPLER+PROJECTION, baselines, rows of the suite, or all; with commas."),
    ] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Python file with samplers or baselines of your own.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Built-in name, local folder or hub id.")] = None,
    task: Annotated[
        str | None, typer.Option(help="gsm_symbolic, sarcasm, or data as train takes it.")
    ] = None,
    answer_marker: Annotated[
        str | None, typer.Option(help="Text that the answer follows, in data of your own.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="How many, or which ones, with commas.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a run.")] = None,
    lr_grid: Annotated[
        str | None, typer.Option(help="Learning rates to try for every method, with commas; one: no search.")
    ] = None,
    search_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of a run that tries a rate.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The method that the others are compared with.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE of `layersample train`, for every method; may be repeated."),
    ] = None,
    set_key: Annotated[
        list[str] | None,
        typer.Option("--set", help=f"KEY=VALUE of another key of a suite; may be repeated: {_OTHER_KEYS}."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; a benchmark in it is continued.")
    ] = Path("runs/benchmark"),
) -> None:
    """Run every method with every seed, each in a process of its own, and write a report.

    Without options: the default suite, hours on two cores. Stopped at any time, the same command goes on with it.
    """
    if context.invoked_subcommand is not None:
        return
    check_output(output)
    sources = _sources(suite, output)
    given: dict[str, Any] = {
        "methods": None if methods is None else _rows(_split(methods), make_suite(*sources)),
        "plugin": plugin,
        "model": model,
        "task": task,
        "answer_marker": answer_marker,
        "seeds": None if seeds is None else _seeds(seeds),
        "steps": steps,
        "learning_rates": None if lr_grid is None else _split(lr_grid),
        "search_steps": search_steps,
        "baseline": baseline,
        **parse_pairs(set_key or [], "--set"),
    }
    if option:
        given["options"] = {**sources[-1][1].get("options", {}), **parse_pairs(option, "--option")}
    asked = make_suite(*sources, ("command line", {k: v for k, v in given.items() if v is not None}))
    if lr_grid is not None:  # for every method, so those of rows don't win
        rows = [
            row if isinstance(row, str) else row.model_copy(update={"learning_rates": None})
            for row in asked.methods
        ]
        asked = asked.model_copy(update={"methods": rows})
    _run(asked, output, jobs)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a benchmark.")],
    baseline: Annotated[
        str | None,
        typer.Option(help="The method that the others are compared with, in place of the suite's."),
    ] = None,
) -> None:
    """Write the report of a benchmark anew, finished or not."""
    from .report import write_report

    written = ", ".join(write_report(folder, baseline))
    console.print(f"Written to {plain(folder)}: {written}", highlight=False, soft_wrap=True)


class LiveBenchmark:
    """A bar for all runs and one for each that goes on; without a terminal, a line for each run that ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._runs: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._bar = make_bar(console)

    def begin(self, runs: int, done: int) -> None:
        """Show the bar of all runs."""
        if done:
            self._console.print(f"{done} of {runs} runs are there already.", highlight=False)
        self._runs = self._bar.add_task("all runs", total=runs, completed=done, status="")
        self._bar.start()

    def step(self, job: Job, step: int, steps: int, loss: float) -> None:
        """Move the bar of a run."""
        if job.key not in self._tasks:
            self._tasks[job.key] = self._bar.add_task(job.key, total=steps, status="")
        self._bar.update(self._tasks[job.key], completed=step, status=f"loss {loss:.3f}")

    def end_run(self, job: Job, measured: dict[str, Any]) -> None:
        """Take the bar of a run away, and say how it ended."""
        if job.key in self._tasks:
            self._bar.remove_task(self._tasks.pop(job.key))
        if "error" in measured:
            words = f"[red]failed:[/] {plain(measured['error'])}"
        else:
            words = f"held-out loss {measured['loss']['held_out'][-1]:.4f}"
        self._console.print(f"{plain(job.key)}: {words}", highlight=False, soft_wrap=True)
        if self._runs is not None:
            self._bar.advance(self._runs)

    def more(self, runs: int) -> None:
        """Make room for them in the bar of all runs."""
        if self._runs is not None:
            self._bar.update(self._runs, total=(self._bar.tasks[self._runs].total or 0) + runs)

    def end(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()


def _run(suite: Suite, output: Path, jobs: int) -> None:
    # Seconds of imports that writing a report doesn't need.
    from layersample.environment import slow_bf16_warning

    from .report import write_report
    from .runner import run_suite

    if ALL in suite.methods:
        for method in list_baselines().values():
            if not method.is_installed and method.extra is not None:
                pip = plain(f'pip install "layersample[{method.extra[1]}]"')
                console.print(
                    f"Left out: {method.name}, which needs {method.extra[0]}: {pip}", highlight=False
                )
    if slow := slow_bf16_warning(str(suite.options.get("precision", ""))):
        console.print(slow, highlight=False)
    progress = LiveBenchmark(console)
    command = shlex.join(["layersample", *sys.argv[1:]])
    try:
        run_suite(suite, output, jobs=jobs, command=command, progress=progress)
    except KeyboardInterrupt as error:
        progress.end()
        Console(stderr=True).print(
            f"Interrupted. The same command goes on; layersample benchmark report {output} shows what is done.",
            soft_wrap=True,
        )
        raise typer.Exit(130) from error
    finally:
        progress.end()
    written = ", ".join(write_report(output))
    console.print(f"Written to {plain(output)}: {written}", highlight=False, soft_wrap=True)


def _sources(suite: str | None, output: Path) -> list[tuple[str, dict[str, Any]]]:
    """The suite asked for; where none is, that of the output if it has results."""
    if suite is None:
        stored = output / "suite.yaml"
        if stored.is_file():
            return [(str(stored), read_yaml(stored))]
        suite = "default"
    if suite in builtin_suites() or not Path(suite).suffix:
        return [(f"suite {suite}", read_builtin(suite))]
    return [(suite, read_yaml(Path(suite)))]


def _rows(names: list[str], suite: Suite) -> list[MethodEntry | str]:
    """The rows of those names, with options of their own where the suite gives them some."""
    own = {row.name: row for row in suite.methods if isinstance(row, MethodEntry)}
    return [own.get(name, name) for name in names]


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in _split(text)]
    except ValueError as error:
        raise ConfigError(
            f"command line: seeds must be a number or numbers with commas, but got {text!r}."
        ) from error
    if len(numbers) == 1 and "," not in text:
        if numbers[0] < 1:
            raise ConfigError(f"command line: seeds must be at least 1, but got {numbers[0]}.")
        return list(range(numbers[0]))
    return numbers
