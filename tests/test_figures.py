"""Figures that don't depend on the machine are as they were: ``python -m tests.figures`` stores them anew."""

from __future__ import annotations

import json

import pytest

from tests.figures import DRAWS, PLANS, STATES, STORED, bytes_held, drawn, planned_bytes, versions

FIGURES = json.loads(STORED.read_text(encoding="utf-8"))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PLANS)
def test_planned_bytes(name: str) -> None:
    if versions() != FIGURES["versions"]:
        pytest.skip(f"what a step holds depends on the versions; stored with {FIGURES['versions']}")
    assert planned_bytes(name) == FIGURES["planned_bytes"][name]


@pytest.mark.parametrize("name", STATES)
def test_bytes_held(name: str) -> None:
    assert bytes_held(name) == FIGURES["bytes_held"][name]


@pytest.mark.parametrize("name", DRAWS)
def test_draws_coverage_and_chances(name: str) -> None:
    assert drawn(name) == FIGURES["drawn"][name]


def test_nothing_stored_is_left_unchecked() -> None:
    assert {key: set(rows) for key, rows in FIGURES.items() if key != "versions"} == {
        "planned_bytes": set(PLANS),
        "bytes_held": set(STATES),
        "drawn": set(DRAWS),
    }
