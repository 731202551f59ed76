"""export, apply and chat, on what a run of the command has written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

from layersample import ConfigError
from layersample.cli import app as cli
from layersample.cli import chat_command
from layersample.config import TrainConfig, make_config
from layersample.exporting import hub
from layersample.exporting.cards import model_card
from layersample.training.finetune import finetune
from tests.exporting.test_hub import FakeApi

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


@pytest.fixture(scope="module")
def run(tiny_model: Path, sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 4 steps, of which each trains one layer."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = {
        **{"model": str(tiny_model), "data": str(sums), "output": str(folder), "steps": 4, "period": 2},
        **{"num_active": 1, "embeddings": "freeze", "head": "freeze", "eval_size": 4, "max_length": 16},
    }
    finetune(make_config(("test", options)))
    yield folder


def invoke(*arguments: object, input: str | None = None) -> str:
    result = CliRunner().invoke(
        cli.app,
        [str(argument) for argument in arguments],
        env={"COLUMNS": "100", "NO_COLOR": "1"},
        input=input,
    )
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_delta_of_a_run_gives_its_model_back(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    said = invoke("export", run, "--delta", "--output", tmp_path / "delta")
    held = load_file(tmp_path / "delta" / "delta.safetensors")
    trained = {int(name.split(".")[2]) for name in held if "layers" in name}
    steps = yaml.safe_load((run / "summary.json").read_text())["steps_trained"]
    assert trained == {index for index, count in enumerate(steps) if count} and sum(steps) == 4
    assert f"{len(held)} of 39 weights differ from the base" in " ".join(said.split())
    invoke("apply", tiny_model, tmp_path / "delta", "--output", tmp_path / "again")
    ours, theirs = (
        sorted(p for p in f.rglob("*") if p.is_file()) for f in (tmp_path / "again", run / "model")
    )
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert [p.read_bytes() for p in ours] == [p.read_bytes() for p in theirs]
    # A saved model, whose base has to be said, gives the same.
    invoke("export", run / "model", "--delta", "--base", tiny_model, "--output", tmp_path / "other")
    assert (tmp_path / "other" / "delta.safetensors").read_bytes() == (
        tmp_path / "delta" / "delta.safetensors"
    ).read_bytes()


def test_the_model_has_a_card_with_the_facts_of_the_run(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(run / "model" / "README.md")
    assert card.data.library_name == "transformers" and "lisa" in (card.data.tags or [])
    assert card.data.base_model is None, "a folder of this machine is no name on the hub"
    facts = dict(re.findall(r"^\| (\S.*) \| (.*) \|$", card.text, re.MULTILINE))
    assert facts["Sampler"] == "lisa, layers: 1 in each period of 2 steps"
    assert facts["Layers that trained"].startswith("2 of 4: ")
    assert facts["Embeddings, head, final norm"] == "frozen, frozen, trained"
    assert facts["Steps"] == "4 of 4 examples" and "torch 2" in facts["Versions"]
    summary = yaml.safe_load((run / "summary.json").read_text())
    loss = summary["held_out_loss"]
    assert facts["Held-out loss"] == f"{loss['before']:.4f} before, {loss['after']:.4f} after"
    budgeted = model_card(TrainConfig(draw_budget="3%", granularity="module"), summary)
    assert "of 4 modules, as many as fit 3%\ntrained at a time." in budgeted
    assert "lisa, modules: as many as fit 3% in each period of 2 steps" in budgeted
    assert str(run.parent) not in str(card), "nothing of this machine's folders"
    invoke("export", run, "--delta", "--output", tmp_path / "delta")
    delta = ModelCard.load(tmp_path / "delta" / "README.md")
    assert "layersample apply" in delta.text and "Layers that trained" in delta.text


def test_pushes_the_model_or_a_delta(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = FakeApi()
    monkeypatch.setattr(hub, "HfApi", api)
    assert "Uploaded to https://huggingface.co/me/mine." in invoke("export", run, "--push-to-hub", "me/mine")
    invoke("export", run, "--delta", "--output", tmp_path / "d", "--push-to-hub", "me/mine", "--private")
    sent = [arguments["folder_path"] for name, arguments in api.calls if name == "upload_folder"]
    assert sent == [str(run / "model"), str(tmp_path / "d")]
    assert [arguments["private"] for name, arguments in api.calls if name == "create_repo"] == [False, True]


def test_answers_as_the_data_asked(run: Path) -> None:
    said = invoke("chat", run, "1+1=", "--max-tokens", 4)
    assert "plain prompts" in said
    plain = invoke("chat", run / "model", "1+1=", "--raw", "--max-tokens", 4)
    assert plain.strip() and plain.strip() in said
    assert invoke("chat", run / "model", "1+1=", "--max-tokens", 4).strip() != plain.strip()


def test_compares_with_the_base(run: Path, tiny_model: Path) -> None:
    said = invoke("chat", run, "1+1=", "--compare", "--max-tokens", 4)
    titles = next(line for line in said.splitlines() if "base" in line)
    assert "trained" in titles, "side by side"
    assert invoke("chat", run, "1+1=", "--base", tiny_model, "--max-tokens", 4) == said


def test_talks_until_nothing_is_said(run: Path) -> None:
    said = invoke("chat", run, "--max-tokens", 4, input=f"1+1=\n{'x' * 200}\n1+1=\n\n")
    assert said.count("You:") == 4 and "must fit the model's 128 positions" in " ".join(said.split())


def test_a_run_without_a_summary_is_asked_by_its_template(run: Path, tmp_path: Path) -> None:
    assert chat_command._has_plain_prompts(run)
    assert not chat_command._has_plain_prompts(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "RUN"], "What to export must be said"),
        (["export", "RUN", "--delta", "--gguf"], "choose --delta or --gguf"),
        (["export", "RUN", "--gguf", "--base", "x"], "add --delta"),
        (["export", "RUN", "--gguf", "--push-to-hub", "me/mine"], "leave --gguf out"),
        (["export", "RUN", "--delta", "--private"], "add --push-to-hub"),
        (["export", "RUN", "--delta", "--gguf-type", "f16"], "add --gguf"),
        (["export", "RUN", "--delta", "--converter", "nowhere"], "add --gguf"),
        (["export", "RUN", "--push-to-hub", "me/mine", "--output", "OUT"], "leave --output out"),
        (["export", "nowhere", "--delta"], "there is no folder 'nowhere'"),
        (["export", "RUN/checkpoints", "--delta"], "must be the folder of a run .* but it holds none"),
        (["export", "RUN/model", "--delta", "--base", "RUN/model"], "say where with --output"),
        (["export", "RUN/model", "--delta", "--output", "OUT"], "give it with --base"),
        (["export", "RUN", "--delta", "--base", "RUN/model", "--output", "OUT"], "must differ from its base"),
        (["export", "RUN", "--delta", "--base", "./nothing", "--output", "OUT"], "Unknown model './nothing'"),
        (["export", "RUN", "--delta", "--output", "RUN"], "must be new or empty"),
        (["export", "RUN", "--gguf", "--converter", "nowhere"], "there is no file nowhere"),
        (["apply", "RUN/model", "RUN/model", "--output", "OUT"], "must be a whole file of safetensors"),
        (["apply", "RUN/model", "RUN", "--output", "RUN"], "must be new or empty"),
        (["chat", "RUN/model", "hi", "--compare"], "give it with --base"),
        (["chat", "RUN", "hi", "--max-tokens", "200"], "must fit the model's 128 positions"),
        (["chat", "nowhere", "hi"], "Unknown model 'nowhere'"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    given: list[Any] = [a.replace("RUN", str(run)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    with pytest.raises(ConfigError, match=message):
        invoke(*given)
    assert not any(tmp_path.iterdir())


def test_a_run_that_has_not_ended_has_nothing_to_export(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.yaml", tmp_path)
    with pytest.raises(ConfigError, match="must have ended, .* --resume"):
        invoke("export", tmp_path, "--delta")
