"""PyTorch Lightning's own Trainer, against plain loops."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from layersample import ConfigError, LayerScheduler, StepInBackward
from tests.helpers import make_batch, make_llama, weights_of

with warnings.catch_warnings():  # what it imports warns of itself
    warnings.simplefilter("ignore")
    L: Any = pytest.importorskip("lightning.pytorch")
    from layersample.integrations import lightning
    from layersample.integrations.lightning import LayerSampling

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders, loggers and devices


class Module(L.LightningModule):  # type: ignore[misc]
    """A model in automatic optimization."""

    def __init__(self, dtype: torch.dtype = torch.float32, seen: list[Any] | None = None) -> None:
        super().__init__()
        self.model = make_llama(dtype=dtype)
        self.seen = [] if seen is None else seen

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        self.seen.append([p.requires_grad for p in self.model.parameters()])
        loss: Tensor = self.model(**batch, use_cache=False).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Manual(Module):
    """The same, stepping twice a batch by itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()


def loader(*, same: bool = False) -> DataLoader[Any]:
    rows = [{k: v[0] for k, v in make_batch(0 if same else i, 1).items()} for i in range(16)]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def fit(
    folder: Path, module: Any, sampling: Any, ckpt_path: str | None = None, same: bool = False, **options: Any
) -> Any:
    trainer = L.Trainer(
        **{
            **{"accelerator": "cpu", "max_epochs": -1, "max_steps": 8, "logger": False},
            **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
            "default_root_dir": folder,
            **options,
            "callbacks": [sampling, *options.get("callbacks", [])],
        }
    )
    trainer.fit(module, loader(same=same), ckpt_path=ckpt_path)
    return trainer


