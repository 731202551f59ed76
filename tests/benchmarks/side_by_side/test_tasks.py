from __future__ import annotations

from pathlib import Path

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side.tasks import after_marker, get_task, right_answers, split


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 5\n#### 70", "70"),
        ("#### 1\nno, wait\n#### 1,250.", "1250"),
        ("####   3 apples  \nmore", "3 apples"),
        ("####\n7", None),
        ("seventy", None),
    ],
)
def test_the_answer_behind_the_last_marker(text: str, answer: str | None) -> None:
    assert after_marker(text, marker="####") == answer


def test_no_problem_is_in_two_splits_and_they_are_the_same_for_every_seed(sums: Path) -> None:
    task = get_task(str(sums))
    first, second = (split(task, validation_size=4, test_size=6, train_size=20, seed=seed) for seed in (0, 1))
    parts = [set(part["prompt"]) for part in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [20, 4, 6]
    assert len(set.union(*parts)) == 30
    assert first.validation["prompt"] == second.validation["prompt"]
    assert first.test["prompt"] == second.test["prompt"]
    assert first.train["prompt"] != second.train["prompt"]
    again = split(task, validation_size=4, test_size=6, train_size=20, seed=0)
    assert again.train["prompt"] == first.train["prompt"]


def test_data_that_is_too_small(sums: Path) -> None:
    with pytest.raises(ConfigError, match="half of the data at most, but that is 20. Lower"):
        split(get_task(str(sums)), validation_size=15, test_size=6, train_size=4, seed=0)


def test_markers(sums: Path) -> None:
    assert not get_task(str(sums)).has_answers
    task = get_task(str(sums), "=")
    assert task.has_answers and task.read_answer is not None and task.read_answer("1+1= 2") == "2"
    with pytest.raises(ConfigError, match="gsm_symbolic knows where its answers are"):
        get_task("gsm_symbolic", "####")
    with pytest.raises(ConfigError, match="must not be empty"):
        get_task(str(sums), "")
    assert get_task("sarcasm").choices == (" no", " yes")


@pytest.mark.parametrize("name", ["chain_sum", "family_relationships"])
def test_built_in_tasks_have_answers_that_can_be_read(name: str) -> None:
    pytest.importorskip("reasoning_gym")
    task = get_task(name)
    parts = split(task, validation_size=8, test_size=200, train_size=100, seed=0)
    assert len(set(parts.train["prompt"]) | set(parts.test["prompt"])) == 300, "none comes twice"
    answers = right_answers(task, list(parts.test))
    assert len(set(answers)) > 8 and set(answers) <= set(task.choices or answers)
    assert task.choices or all(int(answer) < 300 for answer in answers)


def test_no_choice_begins_another_one() -> None:
    """The shorter one would always be the likelier."""
    for name in ("sarcasm", "family_relationships"):
        choices = get_task(name).choices
        assert not any(a != b and b.startswith(a) for a in choices for b in choices)


def test_an_answer_alone() -> None:
    read = get_task("chain_sum").read_answer
    assert read is not None
    assert [read(text) for text in (" -12.", "7\nand more", " 7. So", "", ".")] == [
        "-12",
        "7",
        "7",
        None,
        None,
    ]
