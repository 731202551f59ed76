"""The report of a benchmark: one HTML page that needs nothing else, and the same as Markdown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from layersample.errors import ConfigError
from layersample.files import check_output, write_text

from . import charts
from .analysis import Analysis, analyze
from .clock import PHASES
from .comparison import Difference
from .plain_words import as_csv, best_trade_offs, describe, table
from .power import CHANCE
from .power_words import power_table
from .results import read_results
from .rows import Row
from .sections import harness, match_words, matched, out_of_time, sentences, timing_words, tried
from .selection import select
from .stored_lines import KINDS, Line, machine_of
from .tasks import get_task
from .tried import read_tried
from .wording import DASH, interval, mib, number, p_value, seconds, signed, with_interval

PICTURES = {
    "time": charts.time_and_loss,
    "memory": charts.memory_and_loss,
    "differences": charts.differences,
    "curves": charts.all_curves,
}
_OWN = {"report.html", "report.md", "table.csv", "table.json", *(f"{name}.svg" for name in PICTURES)}


def write_report(
    folder: Path,
    baseline: str | None = None,
    seeds: Sequence[int] | None = None,
    output: Path | None = None,
    methods: Sequence[str] | None = None,
) -> list[str]:
    """Write ``report.html``, ``report.md`` and its pictures from what a benchmark's folder holds.

    Args:
        folder: With ``suite.yaml`` and ``results.jsonl``.
        baseline: The method that the others are compared with; that of the suite by default.
        seeds: Those that count; all of the suite by default.
        output: A folder to write them to, new, empty or of an earlier report; the benchmark's own by default.
        methods: Names of the rows that count, in any order; all of the suite by default. Differences are corrected for
            comparisons among them alone.

    Returns:
        Names of the files.

    Raises:
        ConfigError: If the folder holds no benchmark, no run has ended, no row is the baseline, a seed or a method
            isn't one of the suite, the methods lack one that others are compared with, or it can't be written.
    """
    whole, lines = read_results(folder)
    if output is not None:
        _check_place(output)
    suite = whole
    if baseline is not None:
        suite = suite.model_copy(update={"baseline": baseline})
        suite.check_references()
    suite, lines = select(suite, lines, seeds=seeds, methods=methods)
    if not lines:
        raise ConfigError(
            f"At least one run must have ended, but {folder} holds none. Run the benchmark first."
        )
    analysis = analyze(suite, lines)
    command = folder / "command.txt"
    commands = command.read_text(encoding="utf-8", errors="replace").splitlines() if command.is_file() else []
    pictures = {name: draw(analysis) for name, draw in PICTURES.items()} if analysis.finished else {}
    stored = {f"{name}.svg": _alone(svg) for name, svg in pictures.items() if svg}
    names = {entry.name for entry in suite.entries}
    shown = {
        **view(analysis, lines, commands, pictures),
        "all_seeds": None if seeds is None else len(whole.all_seeds),
        "all_rows": len(whole.entries) if len(suite.entries) < len(whole.entries) else None,
        "searches": [tried(x) for x in read_tried(folder) if x["chosen"]["name"] in names],
    }
    files = {
        "report.html": _template("report.html.jinja", autoescape=True).render(shown),
        "report.md": _template("report.md.jinja", autoescape=False).render(
            {**shown, "pictures": list(stored)}
        ),
        **stored,
        "table.csv": as_csv(numbers := table(analysis)),
        "table.json": json.dumps(numbers, indent=1) + "\n",
    }
    place = folder if output is None else output
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_text(place / name, text)
        for name in _OWN - files.keys():  # pictures of an earlier report
            (place / name).unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"The output folder must be writable, but: {error}.") from error
    return list(files)


def _check_place(output: Path) -> None:
    """Make sure that nothing but an earlier report is in a folder.

    Raises:
        ConfigError: If there is something else, or it can't be written.
    """
    check_output(output)
    other = sorted(path.name for path in output.iterdir() if path.name not in _OWN) if output.is_dir() else []
    if other or output.is_file():
        held = f"it holds {other[0]}" if other else "it is a file"
        raise ConfigError(
            f"The output of a report must be a folder that is new or empty, but {output}: {held}."
        )


def view(
    analysis: Analysis, lines: Sequence[Line], commands: Sequence[str], pictures: Mapping[str, str]
) -> dict[str, Any]:
    """What the templates show: numbers as text, pictures as SVG."""
    suite = analysis.suite
    finished = analysis.finished
    baseline = next((row for row in finished if row.name == suite.reference), None)
    measured = [line for line in lines if "environment" in line]
    environments = [line["environment"] for line in measured]
    return {
        "suite": suite,
        "task": get_task(suite.task, suite.answer_marker).name,
        "model": Path(suite.model).name,
        "other_text": Path(suite.other_text).name,
        "commands": commands,
        "analysis": analysis,
        "verdict": best_trade_offs(analysis),
        "findings": findings(analysis),
        "dates": _dates(lines),
        "script": Markup(_source("page.js")),
        "quality": [_quality(number, row, analysis) for number, row in enumerate(finished, 1)],
        "cost": [_cost(row) for row in finished],
        "has_as_trained": any(row.as_trained is not None for row in finished),
        "has_failed": any(row.failed for row in finished),
        "has_answers": any(row.right is not None for row in finished),
        "answers": min(suite.answers, suite.test_size),
        "has_device": any(row.device_bytes is not None for row in finished),
        "match": match_words(suite),
        "matched": matched(analysis),
        "power": power_table(analysis),
        "chance": CHANCE,
        "harness": harness(analysis),
        "timing": timing_words(finished),
        "search_seed": next((x["seed"] for x in lines if x["stage"] == "search"), suite.seeds[0]),
        "rates": [_rates(row) for row in analysis.rows if row.trials],
        "failures": [error for row in analysis.rows for error in row.errors],
        "pictures": {name: Markup(charts.themed(svg)) for name, svg in pictures.items()},
        "methods": [_method(row, baseline, analysis) for row in finished],
        "names": [(row.name, charts.VARIABLES[charts.color_of(row, analysis)]) for row in finished],
        "machines": sorted({machine_of(line) for line in measured}),
        "versions": {
            name: sorted({its["versions"][name] for its in environments if name in its["versions"]})
            for name in dict.fromkeys(name for its in environments for name in its["versions"])
        },
        "pythons": sorted({its["python"] for its in environments}),
        "revisions": sorted({its["git"] or "none" for its in environments}),
        "parameters": measured[0]["parameters"] if measured else None,
        "traced": _traced(suite.trace_every),
        "percent": f"{100 * suite.confidence:g}%",
    }


def findings(analysis: Analysis) -> list[str]:
    """What the numbers say, in sentences that say no more than they do."""
    name = analysis.suite.reference
    said = out_of_time(analysis)
    baseline = next((row for row in analysis.rows if row.name == name), None)
    if baseline is None or not baseline.runs:
        said.append(f"Nothing is compared: {name}, the baseline, has no run that ended well.")
    elif baseline.failed:
        said.append(f"Nothing is compared: runs of {name}, the baseline, failed ({_seeds(baseline.failed)}).")
    if names := [row.name for row in analysis.rows if row.failed and not row.runs and row is not baseline]:
        said.append(f"All runs failed of: {', '.join(names)}.")
    if rows := [row for row in analysis.rows if row.failed and row.runs and row is not baseline]:
        listed = ", ".join(f"{row.name} ({_seeds(row.failed)})" for row in rows)
        said.append(f"Not compared, since the seeds that didn't fail would flatter them: {listed}.")
    for verdict, words in (("lower", "Lower held-out loss than"), ("higher", "Higher held-out loss than")):
        if rows := analysis.called(verdict):
            listed = ", ".join(
                f"{row.name} ({signed(row.difference.mean)})" for row in rows if row.difference
            )
            said.append(f"{words} {name}: {listed}.")
    if rows := analysis.called("no difference shown"):
        listed = ", ".join(row.name for row in rows)
        said.append(
            f"No difference to {name} shown: {listed}. That means that these runs can't tell, not that there is none."
        )
    said += sentences(analysis)
    if rows := analysis.called("not tested"):
        said.append(f"Not tested, for want of seeds that differ: {', '.join(row.name for row in rows)}.")
    if len(analysis.front) > 1:
        said.append(f"No method here has both less memory and less loss than: {', '.join(analysis.front)}.")
    if not analysis.seconds_compare:
        said.append(
            f"Seconds are of several machines ({'; '.join(analysis.machines)}), so don't compare them."
        )
    if len(machines := sorted({machine for row in analysis.rows for machine in row.run_machines})) > 1:
        said.append(
            f"Losses are of several machines ({'; '.join(machines)}): the differences hold what these do to them."
        )
    if edges := [row.name for row in analysis.finished if row.at_edge]:
        said.append(
            f"Best at the lowest or highest rate tried, so perhaps better beyond: {', '.join(edges)}."
        )
    if lacking := analysis.planned - analysis.done:
        said.append(f"{lacking} of {analysis.planned} runs are not there (failed, or not run yet).")
    if waiting := sum(not row.runs and not row.errors for row in analysis.rows):
        said.append(
            f"{waiting} of {len(analysis.rows)} methods have no runs yet: with more of them the correction is "
            "stricter, and intervals are wider."
        )
    return said


def _seeds(failed: Sequence[int]) -> str:
    return f"{'seed' if len(failed) == 1 else 'seeds'} {', '.join(map(str, failed))}"


def verdict(difference: Difference | None, *, lower_is_better: bool = True) -> str:
    """A comparison in words: "no difference shown" where the interval contains zero."""
    if difference is None:
        return DASH
    if difference.verdict in ("lower", "higher"):
        return "better" if (difference.verdict == "lower") == lower_is_better else "worse"
    return difference.verdict


def _traced(every: int) -> str:
    return f"one step in {every} and the last" if every > 1 else "each step" if every else "no step"


def _quality(number: int, row: Row, analysis: Analysis) -> dict[str, Any]:
    is_baseline = row.name == analysis.suite.reference
    difference = row.difference
    return {
        "number": number,
        "name": row.name,
        "seeds": len(row.runs),
        "rate": f"{row.rate:.2g}" + ("*" if row.at_edge else ""),
        "loss": with_interval(row.loss),
        "as_trained": with_interval(row.as_trained),
        "difference": "baseline" if is_baseline else DASH if difference is None else signed(difference.mean),
        "interval": interval(difference),
        "p": p_value(None if difference is None else difference.p),
        "verdict": "baseline" if is_baseline else "failed" if row.failed else verdict(difference),
        "right": with_interval(row.right, 1, 100, "%"),
        "right_verdict": "baseline" if is_baseline else verdict(row.right_difference, lower_is_better=False),
        "forgotten": with_interval(row.forgotten, sign=True),
    }


def _cost(row: Row) -> dict[str, Any]:
    total = row.tensor_bytes()
    return {
        "name": row.name,
        "process": mib(row.process_bytes),
        "device": mib(row.device_bytes),
        "tensors": mib(total),
        "kinds": [mib(row.tensor_bytes(kind)) for kind in KINDS],
        "cpu": seconds(row.seconds("cpu")),
        "phases": [seconds(row.seconds("cpu", phase)) for phase in PHASES],
        "wall": seconds(row.seconds("wall")),
        "once": seconds(row.once_seconds("cpu")),
        "tokens": number(row.tokens_per_second, "{:,.0f}"),
        "trainable": _trainable(row),
        "coverage": number(row.mean(lambda run: 100 * run["coverage"]), "{:.0f}%"),
        "staleness": number(row.mean(lambda run: run["staleness"]), "{:.1f}"),
    }


def _trainable(row: Row) -> str:
    """The part of the parameters that trains at a time, and the part that moves without optimizer state."""
    trains = row.mean(lambda run: 100 * run["trainable_parameters"] / run["parameters"])
    moves = row.mean(lambda run: 100 * run.get("moving_parameters", 0.0) / run["parameters"])
    text = number(trains, "{:.1f}%")
    return f"{text}, and {number(moves, '{:.1f}%')} without state" if moves else text


def _rates(row: Row) -> dict[str, Any]:
    tried = [
        f"{trial.rate:g}: {'failed' if trial.loss is None else f'{trial.loss:.3f}'}"
        f"{f' ({trial.seeds} seeds)' if trial.seeds > 1 else ''}"
        for trial in row.trials
    ]
    return {"name": row.name, "tried": tried, "chosen": "none" if row.rate is None else f"{row.rate:g}"}


def _method(row: Row, baseline: Row | None, analysis: Analysis) -> dict[str, Any]:
    drawn = {
        "curve": charts.curve(row, baseline, charts.color_of(row, analysis)),
        "layers": charts.layers(row),
        "chances": charts.probabilities(row),
    }
    return {
        "name": row.name,
        "summary": row.summary,
        "words": describe(row, analysis),
        **{k: Markup(charts.themed(v)) for k, v in drawn.items()},
    }


def _dates(lines: Sequence[Line]) -> str:
    """When the runs were, as far as it was noted."""
    known = sorted({line["date"] for line in lines if "date" in line})
    return " to ".join(dict.fromkeys((known[0], known[-1]))) if known else "not noted"


def _source(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")


def _alone(svg: str) -> str:
    """A picture for a file of its own: on white, in a width of its own."""
    return svg.replace("<svg", '<svg width="640" style="background: #ffffff; font-family: sans-serif"', 1)


def _template(name: str, *, autoescape: bool) -> jinja2.Template:
    loader = jinja2.PackageLoader("layersample_benchmarks.side_by_side")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name)
