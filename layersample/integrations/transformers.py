"""A callback for Hugging Face's Trainer, and so for TRL's SFTTrainer and the others built on it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, is_dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakSet

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from layersample.activations.options import ActivationOptions
from layersample.activations.save_memory import save_memory
from layersample.checkpoints.sharded import optimizer_of
from layersample.errors import ConfigError
from layersample.integrations.before_sharding import measure_before_sharding
from layersample.integrations.first_batches import FirstBatches
from layersample.integrations.trainer_checkpoints import check_can_save, protect_checkpoints
from layersample.integrations.trainer_loss import OwnLosses, has_own_loss, logits_are_watched
from layersample.optim.step_in_backward import how_to_step
from layersample.option_files import make_options
from layersample.parallel.base import NO_DATA_PARALLEL
from layersample.sampling.reuse import forget
from layersample.sampling.sampler import LayerSampler
from layersample.scheduling.options import DEFAULT_SAMPLER, SchedulerOptions, default_period
from layersample.scheduling.scheduler import LayerScheduler
from layersample.versions import installed

logger = logging.getLogger(__name__)


class CallbackOptions(SchedulerOptions, ActivationOptions):
    """The options of a scheduler, and what makes a step smaller."""


class LayerSamplingCallback(TrainerCallback, ExportableState):
    """Layer sampling in the Trainer you already have: ``Trainer(..., callbacks=[LayerSamplingCallback("lisa")])``.

    It makes a :class:`~layersample.LayerScheduler` when training begins and switches layers at the beginning
    of a step: once per gradient accumulation, before any gradient of it, and after a checkpoint of the step
    before. Its state is part of the Trainer's checkpoints; ``train(resume_from_checkpoint=...)`` continues with
    the layers that were active. Samplers that measure with data get the first training examples.

    The Trainer's logs get ``active_layers``, ``sampling_round``, ``layer_coverage`` (share of the layers that
    have trained) and ``layer_staleness`` (most periods since a layer last trained); with ``inactive`` also
    ``moving_layers`` (how many move without state). They are in
    ``state.log_history`` and reach the callbacks behind this one. The Trainer puts its own reporters
    (TensorBoard, W&B) in front of callbacks that it is given, so use :meth:`attach` to have them report these.

    With several processes, use :meth:`attach` too: a callback never sees DistributedDataParallel, which must be
    told of each switch, and comes too late for the optimizer's checkpoint of FSDP2.

    Args:
        sampler: Name of a registered sampler, or a sampler.
        loss_chunk: Compute the loss from the logits of this many positions at a time, see
            :class:`~layersample.ChunkedLoss`. ``"auto"`` does so where the Trainer asks for the model's own loss and
            nothing else looks at the logits; ``None`` leaves the loss alone. TRL's trainers have a fused loss of
            their own, which stays.
        recompute: Keep fewer activations, exactly, see :class:`~layersample.SelectiveRecompute`.
        options: Every other option of a :class:`~layersample.LayerScheduler`, by name. ``seed`` is the Trainer's
            ``args.seed`` by default, and ``period`` an eighth of the Trainer's steps, at most 20.
            ``step_in_backward`` wants the Trainer's ``max_grad_norm`` to be 0, and doesn't go with its ``fp16``.

    Raises:
        ConfigError: When training begins, as :class:`~layersample.LayerScheduler` does; or if the Trainer has
            arguments that don't go with layer sampling.
    """

    def __init__(
        self,
        sampler: str | LayerSampler = DEFAULT_SAMPLER,
        *,
        loss_chunk: int | Literal["auto"] | None = "auto",
        recompute: bool = True,
        **options: Any,
    ) -> None:
        saving = {"loss_chunk": loss_chunk, "recompute": recompute}
        self.options = make_options(
            CallbackOptions, [("", {"sampler": sampler, **saving, **options})], "option"
        )
        self._savers = ExitStack()
        self._trainers: WeakSet[Trainer] = WeakSet()
        self.scheduler: LayerScheduler | None = None
        self._is_training = False
        self._state: TrainerState | None = None
        self._sampler_at_first: dict[str, Any] | None = None

    def attach(self, trainer: Trainer, *, verify: bool = True) -> LayerSamplingCallback:
        """Add this callback to a Trainer, in front of its reporters and with a view of the wrapped model.

        An unfinished checkpoint of the Trainer is then never read: each is saved beside its place, listed, renamed,
        and checked before the Trainer resumes from it. A run that is resumed at its last step does no step more.

        Args:
            trainer: The Trainer, before ``train()``; SFTTrainer and the like are Trainers.
            verify: Whether a checkpoint's checksums are compared before it is loaded, and not its sizes alone. That
                reads every byte once more, at about 2 GB/s a processor.

        Raises:
            ConfigError: If the Trainer has arguments that don't go with layer sampling.
        """
        self._check(trainer.args)
        if self in trainer.callback_handler.callbacks:
            trainer.callback_handler.callbacks.remove(self)
        trainer.callback_handler.callbacks.insert(0, self)
        if trainer not in self._trainers:
            self._trainers.add(trainer)
            load = trainer._load_optimizer_and_scheduler

            def load_what_is_there(checkpoint: str | None) -> None:
                assert trainer.model is not None
                with optimizer_of(checkpoint, trainer.model):
                    load(checkpoint)

            # No callback runs between the preparation of the model and this.
            trainer._load_optimizer_and_scheduler = load_what_is_there  # type: ignore[method-assign]
            trainer.train = partial(self._train, trainer, trainer.train)  # type: ignore[method-assign]
        protect_checkpoints(trainer, verify=verify, allow_changes=self.options.allow_changes)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the scheduler; take back its state from a checkpoint."""
        self._check(args)
        self._end_interrupted(kwargs["optimizer"], resumes=state.global_step > 0)
        arguments = self.options.arguments()
        if arguments["seed"] is None:
            arguments["seed"] = args.seed
        # The Trainer saves the state of callbacks only under keys that are there.
        stored: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        exported = stored.setdefault(type(self).__name__, {})
        if isinstance(exported, list):
            exported = exported[-1] if exported else {}
        # Of a new run the Trainer asks this callback itself, which may still hold what an earlier run ended with.
        saved = exported.get("attributes", {}).get("scheduler_state") if state.global_step else None
        if arguments["period"] is None:  # a resumed run may have another number of steps to do
            arguments["period"] = (saved or {}).get("period") or default_period(state.max_steps)
        self._forget_earlier_runs()
        trainer = next((trainer for trainer in self._trainers if trainer.state is state), None)
        check_can_save(args, kwargs["model"], projects=self.options.projection is not None)
        self._state = state
        self.scheduler = LayerScheduler(
            kwargs["model"] if trainer is None else trainer.model_wrapped,
            kwargs["optimizer"],
            **arguments,
            batches=_batches(trainer, kwargs["train_dataloader"], args.per_device_train_batch_size),
            state_dict=saved or None,
        )
        self._is_training = True
        if not saved and (reach := self.scheduler.reach(state.max_steps - state.global_step)):
            logger.warning("%s", reach)
        self._savers = save_memory(
            kwargs["model"],
            loss_chunk=self._chunk_positions(trainer),
            recompute=self.options.recompute,
            strict=self.options.loss_chunk != "auto",
        )
        if state.global_step and not saved:
            logger.warning(
                "The checkpoint was made without layer sampling; sampling begins at step %d as if it had been on.",
                state.global_step,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step that has ended, and switch layers where its period has too."""
        assert self.scheduler is not None
        if state is not self._state:
            raise ConfigError(
                "A LayerSamplingCallback must be in one training at a time, but another Trainer has begun to train "
                "with this one since: make one for each."
            )
        if state.global_step >= state.max_steps:  # the Trainer ends only after the step that reaches it
            raise ConfigError(
                f"A resumed run must have steps left, but this one has done {state.global_step} of {state.max_steps}, "
                "and the Trainer would do one more: use attach(trainer), which ends it here with transformers 5.3 "
                f"or later ({installed('transformers')}), or raise max_steps."
            )
        self.scheduler.advance_to(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the active layers to the logs of a training step."""
        if args.load_best_model_at_end and logs is not None and "train_runtime" in logs:
            # Training is over, and the Trainer is about to load other weights, which no check must see.
            self._end(check=True)
        if self.scheduler is None or logs is None or "loss" not in logs:
            return
        self.scheduler.tell_loss(float(logs["loss"]))  # a mean since the last line, on all ranks the same
        active = {
            "sampling_round": self.scheduler.round,
            "active_layers": " ".join(map(str, self.scheduler.active)),
            "layer_coverage": self.scheduler.coverage,
            "layer_staleness": max(self.scheduler.staleness),
        }
        if self.options.inactive != "freeze":
            active["moving_layers"] = len(self.scheduler.moving_layers)
        logs.update(active)
        state.log_history[-1].update(active)  # type: ignore[arg-type]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give every parameter its ``requires_grad`` back."""
        # The Trainer has put the best model's weights in place of the last step's by now.
        self._end(check=not args.load_best_model_at_end)

    def _train(self, trainer: Trainer, train: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Train; an error, of which no callback is told, leaves the model as it was found as well."""
        try:
            if not (args or kwargs.get("resume_from_checkpoint")):  # a checkpoint holds what was measured
                measure_before_sharding(trainer, self.options, _batches)
            return train(*args, **kwargs)
        except BaseException:
            self._end(check=False)
            raise

    def _end_interrupted(self, optimizer: Any, *, resumes: bool) -> None:
        """End a run that was interrupted, in a notebook say; its scheduler is still on the optimizer."""
        if not self._is_training:
            return
        # A checkpoint has been loaded through that scheduler by now, which puts away its own state as it ends.
        loaded = optimizer.state_dict() if resumes else None
        self._end(check=False)
        if loaded is not None:
            optimizer.load_state_dict(loaded)

    def _forget_earlier_runs(self) -> None:
        """Have a sampler that was given as an object begin each run as it was given."""
        sampler = self.options.sampler
        if not isinstance(sampler, LayerSampler):
            return
        if self._sampler_at_first is None:
            self._sampler_at_first = deepcopy(sampler.state_dict())
        else:
            sampler.load_state_dict(deepcopy(self._sampler_at_first))
            forget(sampler)

    def _end(self, *, check: bool) -> None:
        if self.scheduler is not None and self._is_training:
            self.scheduler.close(check=check)
        self._is_training = False
        self._savers.close()

    def _check(self, args: TrainingArguments) -> None:
        """Refuse arguments of the Trainer under which a run would go wrong."""
        if args.restore_callback_states_from_checkpoint:
            raise ConfigError(
                "restore_callback_states_from_checkpoint must be False, because the Trainer would make this callback "
                "anew from JSON, which holds no objects. It isn't needed: layer sampling takes its own state from the "
                "checkpoint."
            )
        if args.n_gpu > 1:
            raise ConfigError(NO_DATA_PARALLEL)  # a callback that isn't attached never sees the wrapper
        if args.load_best_model_at_end and not hasattr(Trainer, "_run_epoch"):
            raise ConfigError(
                "load_best_model_at_end must be False with transformers before 5.3, which puts the best weights in "
                f"place while layers are still sampled ({installed('transformers')}): install 5.3 or later, or load "
                "the best checkpoint when training is over."
            )
        if how_to_step(self.options.step_in_backward) is None:
            return
        if args.max_grad_norm:
            raise ConfigError(
                "A step in the backward pass leaves no gradients to clip: set the Trainer's max_grad_norm to 0, and "
                f"StepInBackward(max_norm=...) in its place, but got max_grad_norm={args.max_grad_norm}."
            )
        if args.fp16:
            raise ConfigError(
                "A step in the backward pass can't look for overflows of fp16 before it steps: set the Trainer's "
                "fp16=False, and bf16=True for 16 bits."
            )

    def _chunk_positions(self, trainer: Trainer | None) -> int | None:
        """Positions of a chunk of the loss; by itself only where nothing but the model's own loss needs logits."""
        if self.options.loss_chunk != "auto":
            return self.options.chunk_positions
        if trainer is None or has_own_loss(trainer) or logits_are_watched(trainer):
            return None
        return self.options.chunk_positions

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into a checkpoint: arguments and the scheduler's state."""
        return {
            "args": {name: _to_json(value) for name, value in dict(self.options).items()},
            "attributes": {"scheduler_state": self.scheduler.state_dict() if self.scheduler else None},
        }


def _batches(trainer: Trainer | None, loader: Any, size: int) -> Callable[[], Any]:
    """The first training examples, with the Trainer's own loss of them where it has one."""
    if trainer is not None and has_own_loss(trainer):
        return OwnLosses(trainer, loader, size)
    return FirstBatches(loader, size)


def _to_json(value: Any) -> Any:
    """An option as JSON can hold it; the Trainer only shows these."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return value if isinstance(value, str | int | float | dict | None) else f"{type(value).__name__} (object)"
