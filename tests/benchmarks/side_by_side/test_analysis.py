from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from layersample_benchmarks.side_by_side.analysis import analyze
from layersample_benchmarks.side_by_side.charts import all_curves, memory_and_loss, time_and_loss
from layersample_benchmarks.side_by_side.entries import MethodEntry
from layersample_benchmarks.side_by_side.plain_words import best_trade_offs, describe, table
from layersample_benchmarks.side_by_side.power_words import power_afterwards
from layersample_benchmarks.side_by_side.report import findings
from layersample_benchmarks.side_by_side.sections import timing_words
from layersample_benchmarks.side_by_side.suite import Suite


@pytest.fixture
def lines(made_up: Callable[..., dict[str, Any]]) -> Callable[..., list[dict[str, Any]]]:
    """Lines of final runs: pairs of a method and its losses, one a seed."""

    def make(suite: Suite, losses: dict[str, list[float]], **more: Any) -> list[dict[str, Any]]:
        return [
            {
                "method": entry.name,
                "stage": job.stage,
                "seed": job.seed,
                "learning_rate": job.learning_rate,
                **made_up(job, losses[entry.name][job.seed], **more),
            }
            for entry in suite.entries
            for job in suite.final_jobs(entry, 1e-3)[: len(losses[entry.name])]
        ]

    return make


def test_estimates_and_the_front(lines: Callable[..., Any]) -> None:
    """Made-up memory grows with the loss, so the method with the lowest loss is the whole front."""
    suite = Suite(methods=["full", "lisa", "lora"], seeds=[0, 1], steps=4, learning_rates=[1e-3])
    analysis = analyze(suite, lines(suite, {"full": [1.0, 1.2], "lisa": [0.5, 0.6], "lora": [2.0]}))
    full, lisa, lora = analysis.rows
    assert full.loss is not None and full.loss.mean == pytest.approx(1.1) and full.difference is None
    assert lisa.difference is not None and lisa.difference.mean == pytest.approx(-0.55)
    assert lora.difference is not None and lora.difference.verdict == "not tested"
    assert analysis.front == ("lisa",)
    assert [row.name for row in analysis.finished] == ["lisa", "full", "lora"]
    assert (analysis.done, analysis.planned) == (5, 6)
    assert [(step, e.mean) for step, e in full.curve] == [(0, pytest.approx(2.1)), (4, pytest.approx(1.1))]
    assert full.forgotten is not None and full.forgotten.mean == pytest.approx(0.1)


def test_the_two_fronts_are_of_memory_and_of_time(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["full", "lisa", "lora"], seeds=[0, 1], steps=4, learning_rates=[1e-3])
    # Seconds, bytes and loss: lora is best in nothing but bytes, lisa in seconds, full in loss.
    costs = {"full": (3.0, 300, 1.0), "lisa": (1.0, 200, 2.0), "lora": (2.0, 100, 3.0)}
    found = []
    for name, (seconds, size, loss) in costs.items():
        for line in lines(suite, {"full": [loss] * 2, "lisa": [loss] * 2, "lora": [loss] * 2}):
            if line["method"] == name:
                line["seconds"] = {**line["seconds"], "cpu": {"forward": seconds}}
                line["peak_bytes"]["tensors"]["total"] = size
                found.append(line)
    analysis = analyze(suite, found)
    assert analysis.front == ("lora", "lisa", "full") and analysis.fast_front == ("lisa", "full")


def test_shares_and_probabilities(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["full"], seeds=[0, 1], steps=8, learning_rates=[1e-3])
    row = analyze(suite, lines(suite, {"full": [1.0, 1.0]})).rows[0]
    assert row.shares == pytest.approx([0.25, 0.75, 0.75])  # steps 1-2 and 3-8
    assert row.probabilities == [0.5, 0.5, 0.5]
    unknown = analyze(suite, lines(suite, {"full": [1.0, 1.0]}, inclusion_probabilities=None)).rows[0]
    assert unknown.probabilities is None
    assert row.seconds("cpu") == pytest.approx(3.51) and row.seconds("cpu", "backward") == 2.0
    assert row.tensor_bytes() == 200 and row.tensor_bytes("gradients") == 20


