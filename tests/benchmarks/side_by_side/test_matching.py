"""What each method is given at equal time and at equal memory; with made-up measurements, but for one real run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from layersample import ConfigError
from layersample_benchmarks.methods.catalog import get_method
from layersample_benchmarks.side_by_side import pool
from layersample_benchmarks.side_by_side.analysis import analyze
from layersample_benchmarks.side_by_side.example_length import longest_example
from layersample_benchmarks.side_by_side.jobs import Job
from layersample_benchmarks.side_by_side.memory_match import DoesNotFitError, MemoryPlanner
from layersample_benchmarks.side_by_side.report import write_report
from layersample_benchmarks.side_by_side.results import Results, read_results
from layersample_benchmarks.side_by_side.runner import run_suite
from layersample_benchmarks.side_by_side.sections import matched
from layersample_benchmarks.side_by_side.suite import Suite

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

MadeUp = Callable[..., dict[str, Any]]
STEP = {"lora": 2.0, "lisa": 1.5, "full": 5.0, "slow": 500.0, "owlore": 1.5}
BEFORE = {"owlore": 31.0}
MEASURING = ("timing", "whole")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, made_up: MadeUp) -> list[Job]:
    """The runs that are started; each method takes its own time, and a peak of 100 MiB or 60."""
    seen: list[Job] = []

    def measure(self: Any, job: Job) -> dict[str, Any]:
        seen.append(job)
        cost = STEP[job.row]
        seconds = {"forward": cost / 2, "backward": cost / 2, "optimizer": 0.0, "sampling": 0.0}
        before = BEFORE.get(job.row, 0.0)
        spent = {"cpu": seconds, "wall": seconds, "before_training": {"cpu": before, "wall": before}}
        measured = made_up(job, 1.0 + job.seed / 10 + cost / 1000, seconds=spent)
        measured["peak_bytes"]["tensors"]["total"] = (60 if job.row == "lisa" else 100) * 2**20
        return measured if job.stage not in MEASURING else {**measured, "loss": None, "other_loss": None}

    monkeypatch.setattr(pool.Pool, "_measure", measure)
    return seen


def suite(**more: Any) -> Suite:
    keys: dict[str, Any] = {
        "methods": ["full", "lisa", "lora"],
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2, 1e-1],
        "search_extensions": 0,
        "match": "time",
        "steps": 20,
        "search_steps": 10,
        "timing_rounds": 2,
        "threads": 1,
    }
    return Suite(**{**keys, **more})


def page_of(folder: Path) -> str:
    write_report(folder)
    return (folder / "report.md").read_text()


def steps_of(jobs: list[Job], stage: str) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for job in jobs:
        if job.stage == stage:
            found.setdefault(job.row, set()).add(job.steps)
    return found


def test_each_method_has_the_steps_that_fit_the_reference_s_seconds(
    started: list[Job], tmp_path: Path
) -> None:
    """20 steps of LoRA take 40 seconds; its 10 of the search for a rate take 20."""
    run_suite(suite(), tmp_path)
    turns = [(job.row, job.seed) for job in started if job.stage == "timing"]
    assert turns == [(row, turn) for turn in range(2) for row in ("full", "lisa", "lora")], "in turns"
    assert steps_of(started, "final") == {"full": {8}, "lisa": {26}, "lora": {20}}
    assert steps_of(started, "search") == {"full": {4}, "lisa": {13}, "lora": {10}}
    shown = {row["name"]: row for row in matched(analyze(*read_results(tmp_path)))}
    assert (shown["lisa"]["given_seconds"], shown["lisa"]["used_seconds"]) == ("40.0", "39.0")
    page = page_of(tmp_path)
    assert "the time of lora at 20 steps" in page and "| lisa | 26 | – | 40.0 | 39.0 | 0.97 | 1.50 |" in page
    assert "Seconds are of a whole run a method, with nothing of the benchmark beside it" in page


def test_the_schedule_is_stretched_to_the_steps(started: list[Job], tmp_path: Path) -> None:
    run_suite(suite(options={"warmup": 0.25}), tmp_path)
    final = next(job for job in started if job.stage == "final" and job.row == "lisa")
    config = suite(options={"warmup": 0.25}).config(final)
    assert (config.steps, config.warmup) == (26, 0.25), "the Trainer's schedule runs over these steps"


def test_a_share_of_the_time_is_for_the_others_and_measuring_first_counts(
    started: list[Job], tmp_path: Path
) -> None:
    run_suite(suite(methods=["lora", "lisa", "owlore"], time_share=0.9, search_steps=20), tmp_path)
    assert steps_of(started, "final") == {"lora": {20}, "lisa": {24}, "owlore": {3}}, "(36 - 31) / 1.5"


def test_a_row_whose_step_takes_longer_than_all_says_so(started: list[Job], tmp_path: Path) -> None:
    slow = {"name": "slow", "method": "full"}
    said: list[str] = []
    results = run_suite(suite(methods=["lora", slow]), tmp_path, progress=Progress(said))
    errors = {line["key"]: line["error"] for line in results.lines() if "error" in line}
    assert errors == {
        "match/slow/time": "Not matched in time: a step takes 500 cpu seconds, but lora's steps leave 40. Raise steps."
    }
    assert {job.row for job in started if job.stage not in MEASURING} == {"lora"}
    assert said == ["slow: " + errors["match/slow/time"]]
    assert "match/slow/time" in page_of(tmp_path)


def test_a_share_of_the_time_that_is_too_little_is_named(started: list[Job], tmp_path: Path) -> None:
    slow = {"name": "slow", "method": "full"}
    results = run_suite(suite(methods=["lora", slow], time_share=0.5), tmp_path)
    assert [line["error"] for line in results.lines() if "error" in line] == [
        "Not matched in time: a step takes 500 cpu seconds, but 0.5 of lora's steps leave 20. Raise steps or time_share."
    ]


def test_what_was_decided_stays_and_only_missing_runs_are_run(started: list[Job], tmp_path: Path) -> None:
    """More seeds, later and on a busier machine: the same steps as before."""
    run_suite(suite(), tmp_path)
    before = len(started)
    run_suite(suite(), tmp_path)
    assert len(started) == before
    run_suite(suite(seeds=[0, 1, 2]), tmp_path)
    assert {(job.stage, job.row, job.seed, job.steps) for job in started[before:]} == {
        ("final", "full", 2, 8),
        ("final", "lisa", 2, 26),
        ("final", "lora", 2, 20),
    }


def test_a_row_can_come_later_without_the_reference(started: list[Job], tmp_path: Path) -> None:
    run_suite(suite(), tmp_path)
    before = len(started)
    run_suite(suite(methods=["owlore"], search_steps=10, steps=20), tmp_path)
    assert {job.row for job in started[before:]} == {"owlore"}
    errors = [line["error"] for line in read_results(tmp_path)[1] if "error" in line]
    assert errors == [
        "Not matched in time: a step takes 1.5 cpu seconds after 31 of what is done once, but lora's search_steps leave "
        "20. Raise search_steps."
    ]


def test_what_is_done_once_counts_but_is_no_part_of_a_step(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A basis that is kept: 10 seconds in the first step. The report goes by the timings, and says what runs took."""

    def measure(self: Any, job: Job) -> dict[str, Any]:
        cost = STEP[job.row] * (1.0 if job.stage in MEASURING else 1.2)  # beside other runs
        phases = {"forward": cost, "backward": 0.0, "optimizer": 0.0, "sampling": 0.0}
        once = {"cpu": 10.0 if job.row == "lisa" else 0.0, "wall": 0.0}
        spent = {
            "cpu": phases,
            "wall": phases,
            "before_training": {"cpu": 0.0, "wall": 0.0},
            "first_step": once,
        }
        return made_up(job, 1.0 + job.seed / 10, seconds=spent)

    monkeypatch.setattr(pool.Pool, "_measure", measure)
    run_suite(suite(methods=["lora", "lisa"]), tmp_path)
    analysis = analyze(*read_results(tmp_path))
    lisa, lora = analysis.row("lisa"), analysis.row("lora")
    assert len(lisa.runs[0]["training_loss"]) == 20, "(40 - 10) / 1.5"
    assert (lisa.training_seconds("cpu"), lora.training_seconds("cpu")) == (40.0, 40.0)
    assert lisa.used_seconds("cpu") == pytest.approx(46.0) and lisa.once_seconds("cpu") == 10.0


