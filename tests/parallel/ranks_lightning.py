"""PyTorch Lightning on two ranks, against one process; see ranks.py."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from layersample import ConfigError, LayerScheduler
from tests.helpers import make_batch, make_llama
from tests.parallel.ranks import NUM_LAYERS, assert_close, own_rows

warnings.simplefilter("ignore")
import lightning.pytorch as lightning  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: E402

from layersample.integrations.lightning import LayerSampling  # noqa: E402

L: Any = lightning
STEPS = 6


class Module(L.LightningModule):  # type: ignore[misc]
    """A model in double precision, whose layers are sharded where it is asked for."""

    def __init__(self, *, shard: bool = False) -> None:
        super().__init__()
        self.model = make_llama(NUM_LAYERS, dtype=torch.float64)
        self._shard = shard

    def configure_model(self) -> None:
        if self._shard:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(
    module: Module, *, checkpoint: Path | None = None, projection: str | None = None, **options: Any
) -> Any:
    """Train on 4 rows a step, two on each rank; they are the same each step."""
    rows = [{k: v[0] for k, v in make_batch(i, 1).items()} for i in range(4)][own_rows()] * 8
    arguments: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "max_epochs": -1, "logger": False}
    arguments["use_distributed_sampler"] = False  # it would shuffle
    arguments |= {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        **{**arguments, "max_steps": STEPS, **options},
        callbacks=[LayerSampling("lisa", period=2, seed=1, projection=projection)],
    )
    loader: Any = DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def alone() -> nn.Module:
    """The same run by a plain loop in one process."""
    module = Module()
    optimizer: Any = module.configure_optimizers()
    batch = {k: torch.cat([make_batch(i, 1)[k] for i in range(4)]) for k in make_batch()}
    with LayerScheduler(module, optimizer, "lisa", period=2, seed=1) as scheduler:
        for _ in range(STEPS):
            loss: Any = module.training_step(batch, 0)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return module.model


def check_ddp(folder: Path) -> None:
    module = Module()
    fit(module, strategy="ddp")
    assert_close(module.model, alone())


def check_ddp_resumes(folder: Path) -> None:
    whole, resumed = Module(), Module()
    trainer = fit(whole, strategy="ddp", max_steps=3)
    trainer.save_checkpoint(folder / "ddp.ckpt")
    fit(resumed, strategy="ddp", checkpoint=folder / "ddp.ckpt")
    assert_close(resumed.model, alone())


def check_fsdp2(folder: Path) -> None:
    module = Module(shard=True)
    fit(module, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))
    assert_close(module.model, alone())


def check_fsdp2_resumes(folder: Path) -> None:
    for sharded in (True, False):
        options: dict[str, Any] = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        options["save_distributed_checkpoint"] = sharded
        path = folder / f"fsdp-{sharded}.ckpt"
        trainer = fit(Module(shard=True), strategy=ModelParallelStrategy(**options), max_steps=3)
        trainer.save_checkpoint(path)
        module = Module(shard=True)
        fit(module, strategy=ModelParallelStrategy(**options), checkpoint=path)
        assert_close(module.model, alone())


def check_fsdp2_refuses_what_its_checkpoints_cannot_hold(folder: Path) -> None:
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    try:
        fit(Module(shard=True), strategy=strategy, enable_checkpointing=True, projection="galore")
    except ConfigError as error:
        assert "can't hold the optimizer state of a projection" in str(error)
    else:
        raise AssertionError("not refused")
