"""A launcher for LLaMA-Factory: its own ``run_exp`` with our callback, which attaches to the trainer that it makes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from layersample.errors import ConfigError
from layersample.integrations.front_door import cannot_import, is_on, make_callback, need, refuse_beside
from layersample.integrations.transformers import LayerSamplingCallback

OPTIONS = "layersample"
_MINIMUM = "0.9.0"
_THEIRS = ("use_badam", "use_galore", "use_apollo", "use_llama_pro")
_OTHER_TRAINERS = ("use_mca", "use_megatron_bridge", "use_hyper_parallel", "use_kt", "use_ray")
_OTHER_LAUNCHERS = ("USE_MCA", "USE_MEGATRON_BRIDGE", "USE_RAY", "USE_KT")


def train(config: Mapping[str, Any]) -> None:
    """Train as ``llamafactory-cli train`` does, a few layers at a time.

    Args:
        config: What LLaMA-Factory's file holds, and under ``layersample`` the options of
            :class:`~layersample.LayerSamplingCallback`.

    Raises:
        ConfigError: If LLaMA-Factory isn't installed or too old, or options don't go with layer sampling.
    """
    need("llamafactory", "llamafactory", _MINIMUM)
    theirs = {key: value for key, value in config.items() if key != OPTIONS}
    callback = make_callback(config.get(OPTIONS), OPTIONS)
    _check(theirs)
    try:
        from llamafactory.train.tuner import run_exp
    except ImportError as error:
        raise cannot_import(error, "llamafactory", _MINIMUM, "llamafactory.train.tuner.run_exp") from error
    with attaching(callback):
        run_exp(theirs, callbacks=[callback])


@contextmanager
def attaching(callback: LayerSamplingCallback) -> Iterator[None]:
    """Attach a callback to each Trainer that is made with it, in code of others that takes callbacks alone.

    Args:
        callback: The callback, which is given to that code as well.
    """
    init: Any = Trainer.__init__

    def attach(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        if callback in trainer.callback_handler.callbacks:
            callback.attach(trainer)

    Trainer.__init__ = attach  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Trainer.__init__ = init  # type: ignore[method-assign]


def _check(config: Mapping[str, Any]) -> None:
    refuse_beside(config, _THEIRS, "LLaMA-Factory")
    if config.get("finetuning_type") == "freeze":
        raise ConfigError(
            "LLaMA-Factory's finetuning_type freeze trains the same layers from beginning to end: choose full, and "
            f"how many layers train at a time by num_active under {OPTIONS}."
        )
    if config.get("stage") == "ppo":
        raise ConfigError(
            "LLaMA-Factory's stage ppo has a loop of its own, which no callback reaches: leave it."
        )
    others = [name for name in _OTHER_TRAINERS if is_on(config.get(name))]
    others += [name for name in _OTHER_LAUNCHERS if is_on(os.environ.get(name))]
    if others:
        raise ConfigError(
            f"Layers are sampled in Hugging Face's Trainer in this process, but {others[0]} trains elsewhere: leave "
            "it out. Many GPUs: torchrun -m layersample llamafactory train CONFIG.yaml."
        )