def by_depth(made_up: MadeUp, seen: list[Job]) -> Callable[..., dict[str, Any]]:
    """LoRA's step takes a second; full's nothing at first, .1 more each time; lisa's 2, and 1 from the fourth on."""
    costs: dict[str, Callable[[int], float]] = {
        "lora": lambda step: 1.0,
        "full": lambda step: 0.1 * step,
        "lisa": lambda step: 2.0 if step < 3 else 1.0,
    }

    def measure(self: Any, job: Job) -> dict[str, Any]:
        seen.append(job)
        each = [costs[job.row](step) for step in range(job.steps)]
        phases = {"forward": sum(each) / len(each), "backward": 0.0, "optimizer": 0.0, "sampling": 0.0}
        spent: dict[str, Any] = {"cpu": phases, "wall": phases, "before_training": {"cpu": 0.0, "wall": 0.0}}
        if job.stage == "whole":
            spent |= {"each": {"cpu": each, "wall": each}}
        return made_up(job, 1.0 + job.seed / 10, seconds=spent)

    return measure


def test_steps_that_cost_more_and_more_are_counted_one_by_one(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """BAdam goes from the cheapest layer to the dearest, so its first steps say nothing of the others."""
    seen: list[Job] = []
    monkeypatch.setattr(pool.Pool, "_measure", by_depth(made_up, seen))
    asked = suite(search_steps=20, timing_steps=4)
    run_suite(asked, tmp_path)
    # By four steps; and then once more, as a whole run of 11 says that 15 fit.
    assert steps_of(seen, "whole") == {"full": {133}, "lisa": {11, 15}, "lora": {20}}
    # 0 + .1 + … + 1.9 = 19 seconds; a step more, and it were 21. And 3 × 2 + 14 × 1; the mean of 11 steps would give 15.
    assert steps_of(seen, "final")["full"] == {20} and steps_of(seen, "final")["lora"] == {20}
    assert steps_of(seen, "final")["lisa"] == {15 + (20 - 18) * 15 // 18}, "beyond them by the mean"
    wholes = [job.row for job in seen if job.stage == "whole"]
    run_suite(asked, tmp_path)
    assert [job.row for job in seen if job.stage == "whole"] == wholes, "once"
    assert "Seconds are of a whole run a method" in page_of(tmp_path)
    assert analyze(*read_results(tmp_path)).row("full").training_seconds("cpu") == pytest.approx(19.0)
    given = {line["key"]: line for line in read_results(tmp_path)[1]}["match/full/time"]
    assert given["step_seconds"] == pytest.approx(19 / 20)
    # Stopped in the middle of them, it decides the same.
    path = tmp_path / "results.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{x}\n" for x in lines if '"timing/' in x or '"whole/lisa' in x))
    run_suite(asked, tmp_path)
    assert {line["key"]: line for line in read_results(tmp_path)[1]}["match/full/time"] == given
    assert [job.row for job in seen if job.stage == "whole"] == [*wholes, "full", "lora"]


