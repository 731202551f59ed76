from __future__ import annotations

import gc
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from layersample import ConfigError
from layersample.cli import app as cli
from layersample.cli import train_command
from layersample.config import TrainConfig
from layersample.training.trainer import Interrupted, NonFiniteLossError

runner = CliRunner()


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    """What the command would run."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(train_command, "_run", seen.append)
    return seen


def invoke(*arguments: str) -> str:
    result = runner.invoke(cli.app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_lists_every_sampler_with_a_line_and_its_source() -> None:
    output = invoke("list")
    for words in (
        r"lisa\s+Draw layers uniformly.*arXiv 2403.17919",
        r"cyclic\s+Train groups",
        r"full\s+Train every",
    ):
        assert re.search(words, output)


def test_the_collector_is_as_it_was_after_a_list() -> None:
    assert gc.isenabled()
    invoke("list")
    with pytest.raises(ConfigError):
        invoke("list", "liza")
    assert gc.isenabled()
    gc.disable()
    try:
        invoke("list")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_lists_the_options_of_one() -> None:
    output = invoke("list", "lisa")
    assert "draw" in output and "bernoulli" in output and "'exact'" in output
    assert "no options" in invoke("list", "full")


def test_lists_samplers_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from layersample import LayerSampler, register\n"
        "@register('first-only')\n"
        "class First(LayerSampler):\n"
        "    'Train the first layer.'\n"
        "    def sample(self, context):\n"
        "        return [0]\n"
    )
    assert "Train the first layer." in invoke("list", "--plugin", str(path))


def test_defaults_are_those_of_the_configuration(given: list[TrainConfig]) -> None:
    invoke("train")
    assert given == [TrainConfig()]


def test_every_option_has_a_flag(given: list[TrainConfig]) -> None:
    flags = invoke("train", "--help")
    for name in TrainConfig.model_fields:
        flag = name.replace("_options", "_option").replace("_", "-")
        flag = "trainer-option" if name == "trainer" else flag
        assert re.search(rf"--{flag}[ ,\n]", flags)


def test_flags_win_over_the_file_and_the_file_over_the_preset(
    given: list[TrainConfig], tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"steps": 7, "period": 9, "trainer": {"optim": "sgd"}}))
    invoke(
        "train",
        "--preset",
        "lisa",
        "--config",
        str(path),
        "--steps",
        "8",
        "--trainer-option",
        "adam_beta1=0.8",
    )
    config = given[0]
    assert (config.steps, config.period, config.learning_rate) == (8, 9, 5e-5)
    assert config.trainer == {"optim": "sgd", "adam_beta1": 0.8}


def test_flags_of_every_kind(given: list[TrainConfig]) -> None:
    invoke(
        *(
            "train",
            "--sampler",
            "cyclic",
            "--sampler-option",
            "order=mirror",
            "--check",
            "--embeddings",
            "sample",
        ),
        *("--save-steps", "5", "--warmup", "0.1", "--output", "here", "--no-gradient-checkpointing"),
    )
    config = given[0]
    assert config.sampler_options == {"order": "mirror"}
    assert (config.check, config.embeddings, config.save_steps, config.warmup) == (True, "sample", 5, 0.1)
    assert config.output == Path("here")


def test_resume_begins_with_the_options_of_the_run(given: list[TrainConfig], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"steps": 7, "sampler": "cyclic"}))
    invoke("train", "--output", str(tmp_path), "--resume", "--steps", "9")
    assert (given[0].steps, given[0].sampler, given[0].resume) == (9, "cyclic", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "liza"], "Unknown preset 'liza'. Did you mean 'lisa'"),
        (["train", "--period", "0"], "command line: period: .* but got 0"),
        (["train", "--sampler-option", "draw"], "must be given as KEY=VALUE, but got 'draw'"),
        (["train", "--config", "no.yaml"], "no.yaml: a configuration file must be readable"),
        (["list", "liza"], "Did you mean 'lisa'"),
    ],
)
def test_errors_of_the_user_s_making(given: list[TrainConfig], arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke(*arguments)


def test_training_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(
        ConfigError, match=r"Training needs the train extra: pip install .layersample\[train\]"
    ):
        invoke("train")


def test_main_prints_one_message_and_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["layersample", "list", "liza"])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
    assert "Error: Unknown sampler or projection 'liza'" in capsys.readouterr().err
    bitsandbytes = logging.getLogger("bitsandbytes.backends.cpu.ops")
    assert not bitsandbytes.filter(
        logging.makeLogRecord({"msg": "Failed to load CPU gemm_4bit_forward from %s"})
    )


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFiniteLossError("nan at step 3"), 1),
        (Interrupted(2, Path("a/b/checkpoint-1")), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def finetune(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr("layersample.training.finetune.finetune", finetune)
    result = runner.invoke(cli.app, ["train"])
    assert result.exit_code == code


@pytest.mark.parametrize("arguments", [[], ["benchmark"]], ids=["layersample", "benchmark"])
def test_the_list_of_commands_is_not_cut_on_a_narrow_terminal(arguments: list[str]) -> None:
    text = runner.invoke(cli.app, [*arguments, "--help"], env={"COLUMNS": "80"}).output
    listed = text[text.index("Commands:") :]
    assert "..." not in listed
    assert arguments or text.index("  train ") < text.index("  env ")


def test_the_text_of_a_strategy_fills_a_narrow_terminal() -> None:
    text = runner.invoke(cli.app, ["list", "owlore"], env={"COLUMNS": "80"}).output
    about = text[: text.index("Source:")].splitlines()
    assert all(len(line) > 50 for line in about[:-1]), "wrapped once, by the terminal alone"


@pytest.mark.parametrize("command", [*cli.OWN, "benchmark"])
def test_help_fits_a_narrow_terminal_and_ends_in_examples(command: str) -> None:
    text = runner.invoke(cli.app, [command, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, text.splitlines())) <= 80
    assert "1000000000" not in text and "default: none" not in text
    before, examples = text.split("Examples:\n")
    assert all(line.startswith(f"  layersample {command}") for line in examples.strip("\n").splitlines())
    assert all(flag in before for flag in re.findall(r"--[\w-]+", examples))