def test_rates_that_were_tried(lines: Callable[..., Any], made_up: Callable[..., Any]) -> None:
    suite = Suite(methods=["lisa"], seeds=[0], learning_rates=[1e-4, 1e-3, 1e-2])
    job = suite.search_job(suite.entries[0], 1e-3)
    measured = {1e-4: {"error": "nan"}, 1e-3: made_up(job, 2.0), 1e-2: {"error": "nan"}}
    searches = [
        {"key": f"{rate}", "method": "lisa", "stage": "search", "seed": 0, "learning_rate": rate, **result}
        for rate, result in measured.items()
    ]
    row = analyze(suite, [*searches, *lines(suite, {"lisa": [1.0]})]).rows[0]
    assert [(trial.rate, trial.loss) for trial in row.trials] == [(1e-4, None), (1e-3, 2.0), (1e-2, None)]
    assert row.rate == 1e-3 and not row.at_edge
    assert [error for _, error in row.errors] == ["nan", "nan"]


def test_final_runs_of_another_rate_than_the_best_do_not_count(
    lines: Callable[..., Any], made_up: Callable[..., Any]
) -> None:
    suite = Suite(methods=["lisa"], seeds=[0], learning_rates=[1e-3, 1e-2])
    searches = [
        {"method": "lisa", "stage": "search", "seed": 0, "learning_rate": rate}
        | made_up(suite.search_job(suite.entries[0], rate), loss)
        for rate, loss in ((1e-3, 2.0), (1e-2, 1.0))
    ]
    finals = lines(suite, {"lisa": [1.0]})  # of 1e-3
    assert analyze(suite, [*searches, *finals]).done == 0
    one_rate = suite.model_copy(update={"learning_rates": [1e-3]})
    assert analyze(one_rate, [*searches, *finals]).done == 1, "that rate was asked for"


def test_seeds_that_are_no_longer_asked_for_do_not_count(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["lisa", "lora"], seeds=[0, 1, 2], learning_rates=[1e-3])
    stored = lines(suite, {"lisa": [1.0, 1.1, 5.0], "lora": [1.0, 1.2]})
    analysis = analyze(suite.model_copy(update={"seeds": [0, 1]}), stored)
    assert (analysis.done, analysis.planned) == (4, 4)
    assert analysis.rows[0].loss is not None and analysis.rows[0].loss.mean == pytest.approx(1.05)


def test_losses_of_another_machine_leave_the_seconds_to_the_one_that_was_timed(
    lines: Callable[..., Any], made_up: Callable[..., Any]
) -> None:
    suite = Suite(
        methods=["full", "lora"], seeds=[0, 1], steps=4, match="time", match_to="lora", learning_rates=[1e-3]
    )
    found = lines(suite, {"full": [1.0, 1.0], "lora": [2.0, 2.0]})
    for line in found:
        line["environment"] = {**line["environment"], "processor": "other", "gpu": "a GPU"}
        line["seconds"] = {**line["seconds"], "cpu": {"forward": 0.1}, "wall": {"forward": 0.1}}
    before = analyze(suite, found)
    assert before.clock == "wall" and not before.rows[0].timed_elsewhere
    for name, step in (("full", 6.0), ("lora", 3.0)):
        job = suite.whole_job(suite.entry(name), 4, {})
        spent = {
            "cpu": {"forward": step},
            "wall": {"forward": step},
            "before_training": {"cpu": 0.0, "wall": 0.0},
        }
        measured = made_up(job, 1.0, seconds=spent, tokens_per_second=7.0)
        found.append({"method": name, "stage": "whole", "seed": 0, "learning_rate": 1e-3, **measured})
    analysis = analyze(suite, found)
    full, lora = analysis.rows
    assert analysis.clock == "cpu" and analysis.machines == ("cpu, 1 thread",)
    assert full.timed_elsewhere and full.run_machines == lora.run_machines == {"other, a GPU, 1 thread"}
    assert full.training_seconds("cpu") == pytest.approx(24.0) and full.tokens_per_second == 7.0
    assert full.used_seconds("cpu") is None and full.used_beside(lora, "cpu") is None
    assert analysis.fast_front == ("lora", "full")
    assert timing_words(analysis.rows).endswith(
        "memory are of runs on another machine: other, a GPU, 1 thread."
    )
    assert "a GPU" not in timing_words(before.rows)
    assert not any("of several machines" in said for said in findings(analysis))
    only_full = analyze(
        suite, [line for line in found if (line["method"], line["stage"]) != ("lora", "whole")]
    )
    assert "Losses and memory of full are of runs on another" in timing_words(only_full.rows)
    assert any("Seconds are of several machines" in said for said in findings(only_full))
    found[0]["environment"] = {**found[0]["environment"], "processor": "a third"}
    assert any("Losses are of several machines" in said for said in findings(analyze(suite, found)))


