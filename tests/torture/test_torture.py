"""A short draw of each torture; the long one is ``python -m tests.torture``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.torture import loops
from tests.torture.runner import Torture
from tests.torture.schedules import draw

pytestmark = pytest.mark.filterwarnings("ignore")


def wrong(torture: Torture) -> list[str]:
    return [f"{line['what']}: {line['wrong']}" for line in torture.results if line["wrong"]]


@pytest.mark.parametrize(("loop", "kills"), [("plain", 5), ("trainer", 3), ("train", 2)])
def test_killed_runs_end_as_one_that_was_not(loop: str, kills: int, tmp_path: Path) -> None:
    torture = Torture(tmp_path, 100, (loop,))
    torture.run("kills", kills)
    assert wrong(torture) == []
    assert sum(line["what"]["killed"] for line in torture.results) >= 1


def test_random_schedules_are_those_of_the_naive_loop(tmp_path: Path) -> None:
    torture = Torture(tmp_path, 100)
    torture.run("schedules", 30)
    assert wrong(torture) == []


def test_random_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    torture = Torture(tmp_path, 100)
    torture.run("damage", 25)
    assert wrong(torture) == []


def test_two_ranks_end_as_one_process_does(tmp_path: Path) -> None:
    torture = Torture(tmp_path, 100)
    torture.run("ranks", 4)
    assert wrong(torture) == []


def test_a_wrong_update_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The torture can fail: with a naive loop that forgets the weight decay, and one kind of damage let through."""
    with monkeypatch.context() as patch:
        patch.setattr("tests.torture.naive.Naive.__post_init__", lambda self: None)
        torture = Torture(tmp_path / "schedules", 100)
        assert torture.run("schedules", 3) == 3
    monkeypatch.setattr("layersample.checkpoints.whole.check", lambda *args, **more: None)
    assert Torture(tmp_path / "damage", 100).run("damage", 20) > 0


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = Torture(tmp_path, 100)
    first.run("schedules", 2)
    again = Torture(tmp_path, 100)
    again.run("schedules", 3)
    assert [line["index"] for line in again.results] == [0, 1, 2]
    again.store(tmp_path / "counts.json")
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["schedules"] == {"done": 3, "wrong": 0} and counts["seed"] == 100
    assert len(counts["commits"]) == 1 and "torch" in counts["environment"]["versions"]
    assert draw(100, 1) == draw(100, 1) != draw(100, 2)
    assert loops.draw(0, 1) != loops.draw(1, 1)
