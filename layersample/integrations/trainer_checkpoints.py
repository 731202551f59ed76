"""Checkpoints of a Hugging Face Trainer: saved whole or not at all, and checked before they are loaded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import SaveStrategy

from layersample.checkpoints.layout import check_layout, layout_of
from layersample.checkpoints.saving import check_loadable, remove_unfinished, saving_folder
from layersample.checkpoints.seal import (
    check,
    check_resumable,
    find_last,
    last_number,
    remove_oldest,
    seal,
)
from layersample.errors import ConfigError
from layersample.files import replace_folder
from layersample.parallel.find import find_engine

logger = logging.getLogger(__name__)


class ProtectedCheckpoints:
    """Makes a Trainer save each checkpoint beside its place and rename it, and check one that it resumes from.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._save_theirs: Callable[[Any, Any], None] = trainer._save_checkpoint
        self._load_theirs: Callable[[str, Any], None] = trainer._load_from_checkpoint
        # Of transformers 5.3 on: below it, the callback refuses to train beyond the end.
        self._run_epoch_of_theirs: Callable[..., None] | None = getattr(trainer, "_run_epoch", None)
        self.verify, self.allow_changes = True, False
        trainer._save_checkpoint = self.save  # type: ignore[method-assign]
        trainer._load_from_checkpoint = self.load  # type: ignore[method-assign, assignment]
        if self._run_epoch_of_theirs is not None:
            trainer._run_epoch = self.run_epoch  # type: ignore[method-assign]

    def save(self, model: Any, trial: Any) -> None:
        """Save beside the checkpoint's place, then rename: a killed run leaves a whole checkpoint or none."""
        args, state = self._trainer.args, self._trainer.state
        place = Path(self._trainer._get_output_dir(trial))  # a search has a folder for each trial
        name = f"checkpoint-{state.global_step}"
        scratch = self._agree_on(saving_folder(place, state.global_step))
        if args.should_save:
            remove_unfinished(place)
        self._trainer.accelerator.wait_for_everyone()
        saved, pushes = self._save_into(scratch, model, trial)
        self._trainer.accelerator.wait_for_everyone()  # every rank saves its own random state
        # ms-swift notes the last one too, and goes on to link to it.
        for noted in ("best_model_checkpoint", "last_model_checkpoint"):
            checkpoint = getattr(state, noted, None)
            if checkpoint is not None and Path(checkpoint) == saved / name:
                setattr(state, noted, str(place / name))
        if args.should_save:
            state.save_to_json(str(saved / name / TRAINER_STATE_NAME))
            self._put_in_place(saved / name, place / name, scratch)
        for push in pushes:  # the Trainer goes on to read the folder that it pushes
            push(str(place / name))
        if args.should_save and args.save_total_limit and args.save_total_limit > 0:
            best = state.best_model_checkpoint
            remove_oldest(place, args.save_total_limit, spare=[Path(best)] if best else [])
        self._trainer.accelerator.wait_for_everyone()

    def load(self, checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint to resume from, once it is found to be whole."""
        folder = Path(checkpoint)
        # One process of a machine reads it all; with the others at it too, a large one would take them minutes.
        verify = self.verify and self._trainer.accelerator.is_local_main_process
        check(folder, verify=verify, allow_changes=self.allow_changes)
        check_resumable(folder)
        check_layout(folder, layout_of(shards=self._plugin() is not None, in_parts=self._saves_parts()))
        last = find_last(folder.parent)
        if last is not None and last != folder:
            logger.warning("Resuming from %s, though %s was saved later.", folder, last)
        self._load_theirs(checkpoint, model)

    def run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train for an epoch, but not beyond the last step: the Trainer looks only after it has done one."""
        state = self._trainer.state
        if state.global_step >= state.max_steps:
            self._trainer.control.should_training_stop = True
            return
        assert self._run_epoch_of_theirs is not None
        self._run_epoch_of_theirs(*args, **kwargs)

    def _plugin(self) -> Any:
        """accelerate's plug-in for FSDP, where it is at work."""
        return self._trainer.accelerator.state.fsdp_plugin if self._trainer.is_fsdp_enabled else None

    def _saves_parts(self) -> bool:
        """Whether each rank saves its part of a model in shards."""
        return "FULL" not in str(getattr(self._plugin(), "state_dict_type", ""))

    def _agree_on(self, scratch: Path) -> Path:
        """The main process's folder, on all of them."""
        if self._trainer.args.world_size == 1:
            return scratch
        shared = [str(scratch)]
        dist.broadcast_object_list(shared, src=0)
        return Path(shared[0])

    def _save_into(self, scratch: Path, model: Any, trial: Any) -> tuple[Path, list[Callable[[str], None]]]:
        """Have the Trainer save into another folder; give where it has, and what it would then have pushed."""
        trainer, pushes = self._trainer, list[Callable[[str], None]]()
        output, push = trainer.args.output_dir, trainer._push_from_checkpoint
        trainer.args.output_dir = str(scratch)
        trainer._push_from_checkpoint = lambda checkpoint_folder: pushes.append(push)  # type: ignore[method-assign]
        try:
            self._save_theirs(model, trial)
            return Path(trainer._get_output_dir(trial)), pushes
        finally:
            trainer.args.output_dir = output
            trainer._push_from_checkpoint = push  # type: ignore[method-assign]

    def _put_in_place(self, saved: Path, target: Path, scratch: Path) -> None:
        try:
            for file in sorted(saved.glob("*.pt")):
                check_loadable(file, f"the Trainer's {file.name}")
            seal(saved, last_number(target.parent) + 1)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        replace_folder(saved, target)
        shutil.rmtree(scratch, ignore_errors=True)


def check_can_save(args: TrainingArguments, model: nn.Module, *, projects: bool) -> None:
    """Refuse to begin a run whose checkpoints couldn't be loaded.

    Args:
        args: The Trainer's arguments.
        model: The model that trains, prepared.
        projects: Whether gradients are projected.

    Raises:
        ConfigError: If the model is sharded and gradients are projected: the Trainer loads the optimizer's state of a
            parameter in the parameter's own shape, which that of a projection hasn't.
    """
    if not projects or args.save_strategy == SaveStrategy.NO or args.save_only_model:
        return
    if find_engine(model, ()).is_sharded:
        raise ConfigError(
            "The Trainer's checkpoints of a sharded model can't hold the optimizer state of a projection, so that a "
            "run couldn't be resumed: set save_strategy='no' or save_only_model=True, train without the projection or "
            "under DistributedDataParallel, or save with save_distributed in a loop of your own."
        )


def protect_checkpoints(trainer: Trainer, *, verify: bool, allow_changes: bool) -> None:
    """Make a Trainer's checkpoints appear only when they are finished; a second call does nothing.

    Args:
        trainer: The Trainer.
        verify: Whether resuming compares the checksums of all files, and not their sizes alone.
        allow_changes: Whether ``trainer_state.json`` may have been edited.
    """
    protected = getattr(trainer._save_checkpoint, "__self__", None)
    if not isinstance(protected, ProtectedCheckpoints):
        protected = ProtectedCheckpoints(trainer)
    protected.verify, protected.allow_changes = verify, allow_changes