def test_a_method_that_failed_in_some_seeds_is_not_compared_by_the_others(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["full", "lisa", "lora"], seeds=[0, 1, 2], steps=4, learning_rates=[1e-3])
    losses = {"full": [1.0, 1.2, 1.1], "lisa": [0.5, 0.61, 0.52], "lora": [2.0, 2.3, 2.1]}
    found = lines(suite, losses)
    assert analyze(suite, found).called("lower")
    lisa = next(line for line in found if line["method"] == "lisa" and line["seed"] == 1)
    lisa |= {"key": "final/lisa/seed-1", "error": "the loss is nan"}
    analysis = analyze(suite, found)
    row = analysis.row("lisa")
    assert row.failed == (1,) and len(row.runs) == 2
    assert row.difference is None and row.margin is None and not analysis.called("lower")
    assert [row.name for row in analysis.finished] == ["full", "lora", "lisa"] and analysis.front == ("full",)
    assert "Not compared, since the seeds that didn't fail would flatter them: lisa (seed 1)." in findings(
        analysis
    )
    assert (
        describe(row, analysis) == "lisa ends at 0.510 nats in 2 seeds and failed in 1, so it isn't compared."
    )
    assert analysis.row("lora").difference is not None
    assert "lisa" not in time_and_loss(analysis)


def test_nothing_is_compared_with_a_baseline_that_failed_in_some_seeds(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=[0, 1, 2], steps=4, learning_rates=[1e-3])
    found = lines(suite, {"full": [1.0, 1.2, 1.1], "lisa": [0.5, 0.61, 0.52]})
    found[2] |= {"key": "final/full/seed-2", "error": "the loss is nan"}
    analysis = analyze(suite, found)
    assert [row.difference for row in analysis.rows] == [None, None]
    assert "Nothing is compared: runs of full, the baseline, failed (seed 2)." in findings(analysis)


def test_rows_of_other_seeds_are_ranked_by_the_seeds_that_they_share_with_the_baseline(
    lines: Callable[..., Any],
) -> None:
    """Seed 0 is easy for all methods: lisa's mean is the lowest, and it loses to both in the seeds that it has."""
    entries: list[Any] = [MethodEntry(name="lisa", seeds=[0]), "full", "lora"]
    suite = Suite(methods=entries, seeds=[0, 1], steps=4, learning_rates=[1e-3])
    analysis = analyze(suite, lines(suite, {"full": [1.0, 3.0], "lora": [0.9, 2.8], "lisa": [1.1]}))
    assert [row.name for row in analysis.finished] == ["lora", "full", "lisa"]
    assert analysis.row("lisa").standing == pytest.approx(2.1) and analysis.row("full").standing == 2.0


def test_a_row_that_shares_no_seed_with_the_baseline_is_not_compared(lines: Callable[..., Any]) -> None:
    entries: list[Any] = [MethodEntry(name="lisa", seeds=[5]), "full"]
    suite = Suite(methods=entries, seeds=[0, 1], steps=4, learning_rates=[1e-3])
    found = lines(suite.model_copy(update={"seeds": [5]}), {"lisa": {5: 1.0}, "full": {}})
    found += lines(suite.model_copy(update={"methods": ["full"]}), {"full": [1.0, 1.2]})
    analysis = analyze(suite, found)
    row = analysis.row("lisa")
    assert row.difference is None and row.standing == 1.0
    assert "nan" not in describe(row, analysis) + str(table(analysis)) + memory_and_loss(analysis)


def test_nothing_is_called_best_where_all_but_one_failed(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["full", "lisa"], seeds=[0, 1], steps=4, learning_rates=[1e-3])
    found = lines(suite, {"full": [1.0, 1.2], "lisa": [0.5, 0.6]})
    for number in (1, 3):
        found[number] |= {"key": "k", "error": "nan"}
    analysis = analyze(suite, found)
    assert best_trade_offs(analysis) is None and time_and_loss(analysis) == memory_and_loss(analysis) == ""
    assert "its" not in describe(analysis.row("lisa"), analysis).split("so it")[0]
    for number in (2, 3):
        found[number] |= {"key": "k", "error": "nan"}
    assert "All runs failed of: lisa." in findings(analyze(suite, found))


def test_a_picture_says_what_rows_of_other_seeds_are_ranked_by(lines: Callable[..., Any]) -> None:
    entries: list[Any] = [MethodEntry(name="lisa", seeds=[0]), "full"]
    suite = Suite(methods=entries, seeds=[0, 1], steps=4, learning_rates=[1e-3])
    drawn = memory_and_loss(analyze(suite, lines(suite, {"full": [1.0, 3.0], "lisa": [1.1]})))
    assert "by the seeds shared with full" in drawn and "lisa: 1.100 nats" in drawn
    alike = suite.model_copy(update={"methods": ["full", "lisa"]})
    assert "shared" not in memory_and_loss(
        analyze(alike, lines(alike, {"full": [1.0, 3.0], "lisa": [1.1, 2.0]}))
    )


