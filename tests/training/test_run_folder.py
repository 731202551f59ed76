from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample.checkpoints.seal import seal
from layersample.config import make_config
from layersample.files import LOCK
from layersample.training.run_folder import RunFolder


def choose(path: Path, **options: Any) -> RunFolder:
    return RunFolder.choose(make_config(("test", {"output": str(path), **options})))


def make_run(path: Path, checkpoints: tuple[int, ...] = ()) -> None:
    path.mkdir()
    (path / "config.yaml").write_text("steps: 40\n")
    for step in checkpoints:
        checkpoint = path / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        seal(checkpoint)


def test_a_new_or_empty_folder_is_taken(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a" / "b"):
        with choose(path).open() as checkpoint:
            assert checkpoint is None and (path / "checkpoints").is_dir()


def test_default_is_a_new_folder_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert RunFolder.choose(make_config()).path.as_posix().startswith("runs/lisa-20")
    assert list(tmp_path.iterdir()) == []


def test_two_runs_that_begin_in_the_same_second_have_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = iter(["aa", "aa", "bb"])
    monkeypatch.setattr("secrets.token_hex", lambda _: next(tokens))
    monkeypatch.setattr("layersample.training.run_folder.datetime", FixedTime)
    with RunFolder.choose(make_config()).open(), RunFolder.choose(make_config()).open():
        assert sorted(p.name[-2:] for p in (tmp_path / "runs").iterdir()) == ["aa", "bb"]


class FixedTime(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> FixedTime:
        return cls(2026, 1, 2)


@pytest.mark.parametrize("how", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_in_use_is_refused_and_left_as_it_is(tmp_path: Path, how: dict[str, bool]) -> None:
    path = tmp_path / "run"
    with choose(path).open():
        (path / "config.yaml").write_text("steps: 40\n")
        with pytest.raises(ConfigError, match="One run at a time .*run is in use by another one"):
            choose(path, **how)
        assert (path / "checkpoints").is_dir()
    with choose(path, overwrite=True).open():
        with pytest.raises(ConfigError, match="in use by another one"):
            choose(path, **how)


@pytest.mark.parametrize("measured", [False, True])
def test_a_run_that_comes_second_removes_nothing_of_the_first(tmp_path: Path, measured: bool) -> None:
    """Both chose the folder while it was new; the second one opens it during the first, and after it."""
    first, second = choose(tmp_path / "run"), choose(tmp_path / "run")
    with first.open():
        (tmp_path / "run" / "config.yaml").write_text("first")
        if measured:
            (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        with pytest.raises(ConfigError, match="in use by another one"), second.open():
            raise AssertionError
    with pytest.raises(ConfigError, match="must be new or empty"), second.open():
        raise AssertionError
    assert (tmp_path / "run" / "config.yaml").read_text() == "first"


def test_what_others_put_into_the_folder_stays_when_the_run_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), choose(tmp_path / "run").open():
        (tmp_path / "run" / "notes.txt").write_text("mine")
        (tmp_path / "run" / "config.yaml").write_text("")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_damage_of_the_same_size_is_told_unless_nobody_looks(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"12")
    seal(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"13")
    with pytest.raises(ConfigError, match="optimizer.pt is damaged"):
        choose(tmp_path / "run", resume=True)
    choose(tmp_path / "run", resume=True, verify=False)


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(
        ConfigError, match="holds config.yaml. Add --resume to continue that run, --overwrite"
    ):
        choose(tmp_path / "run")


def test_a_run_that_was_killed_before_it_wrote_anything_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / LOCK).touch()
    choose(tmp_path / "run")
    choose(tmp_path / "run", overwrite=True)
    with pytest.raises(ConfigError, match="checkpoints has none"):
        choose(tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoints" / "checkpoint-5").mkdir()
    with pytest.raises(ConfigError, match="holds checkpoints"):
        choose(tmp_path / "run")


def test_resume_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    make_run(tmp_path / "run", (5, 10))
    (tmp_path / "run" / "checkpoints" / ".saving-x").mkdir()
    with choose(tmp_path / "run", resume=True).open() as checkpoint:
        assert checkpoint == tmp_path / "run" / "checkpoints" / "checkpoint-10"
    assert not (tmp_path / "run" / "checkpoints" / ".saving-x").exists()


def test_nothing_to_resume(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="must be a checkpoint to resume from, but .*checkpoints has none"):
        choose(tmp_path / "run", resume=True)


def test_overwrite_removes_the_old_run_only_after_the_new_one_ends_well(tmp_path: Path) -> None:
    make_run(tmp_path / "run", (5,))
    with pytest.raises(RuntimeError), choose(tmp_path / "run", overwrite=True).open():
        (tmp_path / "run" / "metrics.jsonl").write_text("{}")
        raise RuntimeError
    assert (tmp_path / "run.previous" / "checkpoints" / "checkpoint-5").is_dir()
    (tmp_path / "run" / "config.yaml").write_text("")
    with choose(tmp_path / "run", overwrite=True).open():
        assert (tmp_path / "run.previous-2").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "run.previous"]


def test_overwrite_replaces_runs_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ConfigError, match="--overwrite replaces a run, but .* holds thesis.tex and no config.yaml"
    ):
        choose(tmp_path, overwrite=True)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="must be a folder, but .* is a file"):
        choose(tmp_path / "run")


@pytest.mark.parametrize("path", ["/proc/layersample", "/sys/layersample"])
def test_a_folder_that_cannot_be_written(path: str) -> None:
    if not os.path.isdir(os.path.dirname(path)):
        pytest.skip("no such file system")
    with pytest.raises(ConfigError, match="must be writable, but"):
        choose(Path(path))


def test_a_run_that_fails_before_it_begins_leaves_everything_as_it_was(tmp_path: Path) -> None:
    make_run(tmp_path / "old", (5,))
    for path, options in ((tmp_path / "new", {}), (tmp_path / "old", {"overwrite": True})):
        with pytest.raises(RuntimeError), choose(path, **options).open():
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "checkpoints" / "checkpoint-5").is_dir()
