"""The model of a run on the hub, against one that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

from layersample import ConfigError
from layersample.config import make_config
from layersample.training.finetune import finetune
from tests.exporting.test_hub import fake, refused

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


@pytest.fixture
def options(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "steps": 2, "push_to_hub": "me/mine", "private": True}


def test_the_model_is_uploaded_with_its_card(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = fake(monkeypatch)
    seen: list[list[str]] = []
    upload = api.upload_folder

    def look(**arguments: Any) -> None:
        seen.append(sorted(path.name for path in Path(arguments["folder_path"]).iterdir()))
        upload(**arguments)

    monkeypatch.setattr(api, "upload_folder", look)
    said: list[str] = []
    finetune(make_config(("test", options)), report=said.append)
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1]["private"] is True
    assert api.calls[2][1]["folder_path"] == str(tmp_path / "run" / "model")
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(*seen)
    assert said[-1] == "Uploaded to https://huggingface.co/me/mine."


def test_who_may_not_is_told_before_any_work(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, whoami=LocalTokenNotFoundError("no token"))
    with pytest.raises(ConfigError, match="must be logged in"):
        finetune(make_config(("test", options)))
    with pytest.raises(ConfigError, match="must name a repository"):
        finetune(make_config(("test", {**options, "push_to_hub": "me/my model"})))
    with pytest.raises(ConfigError, match="private is of a repository on the hub: name it by push_to_hub"):
        make_config(("test", {**options, "push_to_hub": None}))
    assert not (tmp_path / "run").exists()


def test_an_upload_that_fails_leaves_the_run_and_says_how_to_go_on(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, upload_folder=refused(500))
    run = tmp_path / "run"
    with pytest.raises(ConfigError) as error:
        finetune(make_config(("test", options)))
    assert f"its model is in {run / 'model'}, but it isn't on the hub. The hub refuses me/mine" in str(
        error.value
    )
    assert str(error.value).endswith(f"layersample export {run} --push-to-hub me/mine")
    assert (run / "summary.json").is_file() and (run / "model" / "model.safetensors").is_file()
