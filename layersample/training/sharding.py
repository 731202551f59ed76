"""A model in shards, by accelerate's plug-in for FSDP2: as an option asks, or accelerate's launcher and its file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments

from layersample.config import TrainConfig, make_config
from layersample.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

_PRECISIONS = {"bf16": "bf16-mixed", "fp16": "fp16-mixed"}  # what accelerate calls them, and what we do
# accelerate's launcher alone says this; other variables of its are set by the Trainer too.
_LAUNCHED = "ACCELERATE_DYNAMO_USE_DYNAMIC"
_WHOLE = "FULL_STATE_DICT"

_OTHER_WAYS = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def follow_launcher(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> TrainConfig:
    """Take over what ``accelerate launch`` and its configuration file ask for.

    Args:
        config: The options of the run; what the user left out is taken from the launcher.
        environment: How the launcher says it.

    Raises:
        ConfigError: If the launcher and an option that was given say different things, or the launcher asks for what
            doesn't go with layer sampling.
    """
    if _LAUNCHED not in environment:
        return config
    for variable, what in _OTHER_WAYS.items():
        if _is_on(environment, variable):
            raise ConfigError(
                f"accelerate's configuration asks for {what}, under which layers can't be switched: choose "
                "distributed_type MULTI_GPU, or FSDP with fsdp_version: 2."
            )
    asked: dict[str, Any] = {}
    if precision := _PRECISIONS.get(environment.get("ACCELERATE_MIXED_PRECISION", "no")):
        asked["precision"] = precision
    if _is_on(environment, "ACCELERATE_USE_FSDP"):
        if (version := environment.get("FSDP_VERSION", "1")) != "2":
            raise ConfigError(
                f"accelerate's configuration must ask for FSDP2 (fsdp_version: 2), but asks for version {version}."
            )
        asked |= {"shard": "fsdp2", "sharded_checkpoints": environment.get("FSDP_STATE_DICT_TYPE") != _WHOLE}
    for name, value in asked.items():
        if name in config.model_fields_set and getattr(config, name) != value:
            raise ConfigError(
                f"accelerate's configuration asks for {name} {value}, but the run's own option is {name} "
                f"{getattr(config, name)}: leave one of them out."
            )
    if not asked:
        return config
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return make_config(("the options of the run", given), ("accelerate's configuration", asked))


@contextmanager
def as_launched(config: TrainConfig, *, measures: bool = False) -> Iterator[None]:
    """While a run with ``shard`` is made, tell accelerate and transformers what its launcher would have told them.

    Args:
        config: The options; what accelerate's own launcher has said stands.
        measures: Whether the sampler measures the whole model first, for which each rank needs its weights.
    """
    from accelerate.utils import patch_environment

    if config.shard is None or _is_on(os.environ, "ACCELERATE_USE_FSDP"):
        yield
        return
    said = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT" if config.sharded_checkpoints else _WHOLE,
        # One rank reads the weights and the others get them from it: less to read, and never different weights.
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false" if measures else "true",
    }
    with patch_environment(**said):
        yield


def shard_on_cpu(arguments: TrainingArguments) -> None:
    """Have accelerate use its plug-in for FSDP2 on the CPU too, where it would take DDP without a word.

    Args:
        arguments: The Trainer's, which hasn't made its Accelerator yet.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType, PartialState
    from accelerate.utils import TorchDynamoPlugin

    if arguments.device.type != "cpu" or not _is_on(os.environ, "ACCELERATE_USE_FSDP"):
        return
    plugin = FullyShardedDataParallelPlugin()
    state = AcceleratorState(
        arguments.mixed_precision, cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True
    )
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_fp32(accelerator: Accelerator) -> None:
    """Have FSDP2 add up the ranks' gradients, and give losses, in fp32, also where it computes in 16 bits.

    accelerate would do both in 16 bits: each further rank then costs precision, and a loss has three digits.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and policy is not None:
        plugin.mixed_precision_policy = replace(
            policy, reduce_dtype=torch.float32, output_dtype=torch.float32
        )


def _is_on(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "false").lower() in ("true", "1", "yes")