def test_what_seeds_can_show_is_said_for_each_number_of_them(lines: Callable[..., Any]) -> None:
    few, many = [1.0, 1.3, 1.1], [1.0, 1.3, 1.1, 1.4, 1.25]
    entries: list[Any] = ["full", "lora", MethodEntry(name="lisa", seeds=[0, 1, 2])]
    suite = Suite(methods=entries, seeds=[0, 1, 2, 3, 4], steps=4, learning_rates=[1e-3])
    losses = {"full": many, "lora": [0.9, 1.25, 1.1, 1.3, 1.2], "lisa": [0.9, 1.25, 1.1]}
    said = power_afterwards(analyze(suite, lines(suite, losses)))
    assert len(said) == 2
    assert said[0].startswith("With 5 seeds, as in 1 of the comparisons, a difference of ")
    assert said[1].startswith("With 3 seeds, as in 1 of the comparisons, a difference of ")
    alike = suite.model_copy(update={"methods": ["full", "lisa"], "seeds": [0, 1, 2]})
    (one,) = power_afterwards(analyze(alike, lines(alike, {"full": few, "lisa": losses["lisa"]})))
    assert one.startswith("With 3 seeds a difference of ")


def test_seconds_a_step_are_those_of_as_many_steps_as_the_runs_have(
    lines: Callable[..., Any], made_up: Callable[..., Any]
) -> None:
    suite = Suite(methods=["lisa"], seeds=[0], steps=2, learning_rates=[1e-3])
    kinds = ("cpu", "wall")
    spent = {
        **{kind: {"forward": 2.0, "backward": 1.0} for kind in kinds},
        "each": {kind: [1.0, 2.0, 3.0, 6.0] for kind in kinds},  # the mean is 3, that of the first two 1.5
        "before_training": dict.fromkeys(kinds, 10.0),
    }
    job = suite.whole_job(suite.entries[0], 4, {})
    whole = {"method": "lisa", "stage": "whole", "seed": 0, "learning_rate": 1e-3} | made_up(
        job, 1.0, seconds=spent
    )
    row = analyze(suite, [*lines(suite, {"lisa": [1.0]}), whole]).rows[0]
    assert row.seconds("cpu") == pytest.approx(1.5) and row.seconds("cpu", "forward") == 2.0
    assert row.training_seconds("cpu") == pytest.approx(13.0)
    alone = whole["tokens_per_second"]
    assert row.tokens_per_second == pytest.approx(2 * alone), "a step takes half as long as the mean one"


def test_seconds_of_several_machines_are_compared_nowhere(lines: Callable[..., Any]) -> None:
    suite = Suite(
        methods=["full", "lora"], seeds=[0, 1], steps=4, match="time", match_to="full", learning_rates=[1e-3]
    )
    found = lines(suite, {"full": [1.0, 1.1], "lora": [2.0, 2.2]})
    alike = analyze(suite, found)
    assert "of its seconds" in describe(alike.row("lora"), alike) and "<svg" in time_and_loss(alike)
    assert "CPU seconds" in all_curves(alike)
    for line in found:
        if line["method"] == "lora":
            line["environment"] = {**line["environment"], "instructions": "others"}
    mixed = analyze(suite, found)
    assert "seconds" not in describe(mixed.row("lora"), mixed) and time_and_loss(mixed) == ""
    assert "memory" in describe(mixed.row("lora"), mixed) and "optimizer step" in all_curves(mixed)
    assert {numbers["timed_on"] for numbers in table(mixed)} == {"cpu, 1 thread", "cpu, others, 1 thread"}


def test_runs_of_several_machines_are_set_beside_those_of_their_own(lines: Callable[..., Any]) -> None:
    suite = Suite(methods=["full", "lora"], seeds=[0, 1], steps=4, learning_rates=[1e-3])
    found = lines(suite, {"full": [1.0, 1.1], "lora": [2.0, 2.2]})
    for line in found:
        slow = line["seed"] == 1
        line["environment"] = {**line["environment"], "instructions": "slow" if slow else "fast"}
        step = (10.0 if slow else 1.0) * (2.0 if line["method"] == "full" else 1.0)
        line["seconds"] = {**line["seconds"], "cpu": {"forward": step}}
    full, lora = analyze(suite, found).rows
    assert full.used_beside(lora, "cpu") == pytest.approx(2.0, rel=0.2)
    swapped = found[2]["environment"]
    found[2]["environment"], found[3]["environment"] = found[3]["environment"], swapped
    full, lora = analyze(suite, found).rows
    assert full.used_beside(lora, "cpu") is None, "no seed of both was run on one machine"
