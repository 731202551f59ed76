"""What a user gives for TRL's SFTConfig: checked by its types, and never beside an option of ours."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, get_type_hints

import torch
from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from trl import SFTConfig

from layersample.errors import ConfigError, short, unknown
from layersample.model_files import reason
from layersample.option_files import check_plain

# One thing, two names: the option of layersample, and what the Trainer calls it. Given both, one of them would be
# dropped without a word; given the Trainer's alone, the run's own configuration would say something else.
SAME_THING: dict[str, str] = {
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "auto_find_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "gradient_checkpointing": "gradient_checkpointing",
    "activation_checkpointing": "gradient_checkpointing",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "weight_decay": "weight_decay",
    "max_grad_norm": "clip",
    "max_length": "max_length",
    "bf16": "precision",
    "fp16": "precision",
    "bf16_full_eval": "precision",
    "fp16_full_eval": "precision",
    "seed": "seed",
    "save_steps": "save_steps",
    "save_strategy": "save_steps",
    "resume_from_checkpoint": "resume",
    "output_dir": "output",
    "assistant_only_loss": "train_on",
    "completion_only_loss": "train_on",
    "dataset_text_field": "columns",
    "push_to_hub": "push_to_hub",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "private",
}

_ONE_LOSS = "an evaluation measures the loss of the labels alone"
_UPLOAD = "the model is uploaded once, at the end of the run: --push-to-hub"
_SCRIPTS = "layersample train trains and evaluates in any case"

# What a run of `layersample train` is built on.
_NOT_OURS_TO_CHANGE = {
    "eval_on_start": "the held-out loss is measured before the first step of every run",
    "dataset_kwargs": "the data is prepared by layersample train",
    "model_init_kwargs": "the model is loaded by layersample train: choose its --precision",
    "deepspeed": "layers can't be switched under DeepSpeed: --shard fsdp2 shards as ZeRO-3 does",
    "fsdp": "shards are asked for by --shard fsdp2, or by the configuration file of accelerate launch",
    "fsdp_config": "shards are asked for by --shard fsdp2, or by the configuration file of accelerate launch",
    "trust_remote_code": "layersample train runs no code that comes with a model",
    "use_cache": "training keeps no cache, and the saved model's configuration stays as it came",
    "enable_jit_checkpoint": "a run saves a checkpoint at SIGTERM by itself",
    "hub_strategy": _UPLOAD,
    "hub_always_push": _UPLOAD,
    "hub_revision": _UPLOAD,
    "do_train": _SCRIPTS,
    "do_eval": _SCRIPTS,
    "do_predict": _SCRIPTS,
    "dataloader_drop_last": "it would drop held-out examples as well, and all of them where a batch holds more",
    "label_names": _ONE_LOSS,
    "include_for_metrics": _ONE_LOSS,
    "batch_eval_metrics": _ONE_LOSS,
    "prediction_loss_only": _ONE_LOSS,
    "eval_do_concat_batches": _ONE_LOSS,
    "eval_use_gather_object": _ONE_LOSS,
    "parallelism_config": "layers can't be switched under it: choose --shard fsdp2",
}

_AT_LEAST_1 = {
    "per_device_eval_batch_size",
    "dataset_num_proc",
    "dataloader_prefetch_factor",
    "eval_accumulation_steps",
    "eval_steps",
    "pad_to_multiple_of",
    "save_total_limit",
}
_AT_MOST_1 = {"label_smoothing_factor"}
_MAY_BE_NEGATIVE = {"local_rank", "past_index"}


def check_trainer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of ``trainer`` before any work.

    Args:
        given: Names of SFTConfig's fields, and values as a file or the command line gave them.

    Returns:
        The values, converted to the types that SFTConfig declares.

    Raises:
        ConfigError: If a name is unknown, belongs to an option of ours, or a value is of another type or out of
            bounds; it names the option, and the value that came.
    """
    fields = {field.name: field for field in dataclasses.fields(SFTConfig)}
    checked = {}
    for name, value in given.items():
        if name not in fields:
            raise ConfigError(f"trainer: {unknown('option of SFTConfig', name, fields)}")
        if ours := SAME_THING.get(name):
            raise ConfigError(
                f"trainer: {name} must be left out, but got {short(value)}: layersample's own option for it is "
                f"{ours} (--{ours.replace('_', '-')})."
            )
        if name == "hub_token":  # never shown, and never written into the run's folder
            raise ConfigError(
                "trainer: hub_token must be left out, because a run writes its options into its folder: log in with "
                "hf auth login, or set HF_TOKEN."
            )
        if why := _NOT_OURS_TO_CHANGE.get(name):
            raise ConfigError(f"trainer: {name} must be left out, but got {short(value)}: {why}.")
        checked[name] = _check_value(name, value)
        if choices := fields[name].metadata.get("choices"):
            if checked[name] not in choices:
                raise ConfigError(
                    f"trainer: {name} must be {' or '.join(map(repr, choices))}, but got {short(value)}."
                )
    return checked