def test_a_whole_run_has_the_lowest_rate_and_one_that_fails_says_so(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Job] = []
    measure = by_depth(made_up, seen)

    def fail(self: Any, job: Job) -> dict[str, Any]:
        if job.stage == "whole" and job.row == "lisa":
            seen.append(job)
            return {"error": "no more"}
        return measure(self, job)

    monkeypatch.setattr(pool.Pool, "_measure", fail)
    run_suite(suite(timing_steps=4), tmp_path)
    assert {job.learning_rate for job in seen if job.stage == "whole"} == {1e-3}
    assert steps_of(seen, "final").keys() == {"full", "lora"}
    assert "Not matched in time: timing lisa failed: no more" in page_of(tmp_path)


def test_folders_of_before_whole_runs_go_on_without_them(started: list[Job], tmp_path: Path) -> None:
    run_suite(suite(timing_whole=False), tmp_path)
    stored = tmp_path / "suite.yaml"
    stored.write_text(stored.read_text().replace("timing_whole: false\n", ""))
    before = len(started)
    run_suite(suite(timing_whole=False, seeds=[0, 1, 2]), tmp_path)
    assert {job.key for job in started[before:]} == {
        f"final/{row}/seed-2" for row in ("full", "lisa", "lora")
    }
    with pytest.raises(ConfigError, match="its timing_whole is False, but True is asked for now"):
        run_suite(suite(), tmp_path)


def test_by_short_runs_alone_more_is_used_than_given_and_the_page_says_so(
    made_up: MadeUp, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Job] = []
    monkeypatch.setattr(pool.Pool, "_measure", by_depth(made_up, seen))
    run_suite(suite(timing_steps=4, timing_whole=False), tmp_path)
    assert not steps_of(seen, "whole")
    assert (
        "Not at equal time by more than a tenth, in shares of lora's seconds in the same seeds: full (43."
        in page_of(tmp_path)
    )


