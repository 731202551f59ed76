from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side.fingerprints import fingerprint
from layersample_benchmarks.side_by_side.recipe_runner import check_recipes
from layersample_benchmarks.side_by_side.suite import Suite, make_suite
from layersample_benchmarks.side_by_side.suite_files import builtin_suites, read_builtin


@pytest.mark.parametrize("name", builtin_suites())
def test_the_suites_that_come_along_are_good(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layersample_benchmarks.methods.method.Method.check_installed", lambda self: None)
    suite = make_suite((name, read_builtin(name)))
    suite.check()
    suite.check_references()
    kind, _, task = name.partition("-")
    references = dict.fromkeys(("time", "memory", "second"), "lora") | {
        "frozen": "lisa",
        "search": "full" if "full" in task else "lora",
    }
    assert suite.reference == references.get(kind, "full")
    if kind in ("time", "memory", "search"):
        assert len(suite.seeds) >= (8 if task.endswith("sarcasm") else 5)
        assert suite.match != "steps" and suite.match_to in ("lora", "full")
        assert not task.endswith("sarcasm") or suite.answers >= 1000
    assert bool(suite.recipes) == (kind == "search")
    if suite.recipes:
        pytest.importorskip("optuna")
        check_recipes(suite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["lisa", "liza"]}, "Unknown method 'liza'"),
        ({"methods": ["lisa owlore"]}, "Unknown method 'lisa owlore'"),
        ({"learning_rates": [1e-3, 1e-3]}, "must all be different .* 'lora' are 0.001, 0.001"),
        ({"learning_rates": [0, 1e-3]}, "where there are several, above 0"),
        ({"options": {"trainer": {"logging_steps": 10}}}, "must leave out logging_steps"),
        ({"options": {"trainer": 5}}, "suite: trainer: .* but got 5"),
        ({"options": {"trainer": {"learning_rate": 5.0}}}, "must leave out learning_rate"),
        ({"seeds": [0, 3, 3]}, "seeds must all be different, but 3 comes twice"),
        ({"seeds": [-1]}, r"seeds must be between 0 and 2\*\*32 - 1, but got -1"),
        (
            {"methods": [{"name": "lora", "seeds": [1, 4, 4]}]},
            "seeds must all be different, but 4 comes twice",
        ),
        (
            {"methods": [{"name": "lora", "seeds": 9}], "search_seed": 8},
            "none is measured, but 8 is among both",
        ),
        ({"methods": ["lora", "lisa", "lora"]}, "methods must all be different, but lora comes twice"),
        ({"options": {"perod": 3}}, "suite: Unknown option 'perod'. Did you mean 'period'"),
        ({"options": {"steps": 3}}, "options of 'lora' must leave out steps, which the suite sets"),
        ({"options": {"period": 0}}, "suite: period: .* but got 0"),
        ({"methods": [{"name": "lora", "options": {"warmup": -1}}]}, "method lora: warmup: .* but got -1"),
        (
            {"methods": [{"name": "lora", "options": {"sampler_options": {"x": 1}}}]},
            "Unknown option of sampler 'lisa' 'x'",
        ),
        (
            {"methods": [{"name": "a", "method": "lisa+galore", "options": {"rank": 0}}]},
            "method a: rank: .* but got 0",
        ),
        ({"answer_marker": "####", "task": "gsm_symbolic"}, "answer_marker is for data of your own"),
        ({"plugin": "no.py"}, "plug-in file must exist"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    suite = make_suite(("suite.yaml", {"methods": ["lora", "lisa"], **change}))
    with pytest.raises(ConfigError, match=message):
        suite.check()


def test_a_row_may_have_seeds_of_its_own() -> None:
    suite = make_suite(("suite.yaml", {"methods": ["lora", {"name": "lisa", "seeds": "3-4"}], "seeds": 2}))
    assert [suite.seeds_of(row) for row in suite.entries] == [[0, 1], [3, 4]]
    assert suite.all_seeds == [0, 1, 3, 4]
    assert [[job.seed for job in suite.final_jobs(row, 1e-3)] for row in suite.entries] == [[0, 1], [3, 4]]
    bare = make_suite(("suite.yaml", {"methods": ["lora", "lisa"], "seeds": 2}))
    assert [fingerprint(one, one.entries[1]) for one in (suite, bare)] == [
        fingerprint(bare, bare.entries[1])
    ] * 2


def test_a_number_of_seeds_is_as_many() -> None:
    """As ``--seeds 3`` on the command line."""
    assert make_suite(("suite.yaml", {"seeds": 3})).seeds == [0, 1, 2]
    assert make_suite(("suite.yaml", {"seeds": [3]})).seeds == [3]
    for wrong in (0, 10**6, True, 2.0):
        with pytest.raises(ConfigError, match="suite.yaml: seeds: "):
            make_suite(("suite.yaml", {"seeds": wrong}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 3}, "suite.yaml: Unknown key of a suite 'step'. Did you mean 'steps'"),
        ({"steps": 0}, "suite.yaml: steps: .* but got 0"),
        ({"seeds": []}, "suite.yaml: seeds: .* at least 1"),
        ({"methods": [{"name": "a", "rates": [1]}]}, "suite.yaml: methods.0.rates: Extra inputs"),
        ({"methods": [{"name": "a/b"}]}, "suite.yaml: methods.0.name: String should match"),
    ],
)
def test_bad_keys_name_their_source(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_suite(("default", {"steps": 4}), ("suite.yaml", change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "typo.jsonl"}, "typo.jsonl"),
        ({"other_text": "nonsense"}, "nonsense"),
        ({"test_size": 10**6}, "Lower validation_size or test_size"),
        ({"answer_marker": "####", "answers": 4}, "Every completion must hold an answer behind its marker"),
    ],
)
def test_data_is_read_before_any_work(
    make_tiny: Callable[..., Suite], change: dict[str, Any], message: str
) -> None:
    make_tiny(["lisa"]).check_data()
    with pytest.raises(ConfigError, match=message):
        make_tiny(["lisa"], **change).check_data()


