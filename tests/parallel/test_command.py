"""`layersample train` on two ranks of this machine, against one process with the same examples in each step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers import write_sums, write_tiny_model
from tests.parallel.ranks import checks_of, launch
from tests.parallel.ranks_alone import train, train_double

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


def losses(run: Path, *kinds: str) -> list[float]:
    """Losses of steps and of held-out data, in their order, or those of one kind."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[kind] for line in lines for kind in kinds or ("loss", "held_out_loss") if kind in line]


def cut(run: Path, target: Path, step: int) -> Path:
    """A run as if it had been killed after a checkpoint."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "model")
    for later in (target / "checkpoints").iterdir():
        if later.name != f"checkpoint-{step}":
            shutil.rmtree(later)
    return target


class Runs:
    """All runs of this file, and which checks passed on the ranks."""

    def __init__(self, folder: Path) -> None:
        write_tiny_model(folder / "tiny")
        write_sums(folder / "sums.jsonl")
        train(folder, "alone", batch_size=4, save_steps=3)
        train_double(folder, "double", batch_size=4)
        train(folder, "lora_norm", batch_size=4, sampler="lora_norm")
        cut(folder / "alone", folder / "one", 3)
        self.folder = folder
        self.passed, self.said = launch("ranks_command", folder)
        self.ranks = sorted(path for path in folder.iterdir() if path.name.isdigit())[-1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    yield Runs(tmp_path_factory.mktemp("command"))


@pytest.mark.parametrize("check", checks_of("ranks_command"))
def test_the_command_on_two_ranks(check: str, runs: Runs) -> None:
    assert check in runs.passed, runs.said


@pytest.mark.parametrize(
    ("name", "alone"), [("ddp", "alone"), ("fsdp2", "alone"), ("lora_norm", "lora_norm")]
)
def test_losses_are_those_of_one_process_with_the_doubled_batch(name: str, alone: str, runs: Runs) -> None:
    assert losses(runs.ranks / name) == pytest.approx(losses(runs.folder / alone), abs=1e-5)
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
        for run in (runs.ranks / name, runs.folder / alone)
    )
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.sub(theirs[key]).abs().max() < 1e-4, key
    told: Any = json.loads((runs.ranks / name / "model" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize("name", ["double", "double_shards"])
def test_in_double_precision_they_are_the_same_but_for_the_last_digits(name: str, runs: Runs) -> None:
    ours, theirs = runs.ranks / name, runs.folder / "double"
    assert losses(ours, "loss") == pytest.approx(losses(theirs, "loss"), abs=1e-9)
    # transformers has the logits of held-out data in fp32.
    assert losses(ours, "held_out_loss") == pytest.approx(losses(theirs, "held_out_loss"), abs=1e-6)
    trained, expected = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    for key, value in expected.items():
        assert value.dtype == torch.float64 and (trained[key] - value).abs().max() < 1e-9, key


def test_a_run_of_one_process_continues_on_two_ranks(runs: Runs) -> None:
    assert losses(runs.folder / "one") == pytest.approx(losses(runs.folder / "alone"), abs=1e-5)


def test_a_run_of_two_ranks_continues_in_one_process(runs: Runs, tmp_path: Path) -> None:
    cut(runs.ranks / "ddp", runs.folder / "back", 3)
    train(runs.folder, "back", resume=True)
    assert losses(runs.folder / "back") == pytest.approx(losses(runs.folder / "alone"), abs=1e-5)
    assert not (runs.folder / "back" / "ranks.json").exists()


def test_shards_on_one_rank(runs: Runs) -> None:
    """A sharded run of two ranks is resumed on one, and mixed precision gives the same losses on both."""
    cut(runs.ranks / "fsdp2", runs.folder / "two", 3)
    passed, said = launch("ranks_alone", runs.folder / "rank", size=1)
    assert passed == set(checks_of("ranks_alone")), said
    assert losses(runs.folder / "two") == pytest.approx(losses(runs.folder / "alone"), abs=1e-5)
    one = sorted(path for path in (runs.folder / "rank").iterdir() if path.name.isdigit())[-1]
    assert losses(runs.ranks / "bf16") == pytest.approx(losses(one / "bf16"), abs=1e-2)
    assert losses(runs.ranks / "bf16") != pytest.approx(losses(runs.folder / "alone"), abs=1e-5)
