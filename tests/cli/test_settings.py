"""All options of a run from a stored run, a preset, a file and flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from layersample import ConfigError
from layersample.cli.settings import gather_settings
from layersample.config import make_config, write_yaml


def gather(config: Path | None = None, **flags: Any) -> Any:
    return gather_settings(config, None, None, None, None, flags)


def test_steps_and_epochs_together_are_refused(tmp_path: Path) -> None:
    both = tmp_path / "run.yaml"
    both.write_text("steps: 5\nepochs: 2\n")
    with pytest.raises(ConfigError, match="^command line: steps and epochs both say"):
        gather(steps=5, epochs=2.0)
    with pytest.raises(ConfigError, match=r"run.yaml: steps and epochs both say"):
        gather(both)


@pytest.mark.parametrize(
    ("stored", "flags", "steps", "epochs"),
    [
        ("epochs: 2", {"steps": 5}, 5, None),
        ("steps: 7", {"epochs": 0.5}, None, 0.5),
        ("steps: 7", {}, 7, None),
        ("epochs: 2", {}, None, 2.0),
    ],
)
def test_the_last_to_say_how_long_a_run_is_decides(
    stored: str, flags: dict[str, Any], steps: int | None, epochs: float | None, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(stored)
    found = gather(tmp_path / "run.yaml", **flags)
    assert found.epochs == epochs and (steps is None or found.steps == steps)


def test_a_run_in_epochs_is_resumed_from_its_own_options(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(write_yaml(make_config(("x", {"epochs": 3.0}))))
    assert gather(output=str(tmp_path), resume=True).epochs == 3.0


def test_a_stored_plug_in_runs_only_where_it_is_named_again(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(write_yaml(make_config(("x", {"plugin": "mine.py"}))))
    with pytest.raises(ConfigError, match="names a plug-in, mine.py, .* add --plugin mine.py"):
        gather(output=str(tmp_path), resume=True)
    assert gather(output=str(tmp_path), resume=True, plugin=Path("mine.py")).plugin == Path("mine.py")
    assert gather(output=str(tmp_path)).plugin is None
