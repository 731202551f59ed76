"""What must happen while a Trainer's model is whole: samplers that measure do so before FSDP2 cuts it into shards."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from layersample.choices import Rule
from layersample.errors import ConfigError
from layersample.layers.find import find_layers
from layersample.layers.groups import GROUPS, GroupName
from layersample.layers.rules import arrange
from layersample.layers.unchanged import unchanged
from layersample.parallel.agreement import tell_all
from layersample.parallel.measured import remember
from layersample.registry import SAMPLERS
from layersample.sampling.draw_size import find_draw_size
from layersample.sampling.faults import naming
from layersample.sampling.sampler import Measurement
from layersample.scheduling.options import SchedulerOptions


def measure_before_sharding(
    trainer: Trainer, options: SchedulerOptions, batches_of: Callable[[Trainer, Any, int], Callable[[], Any]]
) -> None:
    """Have the sampler measure the whole model, if the Trainer is about to cut it into shards.

    All ranks measure, as a Trainer's own loss may have them talk; what the first one found counts.

    Args:
        trainer: The Trainer, which hasn't prepared its model yet.
        options: The scheduler's options.
        batches_of: Makes a reader of the first training examples, from the Trainer, its loader and a batch's size.

    Raises:
        ConfigError: If a rank has no weights yet, because it would get them from the first one in shards.
    """
    model: Any = trainer.model
    if not trainer.is_fsdp_enabled or any(hasattr(p, "device_mesh") for p in model.parameters()):
        return
    sampler, name = SAMPLERS.resolve(options.sampler, options.sampler_options)  # type: ignore[arg-type]
    if not sampler.measures or sampler.measure_every is not None:
        return  # the second is refused when training begins
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise ConfigError(
            f"Sampler {name} must measure the whole model on each rank, but they are to get its weights in shards: "
            "set fsdp_cpu_ram_efficient_loading: false in accelerate's configuration, or choose a sampler that "
            "measures nothing."
        )
    model_layers = find_layers(model, options.layers)  # type: ignore[arg-type]
    rules: dict[GroupName, Rule] = {group: getattr(options, group) for group in GROUPS}
    whole = arrange(
        model,
        model_layers,
        rules,
        granularity=options.granularity,
        train_towers=sampler.trains_everything,
    )
    size = find_draw_size(
        model, whole, sampler, num_active=options.num_active, draw_budget=options.draw_budget
    )
    layers = tuple(unit.name for unit in size.units.sampled)
    measurement = Measurement(
        model=model,
        model_layers=size.units.parts_of(model_layers),
        layers=layers,
        num_active=size.num_active,
        changed=layers,
        batches=batches_of(trainer, trainer.get_train_dataloader(), trainer.args.per_device_train_batch_size),
        round=0,
        seed=trainer.args.seed if options.seed is None else options.seed,
    )
    with naming(sampler, name, 0), unchanged(model, only_after_errors=True):
        sampler.measure(measurement)
    remember(model, sampler, tell_all(sampler.state_dict())[0])
