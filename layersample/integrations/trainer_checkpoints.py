"""Checkpoints of a Hugging Face Trainer: saved whole or not at all, and checked before they are loaded."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from layersample.checkpoints.whole import check, remove_unfinished, saving_folder, seal
from layersample.files import replace_folder


def protect_checkpoints(trainer: Trainer) -> None:
    """Make a Trainer save each checkpoint beside its place and rename it, and check one that it resumes from."""
    if isinstance(trainer._save_checkpoint, partial):
        return  # it is protected already
    trainer._save_checkpoint = partial(_save, trainer, trainer._save_checkpoint)  # type: ignore[method-assign]
    trainer._load_from_checkpoint = partial(_load, trainer._load_from_checkpoint)  # type: ignore[method-assign]


def _save(trainer: Trainer, save: Any, model: Any, trial: Any) -> None:
    """Save beside the checkpoint's place, then rename: a killed run leaves a whole checkpoint or none."""
    args, state = trainer.args, trainer.state
    place, name = Path(str(args.output_dir)), f"checkpoint-{state.global_step}"
    if args.push_to_hub or trial is not None:  # the Trainer goes on to use the folder where it has written it
        save(model, trial)
        if args.should_save and (place / name).is_dir():
            seal(place / name)
        return
    scratch = saving_folder(place, state.global_step)
    if args.should_save:
        remove_unfinished(place)
    trainer.accelerator.wait_for_everyone()
    args.output_dir = str(scratch)
    try:
        save(model, trial)
    finally:
        args.output_dir = str(place)
    trainer.accelerator.wait_for_everyone()  # every rank saves its own random state
    best = state.best_model_checkpoint
    if best is not None and Path(best) == scratch / name:
        state.best_model_checkpoint = str(place / name)
    if args.should_save:
        state.save_to_json(str(scratch / name / TRAINER_STATE_NAME))
        seal(scratch / name)
        replace_folder(scratch / name, place / name)
        remove_unfinished(place)
        rotate_checkpoints(
            output_dir=str(place),
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
    trainer.accelerator.wait_for_everyone()


def _load(load: Any, checkpoint: str, model: Any = None) -> None:
    check(Path(checkpoint))
    load(checkpoint, model)