def plain(
    steps: int = 8, *, micro: int = 1, twice: bool = False, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    """What Lightning should come to."""
    module = Module(dtype)  # projections draw by the names of weights
    model, optimizer = module.model, torch.optim.AdamW(module.parameters(), lr=1e-2)
    batches = [batch for _ in range(4) for batch in loader()]
    with LayerScheduler(module, optimizer, "lisa", **{"period": 2, "seed": 1, **options}) as scheduler:
        for step in range(steps):
            for number in range(micro):
                batch = batches[step // 2 if twice else step * micro + number]
                (model(**batch, use_cache=False).loss / micro).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


def assert_same(module: Any, model: Any) -> None:
    ours, theirs, start = (weights_of(m) for m in (module.model, model, make_llama().to(model.dtype)))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert sum(not torch.equal(ours[name], start[name]) for name in ours) > 10


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection": "galore", "projection_options": {"rank": 4}},
        {"state": "offload"},
        {"step_in_backward": True},
        {"check": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_steps_as_a_plain_loop_does(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Module()
    sampling = LayerSampling("lisa", period=2, seed=1, **options)
    fit(tmp_path, module, sampling)
    assert_same(module, plain(**options))
    assert sampling.scheduler is not None and sampling.scheduler.round == 4
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert module.seen[0] == module.seen[1] != module.seen[2]


def test_switches_after_a_window_of_accumulation(tmp_path: Path) -> None:
    module = Module()
    fit(tmp_path, module, LayerSampling("lisa", period=2, seed=1), accumulate_grad_batches=2, max_steps=6)
    assert_same(module, plain(6, micro=2))


def test_counts_the_steps_of_manual_optimization(tmp_path: Path) -> None:
    module = Manual()
    fit(tmp_path, module, LayerSampling("lisa", period=3, seed=1))
    assert_same(module, plain(8, twice=True, period=3))


@pytest.mark.parametrize(
    "options", [{}, {"projection": "galore", "projection_options": {"rank": 4}}], ids=str
)
def test_bf16_weights_train_on_their_masters(tmp_path: Path, options: dict[str, Any]) -> None:
    module = Module()
    fit(tmp_path, module, LayerSampling("lisa", period=2, seed=1, **options), precision="bf16-true")
    assert next(module.parameters()).dtype == torch.bfloat16
    assert_same(module, plain(dtype=torch.bfloat16, **options))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize(
    "options", [{}, {"projection": "galore", "projection_options": {"rank": 4}}], ids=str
)
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
def test_resumes_to_the_bit(tmp_path: Path, precision: str, options: dict[str, Any], manual: bool) -> None:
    kind = Manual if manual else Module
    whole, resumed = kind(), kind()
    saves = L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    # Lightning begins the loader anew in the middle of an epoch, so all batches are the same.
    run: dict[str, Any] = {"precision": precision, "enable_checkpointing": True, "same": True}
    chosen: dict[str, Any] = {"period": 3, "seed": 1, **options}
    fit(tmp_path, whole, LayerSampling("lisa", **chosen), callbacks=[saves], **run)
    saved = str(tmp_path / "step=4.ckpt")
    assert Path(saved).is_file(), list(tmp_path.iterdir())
    fit(tmp_path, resumed, LayerSampling("lisa", **chosen), saved, **{**run, "enable_checkpointing": False})
    ours, theirs = weights_of(resumed), weights_of(whole)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert resumed.seen == whole.seen[4:]


def test_a_resumed_run_with_other_options_is_refused(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Module(), LayerSampling("lisa", period=3, seed=1), max_steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ConfigError, match="must be resumed with the seed"):
        fit(tmp_path, Module(), LayerSampling("lisa", period=3, seed=2), str(tmp_path / "end.ckpt"))


def test_an_error_in_training_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            if index == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, index)

    module, sampling = Fails(), LayerSampling("lisa", period=2)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(tmp_path, module, sampling)
    assert all(parameter.requires_grad for parameter in module.parameters())
    fit(tmp_path, Module(), sampling)  # another fit with the same callback


def test_samplers_that_measure_have_the_first_examples(tmp_path: Path) -> None:
    class Forward(Module):
        def forward(self, **batch: Tensor) -> Any:
            return self.model(**batch)

    module = Forward()
    sampling = LayerSampling("owlore", period=2, seed=1, sampler_options={"threshold": 3.0})
    fit(tmp_path, module, sampling)
    batches = list(loader())
    twin = plain(0, sampler_options=None)
    scheduler = LayerScheduler(
        twin,
        torch.optim.AdamW(twin.parameters()),
        "owlore",
        sampler_options={"threshold": 3.0},
        batches=batches,
    )
    ours: Any = sampling.scheduler
    assert [*ours.sampler.scores.values()] == [*scheduler.sampler.scores.values()]  # type: ignore[attr-defined]


def test_samplers_that_learn_from_the_loss_are_told_it(tmp_path: Path) -> None:
    sampling = LayerSampling("bandit", period=2, seed=1)
    fit(tmp_path, Module(), sampling, accumulate_grad_batches=2, max_steps=4)
    assert sampling.scheduler is not None
    losses = sampling.scheduler.state_dict()
    assert losses["round"] == 2 and sampling.scheduler.statistics.losses is not None


@pytest.mark.parametrize(
    ("sampling", "trainer", "message"),
    [
        ({"step_in_backward": True}, {"gradient_clip_val": 1.0}, "gradient_clip_val=1.0"),
        ({"step_in_backward": True}, {"accumulate_grad_batches": 2}, r"StepInBackward\(accumulation=2\)"),
        (
            {"step_in_backward": StepInBackward(accumulation=3)},
            {"accumulate_grad_batches": 2},
            "but got 3",
        ),
        ({"num_active": 5}, {}, "num_active must be between 1 and the 4 layers"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tmp_path: Path, sampling: dict[str, Any], trainer: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tmp_path, Module(), LayerSampling("lisa", **sampling), **trainer)


def test_a_strategy_is_prepared_once_however_many_fits_there_are() -> None:
    class Strategy:
        model = None

        def load_checkpoint(self, path: str) -> None: ...

    strategy: Any = Strategy()
    lightning._load_sharded_state_of_some(strategy)
    prepared = strategy.load_checkpoint
    lightning._load_sharded_state_of_some(strategy)
    assert strategy.load_checkpoint is prepared


def test_unknown_options_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="Unknown option 'perod'. Did you mean 'period'"):
        LayerSampling("lisa", perod=3)
