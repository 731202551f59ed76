"""Compare samplers and baselines side by side."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from layersample.cli.consoles import console, errors, plain
from layersample.cli.groups import PanelCommand, PanelGroup
from layersample.errors import ConfigError
from layersample.files import check_output
from layersample.option_files import parse_pairs, read_yaml

from ..methods.catalog import list_baselines
from .entries import MethodEntry
from .live import LiveBenchmark
from .seeds import read_seeds
from .suite import ALL, Suite, make_suite
from .suite_files import builtin_suites, read_builtin, read_stored_keys, write_example

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
    "lm_eval",
}
_SEEDS_HELP = "How many, or which ones: 4,9 or 8-23."
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


@app.callback()
def benchmark(
    context: typer.Context,
    suite: Annotated[
        str | None,
        typer.Option(
            help="YAML file of a suite, or a built-in one (quick, time-gsm, …). Without it: the output's, or default."
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
        str | None,
        typer.Option(
            help="A built-in task (gsm_symbolic, chain_sum, sarcasm, …), or data as train takes it."
        ),
    ] = None,
    answer_marker: Annotated[
        str | None, typer.Option(help="Text that the answer follows, in data of your own.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help=_SEEDS_HELP)] = None,
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
    lm_eval: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness to score the trained models on, with commas."),
    ] = None,
    set_key: Annotated[
        list[str] | None,
        typer.Option("--set", help=f"KEY=VALUE of another key of a suite; may be repeated: {_OTHER_KEYS}."),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    output: Annotated[
        Path, typer.Option(help="Folder of the results; a benchmark in it is continued.")
    ] = Path("runs/benchmark"),
    write_suite: Annotated[
        Path | None, typer.Option(help="Write a commented example of a suite there, and do nothing else.")
    ] = None,
) -> None:
    """Run every method with every seed, each in a process of its own, and write a report.

    Without options: the default suite, hours on two cores. Stopped at any time, the same command goes on with it.
    """
    if context.invoked_subcommand is not None:
        return
    if write_suite is not None:
        write_example(write_suite)
        console.print(f"Written: {plain(write_suite)}", highlight=False, soft_wrap=True)
        return
    check_output(output)
    sources = _sources(suite, output)
    given: dict[str, Any] = {
        "methods": None if methods is None else _rows(_split(methods), make_suite(*sources)),
        "plugin": plugin,
        "model": model,
        "task": task,
        "answer_marker": answer_marker,
        "seeds": None if seeds is None else read_seeds(seeds),
        "steps": steps,
        "learning_rates": None if lr_grid is None else _rates(lr_grid),
        "search_steps": search_steps,
        "baseline": baseline,
        "lm_eval": None if lm_eval is None else _split(lm_eval),
        **parse_pairs(set_key or [], "--set"),
    }
    if option:
        given["options"] = {**make_suite(*sources).options, **parse_pairs(option, "--option")}
    asked = make_suite(*sources, ("command line", {k: v for k, v in given.items() if v is not None}))
    # For every method, so those of rows don't win.
    if alike := {key: None for key in ("learning_rates", "seeds") if given[key] is not None}:
        rows = [row if isinstance(row, str) else row.model_copy(update=alike) for row in asked.methods]
        asked = asked.model_copy(update={"methods": rows})
    _run(asked, output, jobs)


@app.command(
    "recipes",
    cls=PanelCommand,
    epilog="layersample benchmark recipes --suite search-gsm --output runs/recipes",
)
def recipes(
    suite: Annotated[
        str | None,
        typer.Option(
            help="YAML file of a suite with recipes, or a built-in one. Without it: that of the output."
        ),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Runs at a time.")] = 1,
    output: Annotated[Path, typer.Option(help="Folder of the results; a search in it is continued.")] = Path(
        "runs/recipes"
    ),
) -> None:
    """Search options that win, then confirm them.

    The search uses the validation split; what it finds runs on fresh seeds and the test split.
    """
    check_output(output)
    if suite is None and not (output / "suite.yaml").is_file():
        raise ConfigError("A search for recipes needs --suite, or an --output that holds one.")
    _run(make_suite(*_sources(suite, output)), output, jobs, with_recipes=True)


@app.command(
    "report",
    cls=PanelCommand,
    epilog="layersample benchmark report runs/benchmark --baseline lisa",
)
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a benchmark.")],
    baseline: Annotated[
        str | None,
        typer.Option(help="The method that the others are compared with, in place of the suite's."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help=f"Of these seeds alone. {_SEEDS_HELP}")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Of these rows alone, with commas: corrected for comparisons among them."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write it to, in place of the benchmark's own.")
    ] = None,
) -> None:
    """Write the report of a benchmark anew, finished or not."""
    from .report import write_report

    chosen = None if seeds is None else read_seeds(seeds)
    rows = None if methods is None else _split(methods)
    written = ", ".join(write_report(folder, baseline, chosen, output, rows))
    console.print(f"Written to {plain(output or folder)}: {written}", highlight=False, soft_wrap=True)


def _run(suite: Suite, output: Path, jobs: int, *, with_recipes: bool = False) -> None:
    # Seconds of imports that writing a report doesn't need.
    from layersample.bf16_products import how_bf16_is_computed
    from layersample.cli.quiet import quiet_libraries

    from .recipe_runner import run_recipes
    from .report import write_report
    from .results import has_runs
    from .runner import run_suite

    quiet_libraries(reads_data=True)
    run = run_recipes if with_recipes else run_suite
    if ALL in suite.methods:
        for method in list_baselines().values():
            if not method.is_installed and method.extra is not None:
                pip = plain(f'pip install "layersample[{method.extra[1]}]"')
                console.print(
                    f"Left out: {method.name}, which needs {method.extra[0]}: {pip}", highlight=False
                )
    if said := how_bf16_is_computed(str(suite.options.get("precision", ""))):
        console.print(said, highlight=False)
    progress = LiveBenchmark(console)
    command = shlex.join(["layersample", *sys.argv[1:]])
    try:
        results = run(suite, output, jobs=jobs, command=command, progress=progress)
    except KeyboardInterrupt as error:
        progress.end()
        shown = f"; layersample benchmark report {output} shows what is done" if has_runs(output) else ""
        errors.print(f"Interrupted. The same command goes on{shown}.", soft_wrap=True)
        raise typer.Exit(130) from error
    finally:
        progress.end()
    written = ", ".join(write_report(output))
    console.print(f"Written to {plain(output)}: {written}", highlight=False, soft_wrap=True)
    if not any(line["stage"] == "final" and "error" not in line for line in results.lines()):
        raise ConfigError(f"No run has ended well; the end of {output / 'report.md'} says why.")


def _sources(suite: str | None, output: Path) -> list[tuple[str, dict[str, Any]]]:
    """The suite asked for; where none is, that of the output if it has results."""
    if suite is None:
        stored = output / "suite.yaml"
        if stored.is_file():
            return [(str(stored), read_stored_keys(stored))]
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


def _rates(text: str) -> list[float]:
    try:
        return [float(part) for part in _split(text)]
    except ValueError as error:
        raise ConfigError(
            f"command line: learning_rates must be numbers with commas, but got {text!r}."
        ) from error
