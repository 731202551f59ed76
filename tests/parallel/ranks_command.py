"""What `layersample train` must do on two ranks; run by ranks.py on each. What it writes is compared by the tests."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist
from transformers import Trainer

from layersample import ConfigError
from layersample.config import make_config
from layersample.training.finetune import finetune
from layersample.training.recording import RunRecorder
from layersample.training.trainer import Interrupted, NonFiniteLossError
from tests.parallel.ranks_alone import OPTIONS, top, train, train_double


def second() -> bool:
    return dist.get_rank() == 1


def refuse(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=match):
        train(folder, "refused", **options)
    dist.barrier()
    assert not (folder / "refused").exists()


def check_ddp(folder: Path) -> None:
    summary = train(folder, "ddp", save_steps=3)
    assert summary["ranks"]["shard"] is None and len(summary["ranks"]["peak_bytes"]) == 2


def check_shards(folder: Path) -> None:
    whole = json.loads((folder / "ddp" / "summary.json").read_text())
    summary = train(folder, "fsdp2", shard="fsdp2", save_steps=3)
    for ours, theirs in zip(summary["ranks"]["peak_bytes"], whole["ranks"]["peak_bytes"], strict=True):
        for kind in ("weights", "gradients", "optimizer_state"):
            assert 0.45 < ours[kind] / theirs[kind] < 0.6, kind
    assert (folder / "fsdp2/checkpoints/checkpoint-6/optimizer_0").is_dir()


def check_shards_with_whole_checkpoints_and_a_sampler_that_measures(folder: Path) -> None:
    options = {"sampler": "lora_norm", "sharded_checkpoints": False, "save_steps": 3}
    train(folder, "lora_norm", shard="fsdp2", **options)
    saved = folder / "lora_norm/checkpoints/checkpoint-3"
    assert (saved / "optimizer.bin").is_file() and (saved / "model.safetensors").is_file()
    refuse(
        folder,
        "measure once, before the model is cut into shards, but is to measure every 2 periods",
        shard="fsdp2",
        sampler="lora_norm",
        sampler_options={"every": 2},
    )


def check_shards_in_mixed_precision(folder: Path) -> None:
    train(folder, "bf16", shard="fsdp2", precision="bf16-mixed")


def check_a_run_of_one_process_is_resumed_on_two(folder: Path) -> None:
    train(top(folder), "one", resume=True, batch_size=4)
    assert json.loads((top(folder) / "one" / "ranks.json").read_text()) == {"ranks": 2}


def check_double_precision(folder: Path) -> None:
    for name, shard in {"double": None, "double_shards": "fsdp2"}.items():
        train_double(folder, name, shard=shard)


def check_shards_are_not_resumed_as_whole_parameters_nor_these_as_shards(folder: Path) -> None:
    shards: dict[str, Any] = {"shard": "fsdp2"}
    in_one_file = {**shards, "sampler": "lora_norm", "sharded_checkpoints": False}
    for name, options, match in (
        ("ddp", shards, "of whole parameters, .* Resume it without shards: leave out --shard"),
        ("fsdp2", {}, "in shards .*, in a part of each rank, .* --shard fsdp2 --sharded-checkpoints"),
        ("fsdp2", {**shards, "sharded_checkpoints": False}, "in a part of each rank, and .* in one file"),
        ("lora_norm", {**in_one_file, "sharded_checkpoints": True}, "in one file, .* --no-sharded-checkp"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(folder, name, save_steps=3, resume=True, allow_changes=True, **options)


def check_what_ranks_have_differently_is_refused(folder: Path) -> None:
    refuse(folder, "same options, but learning_rate is 0.01 on rank 0, 0.02 on rank 1", **(
        {"learning_rate": 0.02} if second() else {}
    ))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if second():  # the same name, and other content
            other = folder / "other.jsonl"
            other.write_text((top(folder) / "sums.jsonl").read_text().replace("0+0", "0+9"))
            patch.setattr("layersample.training.data.read_rows", _from(other))
        refuse(folder, "same data, but training data is '.* examples .* on rank 0, .* on rank 1")
        if second():
            patch.setattr("layersample.training.data.read_rows", _from(folder / "gone.jsonl"))
        refuse(folder, "On rank 1: .*no file .*gone.jsonl")
    refuse(folder, "step_in_backward needs gradients that are whole", step_in_backward=True, clip=0)


def _from(path: Path) -> Any:
    from layersample.training.readers import read_rows

    return lambda source: read_rows(str(path))


def check_a_signal_to_one_rank_stops_all_with_one_checkpoint(folder: Path) -> None:
    begin = RunRecorder.on_step_begin

    def interrupted(self: Any, args: Any, state: Any, *more: Any, **kwargs: Any) -> None:
        begin(self, args, state, *more, **kwargs)
        if second() and state.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(RunRecorder, "on_step_begin", interrupted)
        train(folder, "stopped")
    assert stopped.value.signal_number == signal.SIGINT
    checkpoints = [path.name for path in (folder / "stopped" / "checkpoints").iterdir()]
    assert checkpoints == ["checkpoint-3"] and stopped.value.checkpoint.name == "checkpoint-3"


def check_a_loss_that_is_no_number_on_one_rank_stops_all(folder: Path) -> None:
    compute_loss = Trainer.compute_loss

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = compute_loss(self, *args, **kwargs)
        return loss * float("nan") if second() and self.model.training else loss

    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(NonFiniteLossError, match="nan at step 1"),
    ):
        patch.setattr(Trainer, "compute_loss", poisoned)
        train(folder, "poisoned")


def check_shards_need_ranks(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RANK")
        with pytest.raises(ConfigError, match="started alone: add --gpus"):
            finetune(make_config(("test", {**OPTIONS, "shard": "fsdp2", "output": str(folder / "alone")})))