def test_times_of_two_machines_are_never_compared(
    started: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_suite(suite(), tmp_path)
    measure = pool.Pool._measure

    def elsewhere(self: Any, job: Job) -> dict[str, Any]:
        measured: dict[str, Any] = measure(self, job)
        return {**measured, "environment": {**measured["environment"], "processor": "another one"}}

    monkeypatch.setattr(pool.Pool, "_measure", elsewhere)
    run_suite(suite(methods=["owlore"]), tmp_path)
    errors = [line["error"] for line in read_results(tmp_path)[1] if "error" in line]
    assert errors == [
        "Not matched in time: lora was timed on cpu, 1 thread, and owlore on another one, 1 thread."
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"match": "steps"}, "its match is 'time', but 'steps' is asked for now"),
        ({"match": "both"}, "its match is 'time', but 'both' is asked for now"),
        ({"match_to": "lisa"}, "its match_to is 'lora', but 'lisa' is asked for now"),
        ({"time_share": 0.5}, "its time_share is 1.0, but 0.5 is asked for now"),
    ],
)
def test_runs_of_another_match_are_never_mixed(
    change: dict[str, Any], message: str, started: list[Job], tmp_path: Path
) -> None:
    run_suite(suite(), tmp_path)
    before = (tmp_path / "results.jsonl").read_text()
    with pytest.raises(ConfigError, match=message):
        run_suite(suite(**change), tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == before


def test_results_of_before_the_match_was_a_key_are_still_theirs(tmp_path: Path) -> None:
    """At equal steps the other keys of a match mean nothing."""
    Results(tmp_path, suite(match="steps")).open().close()
    path = tmp_path / "suite.yaml"
    keys = ("match", "time_share", "memory_share", "timing_")
    lines = [line for line in path.read_text().splitlines() if not line.startswith(keys)]
    path.write_text("\n".join(lines))
    Results(tmp_path, suite(match="steps", timing_rounds=None)).open().close()


def test_a_reference_that_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="match_to: Unknown method of this suite 'lora'"):
        run_suite(suite(methods=["full", "lisa"]), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(
        ConfigError, match="timing_rounds must be at least 1 where match is 'time', but got 0"
    ):
        suite(timing_rounds=0).check()


def test_memory_is_planned_for_all_alike(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """Each row stays within the reference's plan, and one layer more wouldn't."""
    ends = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    two = {"name": "lisa", "options": {"num_active": 2}}
    rows = [
        two,
        {"name": "owlore", "method": "lisa", "options": ends},
        "full",
        {"name": "slow", "method": "badam"},
    ]
    tiny = make_tiny([*rows, "lora"], match="memory", match_to="lisa")
    run_suite(tiny, tmp_path)
    lines = {line["method"]: line for line in read_results(tmp_path)[1] if line["stage"] == "memory"}
    planner, limit = MemoryPlanner(tiny.model), lines["lisa"]["budget_bytes"]
    layers = AutoConfig.from_pretrained(tiny.model).num_hidden_layers
    assert lines["lisa"]["options"] == {} and lines["owlore"]["options"]["num_active"] >= 2
    for row, knob in ((1, "num_active"), (4, "rank")):
        entry = tiny.entries[row]
        chosen = lines[entry.name]["options"][knob]
        for value, fits in ((chosen, True), (chosen + 1, False)):
            config = tiny.config(tiny.search_job(entry, 1e-2)).model_copy(
                update={knob: value, "max_length": longest_example(tiny)}
            )
            if knob == "rank" or value <= layers:
                assert (planner.peak(entry.definition, config) <= limit) == fits
    assert (
        "it takes " in lines["full"]["error"]
        and "has no number of layers to choose" in lines["full"]["error"]
    )
    assert "but lisa's peak is 60.0 MiB" in lines["slow"]["error"], "measured, since it can't be planned"
    assert [job.row for job in started if job.stage == "peak"] == ["slow", "lisa"]
    finals = {job.row: job.options for job in started if job.stage == "final"}
    assert finals["owlore"] == lines["owlore"]["options"] and not {"full", "slow"} & finals.keys()


def test_a_row_can_come_later_at_equal_memory_too(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    run_suite(make_tiny(["lora", "lisa"], match="memory"), tmp_path)
    slow = {"name": "slow", "method": "badam"}
    run_suite(make_tiny(["owlore", slow], match="memory"), tmp_path)
    lines = {line["method"]: line for line in read_results(tmp_path)[1] if line["stage"] == "memory"}
    assert lines["owlore"]["budget_bytes"] == lines["lora"]["bytes"]
    assert "the memory of lora hasn't been measured: name it among the methods too" in lines["slow"]["error"]


def test_what_held_more_than_the_reference_is_named(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    """Plans are for the longest examples, and real ones needn't be alike."""
    lisa = {"name": "lisa", "options": {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}}
    run_suite(make_tiny(["lora", lisa], match="memory", memory_share=0.59), tmp_path)
    page = page_of(tmp_path)
    assert "0.59 of the planned memory of lora at 4 steps, which itself has all of it" in page
    assert "Held more MiB than 0.59 of lora's 100: lisa (60)." in page


def test_attention_counts_in_plans(make_tiny: Callable[..., Suite]) -> None:
    tiny = make_tiny(["full"], max_length=128)
    entry = tiny.entries[0]
    plain, eager = (
        MemoryPlanner(tiny.model, attention=name).peak(entry.definition, tiny.final_config(entry))
        for name in ("sdpa", "eager")
    )
    assert eager > plain, "it keeps all scores"


def test_both_times_what_the_memory_chose(
    started: list[Job], make_tiny: Callable[..., Suite], tmp_path: Path
) -> None:
    run_suite(make_tiny(["lora", "lisa"], match="both", memory_share=2.0, timing_rounds=1), tmp_path)
    chosen = next(line for line in read_results(tmp_path)[1] if line["key"] == "match/lisa/memory")["options"]
    timing = next(job for job in started if job.stage == "timing" and job.row == "lisa")
    assert timing.options == {**chosen, "period": 2}
    final = next(job for job in started if job.stage == "final" and job.row == "lisa")
    assert (final.options, final.steps) == (chosen, 5)


def test_less_than_one_layer_says_the_least(make_tiny: Callable[..., Suite]) -> None:
    tiny = make_tiny(["lisa", {"name": "fixed", "method": "lisa", "options": {"num_active": 3}}, "lora"])
    planner = MemoryPlanner(tiny.model)
    lisa, fixed, lora = ((e.definition, tiny.config(tiny.search_job(e, 1e-2))) for e in tiny.entries)
    least = planner.peak(lisa[0], lisa[1].model_copy(update={"num_active": 1}))
    with pytest.raises(DoesNotFitError, match=f"takes at least {least / 2**20:.1f} MiB, with one layer"):
        planner.fit(*lisa, least - 1, frozenset())
    assert planner.fit(*lisa, least, frozenset()).options == {"num_active": 1}
    with pytest.raises(DoesNotFitError, match="with num_active=3"):
        planner.fit(*fixed, least, frozenset({"num_active"}))
    assert planner.fit(*fixed, 10**9, frozenset({"num_active"})).options == {}
    drawn = lisa[1].model_copy(update={"draw_budget": "50%"})  # num_active has no say beside it
    taken = planner.peak(lisa[0], drawn)
    assert planner.fit(lisa[0], drawn, taken, frozenset()).options == {}
    with pytest.raises(DoesNotFitError, match="no number of layers to choose"):
        planner.fit(lisa[0], drawn, taken - 1, frozenset())
    small = planner.peak(*lora)
    more = planner.fit(*lora, int(1.2 * small), frozenset())
    assert more.options["rank"] > 16 and small < more.bytes <= 1.2 * small


def test_what_layers_leave_behind_counts_as_far_as_the_steps_go(make_tiny: Callable[..., Suite]) -> None:
    tiny = make_tiny(["lisa"], options={"period": 2, "precision": "bf16", "num_active": 1})
    entry = tiny.entries[0]
    config = tiny.config(tiny.search_job(entry, 1e-2))
    layers = AutoConfig.from_pretrained(tiny.model).num_hidden_layers
    none, one, every = (
        MemoryPlanner(tiny.model, steps).peak(entry.definition, config) for steps in (2, 4, None)
    )
    assert every - none == (layers - 1) * (one - none) > 0


def test_the_rank_of_adapters_is_an_option(make_tiny: Callable[..., Suite]) -> None:
    rows = ["lora", {"name": "wide", "method": "lora", "options": {"rank": 32}}]
    tiny = make_tiny(rows)
    tiny.check()
    ranks = [get_method("lora").adapter_rank(tiny.config(tiny.search_job(e, 1e-2))) for e in tiny.entries]
    assert ranks == [16, 32]


class Progress:
    def __init__(self, said: list[str]) -> None:
        self._said = said

    def begin(self, runs: int, done: int) -> None:
        self._said.clear()

    def step(self, job: Job, step: int, steps: int, loss: float) -> None: ...

    def end_run(self, job: Job, measured: dict[str, Any]) -> None: ...

    def more(self, runs: int) -> None: ...

    def say(self, text: str) -> None:
        self._said.append(text)