def _check_value(name: str, value: Any) -> Any:
    hint = _hints()[name]
    try:
        check_plain(value, hint)
        read = _adapter(name).validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"trainer: {name}: {fault}, but got {short(value)}.") from error
    except ValueError as error:  # of check_plain
        raise ConfigError(f"trainer: {name}: {error}, but got {short(value)}.") from error
    if isinstance(read, int | float) and not isinstance(read, bool) and name not in _MAY_BE_NEGATIVE:
        least = 1 if name in _AT_LEAST_1 and isinstance(read, int) else 0
        if not least <= read < 2**63:
            raise ConfigError(
                f"trainer: {name} must be at least {least} and fit in 64 bits, but got {short(value)}."
            )
        if name in _AT_MOST_1 and read > 1:
            raise ConfigError(f"trainer: {name} must be between 0 and 1, but got {short(value)}.")
    return value if read == value and type(value) is not str else read


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(SFTConfig)


@cache
def _adapter(name: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(_hints()[name], config=ConfigDict(allow_inf_nan=False))
    except PydanticSchemaGenerationError:  # a class of the libraries' own
        return TypeAdapter(Any)


def make_arguments(arguments: Mapping[str, Any]) -> SFTConfig:
    """Make the Trainer's arguments, and what it would only make once the model is loaded.

    Raises:
        ConfigError: If the options don't go together, or ask for a package that isn't installed.
    """
    # SFTConfig and what it calls raise what they like; nothing but the user's options goes in.
    try:
        made = SFTConfig(**arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for callback in get_reporting_integration_callbacks(made.report_to):
                callback()
        _try_optimizer_and_schedule(made)
        _try_loader(made)
        if made.torch_compile and made.torch_compile_backend not in torch._dynamo.list_backends(None):
            raise ValueError(f"torch_compile_backend {made.torch_compile_backend!r} is none of torch's.")
    except Exception as error:
        raise ConfigError(f"The training options don't go together: {reason(error)}") from error
    return made


def _try_optimizer_and_schedule(made: SFTConfig) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    if not made.optim_target_modules:  # those look into the model itself
        cls, options = Trainer.get_optimizer_cls_and_kwargs(made)
        if made.optim in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"):
            cls([parameter], **options)  # bounds of betas and the like are the optimizer's to know
    get_scheduler(
        made.lr_scheduler_type,
        optimizer=torch.optim.SGD([parameter]),
        num_warmup_steps=0,
        num_training_steps=10,
        scheduler_specific_kwargs=dict(made.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
    )


def _try_loader(made: SFTConfig) -> None:
    """Make a loader as the Trainer will; its workers start only when it is read."""
    DataLoader(
        [0],  # type: ignore[arg-type]
        num_workers=made.dataloader_num_workers,
        prefetch_factor=made.dataloader_prefetch_factor,
        persistent_workers=made.dataloader_persistent_workers,
    )


@contextmanager
def naming_options(given: Mapping[str, Any]) -> Iterator[None]:
    """Name the user's options of SFTConfig where a Trainer can't be made with them: some need its model or tokenizer.

    Args:
        given: They. Where there are none, an error is a fault of our own and stays what it is.

    Raises:
        ConfigError: In place of what the Trainer's constructor raises.
    """
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of the Trainer's own code, which raises what it likes
        if not given:
            raise
        options = ", ".join(f"{name}={short(value)}" for name, value in given.items())
        raise ConfigError(
            f"trainer: the Trainer must be able to train this model on this data with {options}, but: {reason(error)} "
            "Leave out what it can't do."
        ) from error


def own_loss(arguments: TrainingArguments) -> str | None:
    """The option by which the Trainer computes another loss than the model's; ``None`` where it doesn't."""
    assert isinstance(arguments, SFTConfig)
    if arguments.loss_type != "nll":
        return f"loss_type={arguments.loss_type}"
    if arguments.label_smoothing_factor:
        return f"label_smoothing_factor={arguments.label_smoothing_factor:g}"
    if arguments.use_liger_kernel:
        return "use_liger_kernel"
    return None
