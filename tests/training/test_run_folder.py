from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample.checkpoints.whole import seal
from layersample.config import make_config
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


def test_a_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    with pytest.raises(
        ConfigError, match="holds config.yaml. Add --resume to continue that run, --overwrite"
    ):
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
