"""Seals: damage of any kind is told, and the order of checkpoints is that in which they were saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from layersample.checkpoints.checksums import PART, checksums
from layersample.checkpoints.seal import (
    SEAL,
    CheckpointError,
    check,
    find_last,
    in_order,
    last_number,
    remove_oldest,
    seal,
)


def make(folder: Path, step: int, number: int) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "deep").mkdir(parents=True)
    (checkpoint / "model.pt").write_bytes(bytes(range(256)))
    (checkpoint / "deep" / "empty").write_bytes(b"")
    (checkpoint / "trainer_state.json").write_text("{}")
    seal(checkpoint, number)
    return checkpoint


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("bit", [0, 7, 1000, 2047])
def test_a_flipped_bit_is_found(tmp_path: Path, bit: int) -> None:
    checkpoint = make(tmp_path, 5, 1)
    check(checkpoint)
    flip(checkpoint / "model.pt", bit)
    check(checkpoint, verify=False)  # sizes are as they were
    with pytest.raises(CheckpointError, match="model.pt is damaged: its content isn't what was saved"):
        check(checkpoint)


def test_a_flipped_bit_in_the_seal_is_found_or_means_nothing(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5, 3)
    whole = (checkpoint / SEAL).read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        (checkpoint / SEAL).write_bytes(whole)
        flip(checkpoint / SEAL, bit)
        try:
            check(checkpoint)
        except CheckpointError:
            continue
        assert json.loads((checkpoint / SEAL).read_bytes()) == json.loads(whole)  # white space


def test_checksums_cover_every_part_of_a_large_file(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(b"a" * (2 * PART + 3))
    before = checksums([path])[path]
    for place in (0, PART - 1, PART, 2 * PART + 2):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"b")
        assert checksums([path])[path] != before, place
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"a")
    assert checksums([path])[path] == before


def test_a_seal_of_version_1_has_sizes_alone(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5, 1)
    old = {"version": 1, "files": {"model.pt": 256}}
    (checkpoint / SEAL).write_text(json.dumps(old))
    check(checkpoint)
    assert last_number(tmp_path) == 0 and find_last(tmp_path) == checkpoint
    os.truncate(checkpoint / "model.pt", 3)
    with pytest.raises(CheckpointError, match="must have 256 bytes, but has 3"):
        check(checkpoint)


def test_the_trainer_s_state_may_be_edited_where_changes_are_allowed(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 5, 1)
    for text in ('{"a": 1}', "[]"):  # of another size and of the same
        (checkpoint / "trainer_state.json").write_text(text)
        with pytest.raises(CheckpointError, match="damaged or edited.*allow_changes=True .--allow-changes"):
            check(checkpoint)
        check(checkpoint, allow_changes=True)
    flip(checkpoint / "model.pt", 3)
    with pytest.raises(CheckpointError, match="model.pt is damaged"):
        check(checkpoint, allow_changes=True)


def test_the_order_is_that_of_saving_whatever_the_steps_and_the_clock(tmp_path: Path) -> None:
    for step, number in ((100, 1), (50, 2), (60, 3)):
        os.utime(make(tmp_path, step, number), (1e9 - number, 1e9 - number))
    assert [path.name for path in in_order(tmp_path)] == ["checkpoint-100", "checkpoint-50", "checkpoint-60"]
    assert last_number(tmp_path) == 3
    remove_oldest(tmp_path, 1)
    assert [path.name for path in in_order(tmp_path)] == ["checkpoint-60"]


def test_what_is_removed_is_ours_and_not_spared(tmp_path: Path) -> None:
    made = [make(tmp_path, step, step) for step in (1, 2, 3, 4)]
    (tmp_path / "checkpoint-9").mkdir()  # someone else's
    remove_oldest(tmp_path, 2, spare=[made[0]])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-4", "checkpoint-9"]
    (made[3] / SEAL).write_text("{")
    make(tmp_path, 5, 5)
    remove_oldest(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-9"]


def test_a_kill_while_an_old_one_is_removed_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, last = make(tmp_path, 4, 1), make(tmp_path, 6, 2)

    def killed(folder: Path) -> None:
        (folder / SEAL).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_oldest(tmp_path, 1)
    assert not old.exists() and find_last(tmp_path) == last
    make(tmp_path, 2, 3)
    (tmp_path / "checkpoint-2" / SEAL).unlink()  # as the Trainer, which removes some itself, may leave it
    assert find_last(tmp_path) == last
