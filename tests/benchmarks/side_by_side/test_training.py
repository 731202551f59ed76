"""Runs of every kind of method on a tiny model, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from layersample import ConfigError, create_sampler, list_samplers
from layersample_benchmarks.methods.catalog import default_methods, get_method
from layersample_benchmarks.side_by_side import steps, training
from layersample_benchmarks.side_by_side.analysis import analyze
from layersample_benchmarks.side_by_side.jobs import Job, Stage
from layersample_benchmarks.side_by_side.scoring import HeldOut, score_held_out
from layersample_benchmarks.side_by_side.suite import Suite
from layersample_benchmarks.side_by_side.tasks import Task
from layersample_benchmarks.side_by_side.training import run_job

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:BAdam expect", "ignore:.*deprecated")

LAYER = 16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16  # parameters of a layer of the tiny model
EMBEDDING = 260 * 16
ALL = 4 * LAYER + 2 * EMBEDDING + 16


def run(
    suite: Suite, row: int = 0, seed: int = 0, stage: Stage = "final", rate: float = 1e-2
) -> dict[str, Any]:
    steps = suite.steps if stage == "final" else suite.search_steps
    result: dict[str, Any] = run_job(
        suite, Job(suite.entries[row].name, stage, seed, rate, steps), lambda step: None
    )
    return result


@pytest.mark.parametrize("name", default_methods())
def test_every_method_runs_and_is_measured(name: str, make_tiny: Callable[..., Suite]) -> None:
    """Each lowers the loss, and everything that the report shows is there."""
    measured = run(make_tiny([name]))
    assert measured["loss"]["steps"] == [0, 2, 4]
    assert measured["loss"]["held_out"][-1] < measured["loss"]["held_out"][0]
    assert len(measured["training_loss"]) == 4
    for kind in ("cpu", "wall"):
        assert all(
            measured["seconds"][kind][phase] > 0 for phase in ("forward", "backward", "optimizer", "sampling")
        )
    assert measured["tokens_per_second"] > 0
    assert measured["peak_bytes"]["process"] > 10**8
    tensors = measured["peak_bytes"]["tensors"]
    assert tensors["total"] == sum(tensors["at_peak"].values())
    assert measured["coverage"] > 0 and measured["staleness"] >= 0
    assert [span[0] for span in measured["active"]][0] == 1 and measured["active"][-1][1] == 4
    assert measured["environment"]["versions"]["torch"]


def test_the_loss_at_the_end_alone_is_the_last_of_several(make_tiny: Callable[..., Suite]) -> None:
    along, alone = (run(make_tiny(["lisa"], evaluations=count))["loss"] for count in (2, 0))
    assert alone["steps"] == [4] and alone["held_out"] == along["held_out"][-1:]


def test_choices_are_scored_with_the_loss_but_for_those_that_do_not_fit(
    make_tiny: Callable[..., Suite], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all of them by themselves, where some are so long that the held-out set has lost them."""
    rows = [{"prompt": f"{'x' * (3 + 17 * (i % 3 == 0))}{i}?", "completion": "ny"[i % 2]} for i in range(40)]
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = Task("choices", str(data), choices=("n", "y"))
    monkeypatch.setattr(training, "get_task", lambda *_: task)
    asked = Mock(wraps=training.share_right)
    monkeypatch.setattr(training, "share_right", asked)
    suite = make_tiny(["lisa"], task=str(data), test_size=10, answers=10)
    together = run(suite)["right"]
    [apart] = [call.args[3] for call in asked.call_args_list]
    assert 0 < len(apart) < 10 and all(len(row["prompt"]) > 16 for row in apart)
    untold = Mock(side_effect=lambda *given: HeldOut(score_held_out(*given).loss, None))
    for name, other in [("score_held_out", untold), ("choice_tokens", lambda *_: [])]:
        with monkeypatch.context() as patched:
            patched.setattr(training, name, other)
            assert run(suite)["right"] == pytest.approx(together)
            assert len(asked.call_args.args[3]) == 10
    assert 0 < together < 1, "or it shows nothing"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_run_has_the_attention_of_the_suite(
    attention: str, make_tiny: Callable[..., Suite], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", calls)
    losses = [run(make_tiny([name], attention=attention))["training_loss"][0] for name in ("lisa", "lora")]
    assert calls.called == (attention == "sdpa")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_frozen_weights_are_scored_as_saved_and_as_trained(
    form: str, make_tiny: Callable[..., Suite]
) -> None:
    frozen = {"name": form, "method": "lisa", "options": {"frozen_weights": form}}
    suite = make_tiny(["lisa", frozen])
    exact, rounded = run(suite, 0, rate=0.0), run(suite, 1, rate=0.0)
    assert (
        rounded["loss"]["held_out"] == exact["loss"]["held_out"]
    )  # nothing has trained, and nothing is rounded
    assert exact["loss"]["as_trained"] is None
    assert 0 < abs(rounded["loss"]["as_trained"] - rounded["loss"]["held_out"][-1]) < 0.1
    weights = [measured["peak_bytes"]["tensors"]["largest"]["weights"] for measured in (exact, rounded)]
    assert 0.5 * weights[0] < weights[1] < weights[0]
    assert rounded["other_loss"] == exact["other_loss"]


def test_qlora_trains_beside_four_bits_and_is_scored_on_the_exact_model_or_on_the_rounded_one(
    make_tiny: Callable[..., Suite],
) -> None:
    suite = make_tiny(["lora", "qlora", "qlora-4bit"])
    lora, qlora, rounded = (run(suite, row, rate=0.0) for row in range(3))
    for measured in (lora, qlora):  # adapters begin at zero
        assert measured["loss"]["held_out"] == pytest.approx(lora["loss"]["held_out"], rel=1e-4)
    assert lora["loss"]["as_trained"] is None
    assert 1e-5 < abs(qlora["loss"]["as_trained"] - qlora["loss"]["held_out"][-1]) < 0.1
    weights = [measured["peak_bytes"]["tensors"]["largest"]["weights"] for measured in (lora, qlora)]
    assert weights[1] < weights[0]
    assert qlora["trainable_parameters"] == lora["trainable_parameters"]
    assert rounded["loss"]["held_out"][-1] == qlora["loss"]["as_trained"]
    assert rounded["loss"]["as_trained"] is None, "its base stays in four bits: it trains with what is kept"
    assert rounded["training_loss"] == qlora["training_loss"]
    before = {measured["other_loss"]["before"] for measured in (lora, qlora, rounded)}
    assert len(before) == 1, "what is forgotten is counted from the model as it was loaded"
    assert 1e-5 < abs(rounded["other_loss"]["after"] - rounded["other_loss"]["before"]) < 0.1


@pytest.mark.parametrize("name", ["lisa", "owlore+galore", "lora", "lora-fa-peft", "badam"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_runs_of_one_method_and_seed_give_the_same_losses(
    name: str, precision: str, make_tiny: Callable[..., Suite]
) -> None:
    """To the bit, and whether memory is traced or not."""
    options = {"period": 2, "precision": precision}
    first, second = (run(make_tiny([name], trace_every=every, options=options)) for every in (1, 0))
    for key in ("training_loss", "loss", "other_loss", "active"):
        assert first[key] == second[key]
    other = run(make_tiny([name], options=options), seed=1)
    assert other["training_loss"] != first["training_loss"]


def test_every_method_has_the_same_problems_in_the_same_order(make_tiny: Callable[..., Suite]) -> None:
    """At a learning rate of 0 all of them see the same losses."""
    suite = make_tiny(["full", "lora_norm", "owlore", "cyclic+galore", "lora", "badam"])
    runs = [run(suite, row, rate=0.0) for row in range(6)]
    for measured in runs[1:]:
        assert measured["training_loss"] == pytest.approx(runs[0]["training_loss"], rel=1e-5)
        assert measured["loss"]["held_out"] == pytest.approx(runs[0]["loss"]["held_out"], rel=1e-5)
    assert runs[0]["loss"]["held_out"][0] == runs[0]["loss"]["held_out"][-1]
    assert runs[0]["other_loss"]["before"] == runs[0]["other_loss"]["after"]


def test_peak_bytes_are_those_of_the_arithmetic(make_tiny: Callable[..., Suite]) -> None:
    """fp32 weights, two fp32 moments and a step counter for each tensor that trains."""
    frozen = {"embeddings": "freeze", "head": "freeze", "norm": "freeze", "num_active": 1, "period": 2}
    rows = [
        "full",
        {"name": "lisa", "options": frozen},
        {"name": "kept", "method": "lisa-published", "options": {**frozen, "period": 1}},
        "badam",
    ]
    suite = make_tiny(rows, options={"period": 2}, trace_every=1)
    full, lisa, kept, badam = (run(suite, row) for row in range(4))
    for measured, trained, gradients, state in (
        (full, ALL, ALL, 2 * 4 * ALL + 39 * 4),
        (lisa, LAYER, LAYER, 2 * 4 * LAYER + 9 * 4),
        (kept, LAYER, LAYER, 2 * 4 * LAYER * len(seen(kept)) + 9 * 4 * len(seen(kept))),
        # Its fp32 copies of the active layer, the copies' gradients, and their moments.
        (badam, LAYER, LAYER, 3 * 4 * LAYER + 9 * 4),
    ):
        assert measured["trainable_parameters"] == trained
        assert measured["peak_bytes"]["gradients"] == 4 * gradients
        assert measured["peak_bytes"]["optimizer_state"] == state
        largest = measured["peak_bytes"]["tensors"]["largest"]
        assert largest["optimizer_state"] >= state
        assert largest["gradients"] == 4 * gradients
        # RoPE's frequencies are the only buffers, 4 numbers twice.
        assert largest["weights"] == 4 * (ALL + 2 * 4)


def test_what_moves_without_state_is_told_apart_from_what_was_drawn(make_tiny: Callable[..., Suite]) -> None:
    options = {"num_active": 1, "period": 1, "embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    above = {**options, "inactive": "sgd", "inactive_scope": "above"}
    suite = make_tiny(["full", {"name": "sgd", "method": "lisa", "options": above}])
    full, measured = run(suite, 0), run(suite, 1)
    assert full["trainable_parameters"] == ALL and full["moving_parameters"] == 0
    drawn = [active for _, _, active in measured["active"]]
    assert all(len(active) == 1 for active in drawn), "what is above it moves, but wasn't drawn"
    assert measured["coverage"] == len(seen(measured)) / 4
    assert measured["trainable_parameters"] == LAYER
    steps = [3 - active[0] for first, last, active in measured["active"] for _ in range(first, last + 1)]
    assert measured["moving_parameters"] == LAYER * sum(steps) / 4 and sum(steps)


def test_a_budget_is_kept_by_rows_that_sample_and_refused_by_the_others(
    make_tiny: Callable[..., Suite],
) -> None:
    suite = make_tiny(["cyclic", "lora"], options={"budget": "0.2", "embeddings": "freeze", "head": "freeze"})
    assert run(suite)["trainable_parameters"] == LAYER + 16, "a layer and the norm; two layers are .265"
    with pytest.raises(ConfigError, match="budget is for methods that sample layers, which 'lora' doesn't"):
        run(suite, row=1)


def test_tokens_of_all_batches_of_a_step_count(make_tiny: Callable[..., Suite]) -> None:
    """Half a batch twice is as many tokens as one batch."""

    def tokens(accumulation: int, size: int) -> list[int]:
        kept: list[int] = []
        suite = make_tiny(["lisa"], batch_size=size, options={"gradient_accumulation": accumulation})
        run_job(suite, Job("lisa", "final", 0, 1e-2, 4), lambda step: kept.append(step["tokens"]))
        return kept

    assert tokens(1, 4) == tokens(2, 2) and min(tokens(1, 4)) > 0


def seen(measured: dict[str, Any]) -> set[int]:
    return {index for _, _, active in measured["active"] for index in active}


@pytest.mark.parametrize(
    "options",
    [
        {"step_in_backward": True, "clip_by": "running"},
        {"state": "offload", "gradient_accumulation": 2},
        {"projection": "apollo", "embeddings": "freeze", "gradient_checkpointing": True},
    ],
)
def test_options_of_train_are_options_of_a_row(
    options: dict[str, Any], make_tiny: Callable[..., Suite]
) -> None:
    suite = make_tiny([{"name": "own", "method": "lisa", "options": options}], options={"precision": "bf16"})
    suite.check()
    measured = run(suite)
    assert measured["loss"]["held_out"][-1] < measured["loss"]["held_out"][0]
    assert options.items() <= measured["options"].items()
    tensors = measured["peak_bytes"]["tensors"]
    assert tensors["total"] == sum(tensors["at_peak"].values())


def test_layers_coverage_and_staleness(make_tiny: Callable[..., Suite]) -> None:
    suite = make_tiny(
        [{"name": "cyclic", "options": {"num_active": 1, "period": 1}}, "lora"], steps=3, trace_every=0
    )
    measured = run(suite)
    assert measured["active"] == [[1, 1, [0]], [2, 2, [1]], [3, 3, [2]]]
    assert measured["coverage"] == 0.75
    assert measured["staleness"] == (2 + 1 + 0 + 3) / 4
    assert measured["inclusion_probabilities"] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert measured["peak_bytes"]["tensors"] is None
    adapter = run(suite, 1)
    assert adapter["inclusion_probabilities"] is None and adapter["coverage"] == 1


def test_a_basis_that_is_kept_is_told_apart_from_a_step(make_tiny: Callable[..., Suite]) -> None:
    """GaLore's SVDs, of which a run of so few steps has those of its first step alone."""
    suite = make_tiny(["galore-published"], steps=4, trace_every=0)
    assert run(suite, stage="timing")["seconds"]["first_step"]["cpu"] > 0
    means = {"cpu": {"forward": 1.0, "sampling": 0.5, "optimizer": 2.0}}
    first = {"seconds": {"forward": {"cpu": 9.0}, "sampling": {"cpu": 1.0}, "optimizer": {"cpu": 8.0}}}
    assert steps._beyond_others(first, means) == {"cpu": 6.5}, "without kernels that forward sets up"
    assert steps._beyond_others({"seconds": {"optimizer": {"cpu": 1.0}}}, means) == {"cpu": 0.0}
    assert steps._beyond_others({**first, "traced": True}, means) == {"cpu": 0.0}


def test_the_revision_is_that_of_the_code_that_was_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    training.git_revision.cache_clear()
    first = training.git_revision()
    monkeypatch.setattr(training.subprocess, "run", Mock(side_effect=AssertionError("asked again")))
    assert training.git_revision() == first


def test_a_whole_run_has_the_seconds_of_each_step(make_tiny: Callable[..., Suite]) -> None:
    suite = make_tiny(["lisa"], search_steps=5)
    seconds, short = (run(suite, stage=stage)["seconds"] for stage in ("whole", "timing"))
    for kind in ("cpu", "wall"):
        each = seconds["each"][kind]
        assert len(each) == 5 and min(each) > 0
        assert sum(each) == pytest.approx(5 * sum(seconds[kind].values())), "the first one like the others"
    assert "each" not in short


def test_a_rate_is_searched_on_the_validation_split(make_tiny: Callable[..., Suite]) -> None:
    suite = make_tiny(["lisa"])
    search, final = run(suite, stage="search"), run(suite, rate=0.0)
    assert search["loss"]["steps"] == [2] and search["right"] is None
    unchanged = run(suite, stage="search", rate=0.0)
    assert unchanged["loss"]["held_out"][0] != final["loss"]["held_out"][0], "other problems than the test's"


def test_answers_must_be_readable(make_tiny: Callable[..., Suite]) -> None:
    suite = make_tiny(["lisa"], answer_marker="=", answers=3, answer_tokens=3)
    # The completions of the sums hold no marker.
    with pytest.raises(ConfigError, match="must hold an answer behind its marker"):
        run(suite)


def test_a_planted_better_method_is_called_better(make_tiny: Callable[..., Suite]) -> None:
    """Full fine-tuning at a sane rate against the same at a rate of 0; two rows of one method are no different."""
    rows = [
        {"name": "still", "method": "full", "learning_rates": [0.0]},
        {"name": "trained", "method": "full", "learning_rates": [1e-2]},
        {"name": "again", "method": "full", "learning_rates": [0.0]},
    ]
    suite = make_tiny(rows, learning_rates=None, baseline="still", seeds=[0, 1, 2], trace_every=0, steps=6)
    lines = [
        {
            "method": entry.name,
            "stage": "final",
            "seed": seed,
            "learning_rate": suite.rates(entry)[0],
            **run(suite, row, seed, rate=suite.rates(entry)[0]),
        }
        for row, entry in enumerate(suite.entries)
        for seed in suite.seeds
    ]
    analysis = analyze(suite, lines)
    verdicts = {row.name: row.difference.verdict for row in analysis.rows if row.difference}
    assert verdicts == {"trained": "lower", "again": "no difference shown"}


@pytest.mark.slow
def test_the_real_model_answers_real_problems(smollm2: Path) -> None:
    """The default suite's task, model and precision, for two steps."""
    suite = Suite(
        methods=["lisa+galore"],
        seeds=[0],
        steps=2,
        test_size=2,
        validation_size=2,
        other_size=1,
        answers=2,
        answer_tokens=8,
        evaluations=1,
        trace_every=2,
        options={"precision": "bf16", "embeddings": "freeze", "period": 2},
    )
    measured = run(suite, rate=1e-3)
    assert measured["loss"]["held_out"][-1] < measured["loss"]["held_out"][0]
    assert measured["right"] == 0.0, "no answer has as few as 8 tokens"
    assert measured["peak_bytes"]["tensors"]["at_peak"]["weights"] > 2 * 134_000_000
    assert measured["parameters"] == 134_515_008


def test_samplers_left_out_need_an_option_or_a_projection() -> None:
    for name in set(list_samplers()) - set(default_methods()):
        if list_samplers()[name].needs_projection:
            assert f"{name}+galore" in default_methods()
            continue
        with pytest.raises(ConfigError, match="needs the option"):
            create_sampler(name)
    assert get_method("full").summary