def test_a_baseline_that_is_no_row() -> None:
    with pytest.raises(
        ConfigError, match="baseline: Unknown method of this suite 'loora'. Did you mean 'lora'"
    ):
        Suite(methods=["lora", "lisa"], baseline="loora").check_references()


def test_rates_of_a_method() -> None:
    suite = Suite(methods=["lisa", "lora", {"name": "own", "method": "lora", "learning_rates": [1.0]}])
    lisa, lora, own = suite.entries
    assert suite.rates(lisa) == [1e-4, 3e-4, 1e-3]
    assert suite.rates(lora) == pytest.approx([5e-4, 1.5e-3, 5e-3])
    assert suite.rates(own) == [1.0]
    assert suite.model_copy(update={"learning_rates": [0.5]}).rates(lora) == [0.5]


def test_a_method_of_ones_own_is_compared_with_the_first_where_full_is_not_there() -> None:
    assert Suite(methods=["lisa", "lora"]).reference == "lisa"
    assert Suite(methods=["lisa", "full"]).reference == "full"
    assert Suite(methods=["lisa", "full"], baseline="lisa").reference == "lisa"


def test_options_of_a_row_win_over_those_of_the_suite_and_of_the_method() -> None:
    suite = Suite(
        options={"period": 7, "state": "offload"},
        methods=[{"name": "a", "method": "lisa-published", "options": {"period": 9}}],
    )
    config = suite.config(suite.final_jobs(suite.entries[0], 0.5)[0])
    assert (config.period, config.state, config.learning_rate, config.seed) == (9, "keep", 0.5, 0)


def test_the_fingerprint_knows_what_decides_the_numbers() -> None:
    def of(**keys: Any) -> str:
        suite = Suite(**{"methods": ["lisa"], **keys})
        return str(fingerprint(suite, suite.entries[0]))

    assert of() == of(seeds=[0, 1, 2, 3]) == of(baseline="lisa") == of(methods=["lisa", "lora"])
    assert of() == of(learning_rates=[1.0]) == of(search_extensions=0), "each run says its own rate"
    assert of() == of(attention=None), "runs that were stored before it was a key are still good"
    assert len({of(), of(attention="sdpa"), of(attention="eager")}) == 3
    assert len({of(), of(steps=5), of(options={"period": 3}), of(seeds=[1])}) == 4


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", ["file", "files", "folder", "other text", "model", "tasks"])
def test_the_content_of_files_decides_too(kind: str, large: bool, tmp_path: Path) -> None:
    path, other = tmp_path / "data" / "own.jsonl", tmp_path / "more.jsonl"
    path.parent.mkdir()
    fill = "x" * (3 * 2**20 if large else 1)
    for each in (path, other):
        each.write_text(f'{{"text": "{fill}1"}}\n')
    keys: dict[str, dict[str, Any]] = {
        "file": {"task": str(path)},
        "files": {"task": f"{other},{path}"},
        "folder": {"task": str(path.parent)},
        "other text": {"other_text": str(path)},
        "model": {"model": str(path.parent)},
        "tasks": {"lm_eval": ["own"], "lm_eval_tasks": str(tmp_path)},
    }
    suite = Suite(methods=["lisa"], **keys[kind])
    before = fingerprint(suite, suite.entries[0])
    assert fingerprint(suite, suite.entries[0]) == before
    path.write_text(f'{{"text": "{fill}2"}}\n')
    assert fingerprint(suite, suite.entries[0]) != before


def test_a_plugin_brings_methods(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from layersample import LayerSampler, register\n"
        "@register('mine')\n"
        "class Mine(LayerSampler):\n"
        "    'Train the first layer.'\n"
        "    def sample(self, context):\n"
        "        return [0]\n"
    )
    around = {"sampler": "max_wait", "sampler_options": {"sampler": "mine"}}
    by_option = {"name": "theirs", "method": "lisa", "options": {"sampler": "mine"}}
    suite = Suite(
        methods=["lisa", "mine", by_option, {**by_option, "name": "around", "options": around}], plugin=path
    )
    suite.check()
    before = [fingerprint(suite, entry) for entry in suite.entries]
    path.write_text(path.read_text().replace("[0]", "[1]"))
    after = [fingerprint(suite, entry) for entry in suite.entries]
    assert before[0] == after[0], "lisa is as it was"
    assert all(one != other for one, other in zip(before[1:], after[1:], strict=True)), (
        "results of the edited sampler can't be taken for those of before"
    )
