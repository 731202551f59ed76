"""A callback for PyTorch Lightning's Trainer; Fabric's loops are plain ones and need none."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from layersample.activations.options import ActivationOptions
from layersample.activations.save_memory import save_memory
from layersample.checkpoints.sharded import only_trainable, stored_state
from layersample.errors import ConfigError
from layersample.integrations.first_batches import FirstBatches
from layersample.optim.step_in_backward import how_to_step
from layersample.option_files import make_options
from layersample.sampling.calibration import Batches
from layersample.sampling.sampler import LayerSampler
from layersample.scheduling.options import DEFAULT_SAMPLER, SchedulerOptions, default_period
from layersample.scheduling.scheduler import LayerScheduler

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ConfigError(
            "This callback needs PyTorch Lightning 2.2 or later: pip install lightning."
        ) from error

_STATE = "scheduler_state"
_PREPARED: WeakSet[Any] = WeakSet()  # strategies that load the state of some parameters alone


class _Options(SchedulerOptions, ActivationOptions):
    """The options of a scheduler, and what makes a step smaller."""


class LayerSampling(Callback):  # type: ignore[misc]
    """Layer sampling in PyTorch Lightning: ``Trainer(callbacks=[LayerSampling("lisa", num_active=2)])``.

    It makes a :class:`~layersample.LayerScheduler` when training starts, once a checkpoint is loaded, and counts each
    step that an optimizer really does, in automatic and in manual optimization. Layers are switched right after a
    step. Its state is part of Lightning's checkpoints; ``fit(ckpt_path=...)`` continues to the bit.

    The layers are found in the transformers model that the module holds, or named by ``layers``. The module's
    optimizers must hold all parameters, and be made while they all require a gradient. Of several, each must step as
    often as the others.

    Args:
        sampler: Name of a registered sampler, or a sampler.
        batches: Calibration batches, for samplers that measure with data; by default the first training examples, put
            together by the training loader. The module is called with them, and gives an output with a ``loss``.
        loss_chunk: Compute the model's loss from the logits of this many positions at a time; off by default, because
            what ``training_step`` does with logits isn't known.
        recompute: Keep fewer activations, exactly, see :class:`~layersample.SelectiveRecompute`.
        options: Every other option of a :class:`~layersample.LayerScheduler`, by name. ``seed`` is that of
            ``seed_everything`` by default, and ``period`` an eighth of the Trainer's steps, at most 20.
            ``step_in_backward`` wants no gradient clipping of Lightning's.

    Raises:
        ConfigError: When training starts, as :class:`~layersample.LayerScheduler` does; or if the Trainer has a
            strategy or arguments that don't go with layer sampling.
    """

    def __init__(
        self,
        sampler: str | LayerSampler = DEFAULT_SAMPLER,
        *,
        batches: Batches | None = None,
        loss_chunk: int | None = None,
        recompute: bool = True,
        **options: Any,
    ) -> None:
        given = {"sampler": sampler, "loss_chunk": loss_chunk, "recompute": recompute, **options}
        self.options = make_options(_Options, [("", given)], "option")
        self.scheduler: LayerScheduler | None = None
        self._batches = batches
        self._saved: dict[str, Any] | None = None
        self._running = ExitStack()
        self._loss: Tensor | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse what can't be right; under FSDP2 only what has optimizer state may train while it is loaded."""
        self._check(trainer)
        if any(hasattr(parameter, "device_mesh") for parameter in pl_module.parameters()):
            _refuse_unsavable(trainer, pl_module, self.options.projection)
            _load_sharded_state_of_some(trainer.strategy)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the scheduler; take back its state from a checkpoint."""
        self._end(check=False)  # of a fit that was interrupted
        arguments = self.options.arguments()
        if arguments["seed"] is None:
            arguments["seed"] = int(os.environ.get("PL_GLOBAL_SEED", "0"))  # where seed_everything puts it
        saved, self._saved = self._saved, None
        steps = trainer.estimated_stepping_batches
        if arguments["period"] is None:
            known = None if steps == float("inf") else int(steps)
            arguments["period"] = (saved or {}).get("period") or default_period(known)
        optimizers = list(trainer.optimizers)
        self.scheduler = LayerScheduler(
            trainer.strategy.model,
            optimizers[0] if len(optimizers) == 1 else optimizers,
            **arguments,
            batches=self._batches or partial(_first_batches, trainer),
            state_dict=saved,
        )
        self._running = save_memory(
            pl_module, loss_chunk=self._chunk_positions, recompute=self.options.recompute
        )
        self._count_steps(trainer.strategy, optimizers)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Add up the loss of a step; Lightning has divided it by the number of micro-batches."""
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Log the number of the period, and how many of the layers have trained."""
        assert self.scheduler is not None
        figures = {"sampling_round": self.scheduler.round, "layer_coverage": self.scheduler.coverage}
        self.log_dict({name: float(value) for name, value in figures.items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give every parameter its ``requires_grad`` back."""
        self._end(check=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same after an error, or Ctrl-C."""
        self._end(check=False)

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes into a checkpoint."""
        return {_STATE: None if self.scheduler is None else self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training starts."""
        self._saved = state_dict[_STATE]

    @property
    def _chunk_positions(self) -> int | None:
        return None if self.options.loss_chunk is None else self.options.chunk_positions

    def _count_steps(self, strategy: Any, optimizers: list[torch.optim.Optimizer]) -> None:
        """Have the scheduler step once each optimizer has; a step that a scaler of fp16 skips is none."""
        scheduler = self.scheduler
        assert scheduler is not None
        stepped: list[torch.optim.Optimizer] = []
        for optimizer in optimizers:
            hook = optimizer.register_step_post_hook(lambda one, args, kwargs: stepped.append(one))
            self._running.callback(hook.remove)
        step_theirs = strategy.optimizer_step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = step_theirs(*args, **kwargs)
            if not stepped:  # what isn't finite is skipped, and so is its loss
                self._loss = None
            # Not within the optimizer's own step, amid which nothing may be switched.
            if len(stepped) >= len(optimizers):
                if len({id(one) for one in stepped}) < len(optimizers):
                    raise ConfigError(
                        "Of several optimizers each must step as often as the others, but one has stepped twice: give "
                        "it to a LayerScheduler of its own, in a plain loop."
                    )
                stepped.clear()
                loss, self._loss = self._loss, None
                scheduler.step(loss=loss)
            return result

        strategy.optimizer_step = step
        self._running.callback(delattr, strategy, "optimizer_step")

    def _check(self, trainer: Any) -> None:
        name = type(trainer.strategy).__name__
        if name == "FSDPStrategy":
            raise ConfigError(
                "Lightning's FSDPStrategy (FSDP1) saves optimizer state of all parameters, and only some have any: "
                "use ModelParallelStrategy, with fully_shard in the module's configure_model."
            )
        if how_to_step(self.options.step_in_backward) is None:
            return
        if trainer.gradient_clip_val:
            raise ConfigError(
                "A step in the backward pass leaves no gradients to clip: leave the Trainer's gradient_clip_val "
                f"out, and choose StepInBackward(max_norm=...), but got gradient_clip_val={trainer.gradient_clip_val}."
            )
        windows = how_to_step(self.options.step_in_backward).accumulation  # type: ignore[union-attr]
        if windows != trainer.accumulate_grad_batches:
            raise ConfigError(
                "A step in the backward pass must know how many micro-batches a step has: choose "
                f"StepInBackward(accumulation={trainer.accumulate_grad_batches}), but got {windows}."
            )
        if trainer.precision == "16-mixed":
            raise ConfigError(
                "A step in the backward pass can't look for overflows of fp16: choose bf16-mixed."
            )

    def _end(self, *, check: bool) -> None:
        if self.scheduler is not None:
            self.scheduler.close(check=check)
        self._loss = None
        self._running.close()


def _first_batches(trainer: Any) -> Any:
    loader = trainer.train_dataloader
    return FirstBatches(loader, getattr(loader, "batch_size", None) or 1, replays=False)()


def _refuse_unsavable(trainer: Any, module: nn.Module, projection: object) -> None:
    """Refuse what Lightning's checkpoints of sharded models, which are torch's own, can't hold."""
    if trainer.checkpoint_callback is None and trainer.ckpt_path is None:
        return
    narrow = any(parameter.dtype.itemsize < 4 for parameter in module.parameters())
    if narrow or projection is not None:
        what = "16-bit weights" if narrow else "a projection"
        raise ConfigError(
            f"Lightning's checkpoints of FSDP2 can't hold the optimizer state of {what}: "
            + ("shard fp32 weights with MixedPrecisionPolicy(param_dtype=torch.bfloat16), " if narrow else "")
            + "use layersample.save_distributed in a loop of your own, or do without checkpoints: "
            + "Trainer(enable_checkpointing=False)."
        )


def _load_sharded_state_of_some(strategy: Any) -> None:
    """Lightning loads FSDP2's optimizer state into a template of all that may train, which must be what has state."""
    if strategy in _PREPARED:  # by an earlier fit
        return
    _PREPARED.add(strategy)
    load_theirs: Callable[..., Any] = strategy.load_checkpoint

    def load(checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        names = _names_with_state(Path(checkpoint_path), strategy.model)
        with only_trainable(strategy.model, names):
            return load_theirs(checkpoint_path, *args, **kwargs)

    strategy.load_checkpoint = load


def _names_with_state(checkpoint: Path, model: nn.Module) -> set[str]:
    """Parameters that have optimizer state in a checkpoint of ModelParallelStrategy: a folder of shards, or a file."""
    if checkpoint.is_dir():
        return set(stored_state(checkpoint, "optimizer_0"))
    names = [name for name, _ in model.named_parameters()]
    stored = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
    # Lightning numbers them in a file, by their order in the model.
    return {names[number] for state in stored["optimizer_states"] for number in state["state"]}
