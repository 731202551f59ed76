from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from layersample import ConfigError
from layersample.config import TrainConfig, make_config, write_yaml
from layersample.option_files import read_yaml


def test_later_sources_win() -> None:
    config = make_config(("a.yaml", {"steps": 7, "period": 3}), ("command line", {"steps": 9}))
    assert (config.steps, config.period, config.num_active) == (9, 3, 2)


def test_every_option_has_a_description() -> None:
    assert [name for name, field in TrainConfig.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_actve": 2}, "run.yaml: Unknown option 'num_actve'. Did you mean 'num_active'"),
        ({"period": "often"}, "run.yaml: period: Input should be a whole number, not text, but got 'often'"),
        ({"period": 0}, "run.yaml: period: .*greater than or equal to 1, but got 0"),
        ({"num_active": 0}, "run.yaml: num_active: .*greater than or equal to 1, but got 0"),
        ({"state": "burn"}, "run.yaml: state: Input should be 'drop', 'keep' or 'offload', but got 'burn'"),
        ({"trainer": [1]}, r"run.yaml: trainer: Input should be a valid dictionary, but got \[1\]"),
        ({"resume": True}, "resume needs output"),
        ({"resume": True, "overwrite": True}, "choose one of them"),
        ({"precision": "bfloat16"}, "precision"),
        ({"step_in_backward": True}, "can't clip by their norm: choose clip_by"),
        ({"clip_by": "running"}, "clip_by running is for step_in_backward"),
        ({"step_in_backward": True, "clip": 0, "precision": "fp16-mixed"}, "can't look for overflows"),
    ],
)
def test_errors_name_source_and_key(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(("run.yaml", options))


def test_yaml_comes_back_as_it_was(tmp_path: Path) -> None:
    config = make_config(("x", {"output": "runs/a", "sampler_options": {"draw": "bernoulli"}, "epochs": 0.5}))
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(config))
    assert make_config((str(path), read_yaml(path))) == config


@pytest.mark.parametrize(("given", "stored"), [("2GiB", "2GiB"), (0.05, "0.05"), (1, "1"), (None, None)])
def test_a_budget_may_be_a_number(given: Any, stored: str | None) -> None:
    assert make_config(("run.yaml", {"budget": given})).budget == stored


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: [1\n", "run.yaml, line 2: must be YAML"),
        ("- steps\n", "must hold a mapping of options to values, but holds a list"),
        ("!!python/object/apply:os.getcwd []\n", "must be YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no.yaml: a configuration file must be readable text"):
        read_yaml(tmp_path / "no.yaml")


def test_presets_are_valid_and_name_their_source() -> None:
    for path in (Path(__file__).parent.parent / "strategies" / "presets").glob("*.yaml"):
        text = path.read_text()
        assert "arXiv" in text.splitlines()[0]
        make_config((path.name, yaml.safe_load(text)))
