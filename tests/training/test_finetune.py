"""The whole job on a tiny model; on the real one where marked slow."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

from layersample import ConfigError
from layersample.cli.display import print_summary
from layersample.config import make_config
from layersample.training.arguments import training_arguments
from layersample.training.finetune import finetune
from layersample.training.trainer import NonFiniteLossError, stop_on_signal
from tests.typed_runs import kill, records, resume, same_weights, start, wait_for, wait_for_step

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*deprecated")


@pytest.fixture
def options(short_run: dict[str, Any]) -> dict[str, Any]:
    return {**short_run, "check": True}


def run(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return finetune(make_config(("test", {**options, **more})))


def test_writes_all_that_a_run_is(options: dict[str, Any]) -> None:
    summary = run(options)
    folder = Path(options["output"])
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert sorted(p.name for p in folder.iterdir()) == sorted([*summary["files"], "checkpoints", ".lock"])
    assert yaml.safe_load((folder / "config.yaml").read_text())["period"] == 2
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    lines = records(folder)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [line["round"] for line in lines if "loss" in line] == [0, 0, 1, 1, 2, 2]
    assert all(len(line["active"]) == 2 for line in lines if "loss" in line)
    for name in ("layers.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    AutoModelForCausalLM.from_pretrained(folder / "model")
    assert not list(folder.rglob("*.bin")), "nothing pickled but the Trainer's own checkpoints"


@pytest.mark.parametrize("trainer", [{"logging_steps": 50}, {"logging_strategy": "no"}])
def test_there_is_a_line_a_step_however_seldom_the_trainer_logs(
    options: dict[str, Any], trainer: dict[str, Any]
) -> None:
    summary = run(options, trainer=trainer)
    lines = [line for line in records(Path(options["output"])) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and summary["steps"] == 6
    run(options, overwrite=True)
    each = [line for line in records(Path(options["output"])) if "loss" in line]
    assert [line["loss"] for line in lines] == [line["loss"] for line in each]


def test_what_moves_without_state_is_told_apart_from_what_trains(options: dict[str, Any]) -> None:
    frozen = run(options, num_active=1)
    assert "moving_parameters" not in frozen
    moving = run(options, num_active=1, inactive="sgd", overwrite=True)
    assert moving["trainable_parameters"] == frozen["trainable_parameters"]
    assert (
        moving["moving_parameters"]["mean"] + moving["trainable_parameters"]["mean"] == moving["parameters"]
    )
    console = Console(width=100, record=True, file=io.StringIO())
    print_summary(console, moving)
    assert re.search(r"moving without state +0\.0M at a time \(", console.export_text())


def test_a_run_that_is_resumed_at_its_end_only_finishes(options: dict[str, Any]) -> None:
    """As after a kill in the final evaluation or while the model was saved."""
    run(options, save_steps=4)
    folder = Path(options["output"])
    ended = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    lines = records(folder)
    assert lines[-1].keys() == {"step", "held_out_loss"}
    for evaluated in (True, False):
        (folder / "summary.json").unlink()
        shutil.rmtree(folder / "model")
        if not evaluated:
            kept = [json.dumps(line) + "\n" for line in lines[:-1]]
            (folder / "metrics.jsonl").write_text("".join(kept))
        summary = run(options, save_steps=4, resume=True)
        assert summary["steps"] == 6 and (folder / "summary.json").exists()
        assert records(folder) == lines
        again = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
        assert all(torch.equal(ended[name], again[name]) for name in ended)


def test_ctrl_c_twice_ends_at_once_and_leaves_the_handlers_as_they_were() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainer": {"save_only_model": True}}, "save_only_model must be off"),
        (
            {
                "trainer": {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3},
                "precision": "bf16",
                "save_precision": "fp32",
                "save_steps": 3,
            },
            "leave out trainer: load_best_model_at_end",
        ),
    ],
)
def test_options_of_the_trainer_that_could_not_keep_what_is_promised(
    options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(options, **change)
    assert not Path(options["output"]).exists()


def test_frozen_weights_are_saved_exactly_and_both_losses_are_told(options: dict[str, Any]) -> None:
    options |= {
        "embeddings": "freeze",
        "head": "freeze",
        "norm": "freeze",
        "num_active": 1,
        "precision": "bf16",
    }
    summary = run(options, frozen_weights="nf4", save_steps=3)
    trained, saved = summary["held_out_loss"], summary["held_out_loss_as_saved"]
    assert trained["before"] != saved["before"] and trained["after"] != saved["after"]
    assert saved["after"] < saved["before"]
    folder = Path(options["output"])
    lines = records(folder)
    assert [line["step"] for line in lines if "held_out_loss_as_saved" in line] == [0, 6]
    assert summary["frozen_weights"]["format"] == "nf4" and summary["frozen_weights"]["matrices"] > 0
    assert summary["frozen_weights"]["exact_on_the_device"] == {}
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert all(value.isfinite().all() for value in weights.values())
    plain = run(options, overwrite=True, sampler="lisa")
    assert plain["peak_bytes"]["weights"] > summary["peak_bytes"]["weights"]
    assert plain["held_out_loss"]["before"] == saved["before"] and "held_out_loss_as_saved" not in plain


def test_memory_is_counted_from_the_tensors(options: dict[str, Any]) -> None:
    peak = run(options, embeddings="freeze", head="freeze", norm="freeze", trainer={"optim": "adamw_torch"})[
        "peak_bytes"
    ]
    layer = 4 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32 + 2 * 16)
    assert peak["gradients"] == 2 * layer
    assert peak["optimizer_state"] == 2 * 2 * layer + 2 * 9 * 4  # two moments; a step counter a tensor
    assert peak["weights"] >= 4 * layer


@pytest.mark.parametrize("sampler", ["lisa", "cyclic"])
def test_resumes_in_the_middle_of_a_period_to_the_bit(
    options: dict[str, Any], sampler: str, tmp_path: Path
) -> None:
    options |= {"sampler": sampler, "steps": 8, "period": 3}
    run(options, output=str(tmp_path / "whole"))
    run(options, output=str(tmp_path / "part"), save_steps=4)
    part = tmp_path / "part"
    # As a run that was killed after step 5: no model, a checkpoint of step 4, lines of later steps.
    last = max((part / "checkpoints").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert last.name == "checkpoint-8"
    for path in sorted(last.rglob("*"), reverse=True):
        path.unlink()
    last.rmdir()
    run(options, output=str(part), save_steps=4, resume=True)
    assert same_weights(tmp_path / "whole", part)
    keep = ("step", "loss", "active", "learning_rate")
    whole, resumed = (
        [{k: line[k] for k in keep} for line in records(p) if "loss" in line]
        for p in (tmp_path / "whole", part)
    )
    assert whole == resumed


def test_refuses_to_resume_with_another_sampler(options: dict[str, Any]) -> None:
    run(options, save_steps=3)
    with pytest.raises(
        ConfigError, match="num_active was 2, but is 1 now; steps was 6, but is 9 now.*--allow-changes"
    ):
        run(options, save_steps=3, resume=True, num_active=1, steps=9)
    summary = run(options, save_steps=3, resume=True, num_active=1, steps=9, allow_changes=True)
    assert summary["steps"] == 9 and len(records(Path(options["output"]))[-2]["active"]) == 1


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    compute_loss = Trainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if self.model.training and self.state.global_step == 4 else loss

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 5, .* checkpoint is .*checkpoint-3"):
        run(options, save_steps=3)
    checkpoint = Path(options["output"]) / "checkpoints" / "checkpoint-3"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_in_backward_doesn_t_take_in_a_loss_that_is_no_number(
    options: dict[str, Any], accumulation: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    compute_loss = Trainer.compute_loss
    seen: list[tuple[torch.nn.Module, dict[str, torch.Tensor]]] = []  # at each forward of the third step

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = compute_loss(self, *args, **kwargs)
        if not self.model.training or self.state.global_step != 2:
            return loss
        seen.append((self.model, {n: p.detach().clone() for n, p in self.model.named_parameters()}))
        return loss * float("nan") if len(seen) == accumulation else loss

    monkeypatch.setattr(Trainer, "compute_loss", poisoned)
    with pytest.raises(NonFiniteLossError, match="loss is nan at step 3, .* before this step changes any"):
        run(options, step_in_backward=True, clip=0.0, gradient_accumulation=accumulation)
    model, before = seen[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_active": 5}, "num_active must be between 1 and the 4 layers .* but got num_active=5"),
        ({"sampler": "liza"}, "Did you mean 'lisa'"),
        ({"max_length": 500}, "max_length must be at most the model's 128 positions, but got 500"),
        ({"trainer": {"optm": "sgd"}}, "trainer: Unknown option of SFTConfig 'optm'. Did you mean 'optim'"),
        ({"trainer": {"optim": "sgdd"}}, "training options don't go together: .*sgdd"),
        ({"schedule": "zigzag"}, "training options don't go together: .*zigzag"),
        ({"data": "no.jsonl"}, "no file 'no.jsonl'"),
        # The model is looked at before any data are.
        ({"data": "no.jsonl", "model": "no/such/model"}, "Unknown model 'no/such/model'"),
        ({"data": "no.jsonl", "max_length": 129}, "128 positions, but got 129"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(
    options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(options, **change)
    assert not Path(options["output"]).exists()


def test_a_length_that_nobody_gave_is_that_of_the_model(options: dict[str, Any]) -> None:
    del options["max_length"]  # 256 by default, and the model has 128 positions
    said: list[str] = []
    finetune(make_config(("test", {**options, "steps": 1})), report=said.append)
    assert "Examples have 128 tokens at most (max_length), the model's positions." in said
    assert yaml.safe_load((Path(options["output"]) / "config.yaml").read_text())["max_length"] == 128


@pytest.mark.parametrize("what", ["nothing", "no weights", "a broken GGUF file"])
def test_a_model_that_is_none_is_told_before_data_are_read(
    options: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    model = tmp_path / "model"
    if what == "no weights":
        shutil.copytree(tiny_model, model, ignore=shutil.ignore_patterns("*.safetensors"))
    elif what == "a broken GGUF file":
        pytest.importorskip("gguf")
        model = tmp_path / "model.gguf"
        model.write_bytes(b"GGUF" + bytes(64))
    monkeypatch.setattr("layersample.training.finetune.load_split", lambda *_, **__: pytest.fail("read"))
    message = {"nothing": "Unknown model", "no weights": "must hold weights", "a broken GGUF file": "loaded"}
    with pytest.raises(ConfigError, match=message[what]):
        run(options, model=str(model))


def test_one_process_uses_one_gpu(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training_arguments(make_config(("test", options)), tmp_path).n_gpu == 1


def test_examples_that_are_too_long_are_counted(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"{i}", "completion": "x" * (40 if i < 5 else 4)} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    finetune(
        make_config(("test", {**options, "data": str(path), "eval_data": str(options["data"])})),
        report=said.append,
    )
    assert "5 training examples are longer than 16 tokens and are cut." in said


def test_prompts_that_leave_no_room(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": f"{i}" + "x" * 40, "completion": "y"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ConfigError, match="prompts alone fill max_length=16 tokens: raise it"):
        run(options, data=str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True, "embeddings": "sample"},
        {"gradient_accumulation": 2, "clip": 0.1},
        {"precision": "bf16-mixed"},
        {"precision": "bf16"},
        {
            "precision": "bf16",
            "projection": "galore",
            "rank": 4,
            "step_in_backward": True,
            "clip_by": "running",
        },
        {"epochs": 0.5},
        {"state": "offload", "warmup": 0.5, "schedule": "cosine"},
        {"trainer": {"optim": "adafactor", "eval_strategy": "steps", "eval_steps": 2}},
    ],
)
def test_options_go_through_to_the_trainer(options: dict[str, Any], change: dict[str, Any]) -> None:
    summary = run(options, **change)
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]


@pytest.mark.slow
def test_ctrl_c_saves_a_checkpoint_to_resume_from(smollm2: Path, tmp_path: Path) -> None:
    """On the real model: interrupted, resumed, and the same as if it had never been."""
    options = {"steps": 8, "period": 3, "batch_size": 1, "eval_size": 2, "max_length": 128}
    whole = start(options, output=tmp_path / "whole")
    output = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, output
    process = start(options, output=tmp_path / "run")
    wait_for_step(tmp_path / "run", 2, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130, output
    assert "--resume" in output
    assert not (tmp_path / "run" / "model").exists()
    process = resume(tmp_path / "run")
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_three_kills_leave_no_trace(smollm2: Path, tmp_path: Path) -> None:
    """On the real model, in bf16 with a projection: killed in a step, at a switch and while it saved."""
    options = {
        "steps": 7, "period": 3, "batch_size": 1, "eval_size": 1, "max_length": 96, "save_steps": 1,
        "precision": "bf16", "projection": "galore", "embeddings": "freeze",
    }  # fmt: skip
    # In a process of its own too: with another number of threads, sums differ in their last bits.
    whole = start(options, output=tmp_path / "whole")
    output = whole.communicate(timeout=600)[0]
    assert whole.returncode == 0, output
    folder = tmp_path / "run"
    process = start(options, output=folder)
    wait_for_step(folder, 2, process)
    kill(process)
    process = resume(folder)
    wait_for_step(folder, 3, process)  # the third step ends a period
    kill(process)
    process = resume(folder)
    wait_for(lambda: bool(list((folder / "checkpoints").glob(".saving-[56]-*"))), process)
    kill(process)
    process = resume(folder)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert same_weights(tmp_path / "whole", folder)


@pytest.mark.slow
def test_trains_the_real_model_on_real_data(smollm2: Path, tmp_path: Path) -> None:
    options = {"steps": 4, "period": 2, "eval_size": 2, "batch_size": 2, "max_length": 96, "check": True}
    summary = run(options, output=str(tmp_path / "run"), embeddings="freeze", learning_rate=1e-3)
    assert summary["held_out_loss"]["after"] < summary["held_out_loss"]["before"]
    # Two moments of 2 layers of 3,540,096 parameters and the final norm; a step counter for each of 19 tensors.
    assert summary["peak_bytes"]["optimizer_state"] == 2 * 4 * (2 * 3_540_096 + 576) + 19 * 4
    assert os.path.getsize(tmp_path / "run" / "model" / "model.safetensors") > 5e8


def test_a_later_resume_doesn_t_take_over_how_the_run_was_begun(options: dict[str, Any]) -> None:
    run(options, overwrite=True, allow_changes=True)
    stored = yaml.safe_load((Path(options["output"]) / "config.yaml").read_text())
    assert not any(stored[name] for name in ("overwrite", "allow_changes", "resume"))


def test_the_chunked_loss_is_that_of_trl(options: dict[str, Any]) -> None:
    losses = []
    for chunk in (0, 3):
        run(options, loss_chunk=chunk, overwrite=True)
        losses.append([r["loss"] for r in records(Path(options["output"])) if "loss" in r])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_bf16_is_saved_as_it_is_or_as_exact_fp32(options: dict[str, Any], tmp_path: Path) -> None:
    saved = {}
    for precision in ("model", "fp32"):
        run(options, precision="bf16", save_precision=precision, output=str(tmp_path / precision))
        saved[precision] = AutoModelForCausalLM.from_pretrained(tmp_path / precision / "model", dtype="auto")
    assert saved["model"].dtype == torch.bfloat16 and saved["fp32"].dtype == torch.float32
    fp32 = saved["fp32"].state_dict()
    assert all(
        torch.equal(fp32[name].bfloat16(), value) for name, value in saved["model"].state_dict().items()
    )
    assert any(not torch.equal(value.bfloat16().float(), value) for value in fp32.values())


def test_a_budget_chooses_the_number_of_layers(options: dict[str, Any]) -> None:
    frozen = {"embeddings": "freeze", "head": "freeze", "norm": "freeze"}
    run({**options, **frozen}, budget="0.5")
    assert {len(r["active"]) for r in records(Path(options["output"])) if "active" in r} == {3}
    stored = yaml.safe_load((Path(options["output"]) / "config.yaml").read_text())
    assert (stored["budget"], stored["num_active"]) == ("0.5", 3)


def test_a_step_in_backward_trains_alike_and_holds_fewer_gradients(options: dict[str, Any]) -> None:
    losses = []
    for stepping in (False, True):
        summary = run(options, step_in_backward=stepping, clip=0.0, overwrite=True)
        losses.append([r["loss"] for r in records(Path(options["output"])) if "loss" in r])
    assert losses[0] == losses[1]
    assert summary["peak_bytes"]["gradients"] == 4 * 260 * 16, "the largest one, alone"
