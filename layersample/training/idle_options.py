"""Options of SFTConfig that a run would ignore beside its others: each was given for something, so it is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import Trainer
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from layersample.errors import ConfigError, short

_SCHEDULES_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")


@dataclass(frozen=True)
class _Need:
    """What some options have no effect without.

    Args:
        what: It, as one would ask for it.
        met: Whether the Trainer's arguments have it.
    """

    what: str
    met: Callable[[SFTConfig], Any]


def _evaluates(made: SFTConfig) -> bool:
    return made.eval_strategy != "no"


def _saves(made: SFTConfig) -> bool:
    return made.save_strategy != "no"


def _sorts_by_length(made: SFTConfig) -> bool:
    sampling = getattr(made, "train_sampling_strategy", None)  # before transformers 5: an option of its own
    return sampling == "group_by_length" or bool(getattr(made, "group_by_length", False))


_BY_STEPS = _Need("eval_strategy=steps", lambda made: made.eval_strategy == "steps")
_EVALUATIONS = _Need("eval_strategy=steps or epoch", _evaluates)
_CHECKPOINTS = _Need("save_steps (--save-steps)", _saves)
_BOTH = _Need(
    "eval_strategy=steps and save_steps (--save-steps)", lambda made: _evaluates(made) and _saves(made)
)
_CHECKPOINTING = _Need(
    "gradient_checkpointing (--gradient-checkpointing)", lambda made: made.gradient_checkpointing
)
_REPORTS = _Need("report_to", lambda made: made.report_to)
_NEEDS: dict[str, _Need] = {
    "eval_steps": _BY_STEPS,
    "eval_delay": _EVALUATIONS,
    "metric_for_best_model": _BOTH,
    "greater_is_better": _BOTH,
    "save_total_limit": _CHECKPOINTS,
    "save_on_each_node": _CHECKPOINTS,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "liger_kernel_config": _Need("use_liger_kernel=true", lambda made: made.use_liger_kernel),
    "packing_strategy": _Need("packing=true", lambda made: made.packing or made.eval_packing),
    "length_column_name": _Need("train_sampling_strategy=group_by_length", _sorts_by_length),
    "lr_scheduler_kwargs": _Need(
        "a schedule that takes options (--schedule)",
        lambda made: made.lr_scheduler_type not in _SCHEDULES_WITHOUT_OPTIONS,
    ),
    "run_name": _REPORTS,
    "project": _REPORTS,
}

# What orders data that are loaded at once.
_OF_LOADED_DATA = ("data_seed", "train_sampling_strategy", "group_by_length", "length_column_name")

# Other values that show whether an optimizer reads an option: one of them changes what it gets, or is an error.
_OTHERS: dict[str, tuple[Any, ...]] = {
    "adam_beta1": (0.123, 0.456),
    "adam_beta2": (0.123, 0.456),
    "adam_epsilon": (0.123, 0.456),
    "optim_target_modules": (None,),
}


def refuse_idle(given: Mapping[str, Any], made: SFTConfig, *, steps: int | None, stream: bool) -> None:
    """Refuse what would have no effect in a run, before any work.

    Args:
        given: The user's options of SFTConfig.
        made: All arguments of the Trainer.
        steps: Steps of the run; ``None`` where epochs are counted.
        stream: Whether data are read while the run trains.

    Raises:
        ConfigError: If one would be ignored; it says what it needs.
    """
    defaults = _defaults()
    asked = {name: value for name, value in given.items() if value != defaults.get(name)}
    for name, value in asked.items():
        need = _NEEDS.get(name)
        if need is not None and not need.met(made):
            raise ConfigError(
                f"trainer: {name} needs {need.what}, without which it has no effect, but got {name}={short(value)} "
                "alone: give both, or leave it out."
            )
        if stream and name in _OF_LOADED_DATA:
            raise ConfigError(
                f"trainer: {name} orders data that are loaded at once, and stream reads them while the run goes on: "
                "leave out one of them."
            )
        if name in _OTHERS and not _reads(made, name, _OTHERS[name]):
            raise ConfigError(
                f"trainer: {name} must be left out with {_optim(made)}, which doesn't read it, but got "
                f"{short(value)}."
            )
    _check_optimizer_arguments(made)
    _check_evaluations(asked, made, steps, stream)


def _defaults() -> dict[str, Any]:
    missing = dataclasses.MISSING
    return {
        field.name: field.default if field.default_factory is missing else field.default_factory()
        for field in dataclasses.fields(SFTConfig)
    }


def _optim(made: SFTConfig) -> str:
    return f"optim={OptimizerNames(made.optim).value}"


def _check_optimizer_arguments(made: SFTConfig) -> None:
    pairs = (made.optim_args or "").replace(" ", "").split(",")
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        rest = [other for other in pairs if other != pair]
        others = (",".join([*rest, *more]) for more in ([], [f"{key}=true"], [f"{key}=2"], [f"{key}=x"]))
        if equals and not _reads(made, "optim_args", others):
            raise ConfigError(
                f"trainer: optim_args must hold options that {_optim(made)} reads from there, but got "
                f"{short(pair)}, which it doesn't."
            )


def _reads(made: SFTConfig, name: str, others: Iterable[Any]) -> bool:
    """Whether what the Trainer gives its optimizer depends on an option."""
    as_given = _optimizer(made)
    for other in others:
        changed = copy.copy(made)
        setattr(changed, name, other)
        if (found := _optimizer(changed)) is None or found != as_given:
            return True
    return False


def _optimizer(made: SFTConfig) -> Any:
    """The optimizer's class and arguments; ``None`` where it needs the model, or doesn't take an option so."""
    try:
        return Trainer.get_optimizer_cls_and_kwargs(made)
    except Exception:  # transformers raises what it likes for an option that it reads
        return None


def _check_evaluations(asked: Mapping[str, Any], made: SFTConfig, steps: int | None, stream: bool) -> None:
    if stream and made.eval_strategy == "epoch":
        raise ConfigError(
            "trainer: eval_strategy must be steps with stream, because data that are read while the run trains "
            "have no end of an epoch, but got epoch."
        )
    for name in ("eval_steps", "eval_delay"):
        if steps is not None and name in asked and asked[name] > steps:
            raise ConfigError(
                f"trainer: {name} must be at most the {steps} steps of the run, which evaluates nothing before its "
                f"end otherwise, but got {short(asked[name])}."
            )


def check_best(given: Mapping[str, Any], save_steps: int | None) -> None:
    """Make sure that the best model can be told, and is saved, where a run is to end with it.

    Args:
        given: The user's options of SFTConfig.
        save_steps: Steps between checkpoints, if there are any.

    Raises:
        ConfigError: If it isn't so.
    """
    if given.get("load_best_model_at_end"):
        every = given.get("eval_steps")
        if given.get("eval_strategy") != "steps" or save_steps is None or every != save_steps:
            raise ConfigError(
                "trainer: load_best_model_at_end needs a checkpoint of each model that is evaluated: "
                "eval_strategy=steps, and eval_steps and save_steps (--save-steps) of the same number, but got "
                f"eval_strategy={short(given.get('eval_strategy'))}, eval_steps={short(every)} and save_steps "
                f"{short(save_steps)}."
            )
    metric = given.get("metric_for_best_model")
    if metric not in (None, "loss", "eval_loss"):
        raise ConfigError(
            f"trainer: metric_for_best_model must be loss, because a run measures nothing else, but got "
            f"{short(metric)}."
        )
    if given.get("greater_is_better"):
        raise ConfigError(
            "trainer: greater_is_better must be off, because the best loss is the lowest, but it is on."
        )
