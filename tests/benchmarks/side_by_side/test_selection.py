from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from layersample import ConfigError
from layersample_benchmarks.side_by_side.selection import select
from layersample_benchmarks.side_by_side.suite import Suite

SUITE = Suite(methods=["full", "lora", "lisa"], seeds=[0, 1, 2], learning_rates=[1e-3, 1e-2], match="time")


@pytest.fixture
def lines() -> list[dict[str, Any]]:
    """Each row's search with the first seed, and its runs."""
    stages = [("search", 0), *(("final", seed) for seed in SUITE.seeds)]
    return [
        {"method": row.name, "stage": stage, "seed": seed} for row in SUITE.entries for stage, seed in stages
    ]


def test_rows_and_seeds_that_arent_asked_for_are_gone(lines: list[dict[str, Any]]) -> None:
    assert select(SUITE, lines, seeds=None, methods=None) == (SUITE, lines)
    suite, kept = select(SUITE, lines, seeds=[2, 1, 2], methods=["lora", "full", "lora"])
    assert suite.seeds == [1, 2] and [entry.name for entry in suite.entries] == ["full", "lora"]
    left = [(line["method"], line["stage"], line["seed"]) for line in kept]
    runs = [("search", 0), ("final", 1), ("final", 2)]
    assert left == [(name, *run) for name in ("full", "lora") for run in runs], "a search is a row's whole"
    assert [entry.name for entry in SUITE.entries] == ["full", "lora", "lisa"]


def test_all_methods_are_all(lines: list[dict[str, Any]]) -> None:
    assert select(SUITE, lines, seeds=None, methods=["all"]) == (SUITE, lines)


def test_rows_without_the_seeds_are_gone_too() -> None:
    more = [row.model_copy(update={"seeds": [0, 7] if row.name == "lisa" else None}) for row in SUITE.entries]
    suite = SUITE.model_copy(update={"methods": more})
    chosen, _ = select(suite, [], seeds=[1, 2], methods=None)
    assert [(row.name, chosen.seeds_of(row)) for row in chosen.entries] == [
        ("full", [1, 2]),
        ("lora", [1, 2]),
    ]
    chosen, _ = select(suite, [], seeds=[7, 0], methods=None)
    assert [chosen.seeds_of(row) for row in chosen.entries] == [[0], [0], [0, 7]] and chosen.seeds == [0, 7]
    with pytest.raises(ConfigError, match="seeds must hold some of full and lora, which .* but got 7"):
        select(suite, [], seeds=[7], methods=None)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"seeds": [2, 3]}, "seeds must be among those of the benchmark, 0, 1, 2, but got 3"),
        ({"seeds": range(10**12)}, "but got 3"),
        (
            {"methods": ["full", "lissa"]},
            "methods: Unknown method of this suite 'lissa'. Did you mean 'lisa'?",
        ),
        ({"methods": ["full", "lisa"]}, "methods must hold lora, which .* but got full, lisa"),
        ({"methods": []}, "methods must hold full and lora, which .* but got none"),
    ],
)
def test_what_cant_be_selected(asked: dict[str, Any], words: str, lines: list[dict[str, Any]]) -> None:
    take: Callable[..., Any] = select
    with pytest.raises(ConfigError, match=words):
        take(SUITE, lines, **{"seeds": None, "methods": None, **asked})
