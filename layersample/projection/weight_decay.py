"""How an optimizer uses the weight itself: for weight decay, and for the size of its steps."""

from __future__ import annotations

from typing import Any

from torch import optim

from layersample.errors import ConfigError

_COUPLED = (optim.SGD, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Adamax, optim.ASGD)
_DECOUPLED = ("AdamW", "Adafactor", "Lion", "Muon")  # by the beginning of the class's name


def decays_decoupled(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay shrinks the weight itself (AdamW), and isn't a part of the gradient (L2).

    Args:
        optimizer: A torch optimizer, or one of a class derived from it.
        group: One of its groups; its key ``decoupled_weight_decay`` decides where it is there.

    Raises:
        ConfigError: If the group has weight decay and the optimizer isn't known.
    """
    if not group.get("weight_decay"):
        return False
    if group.get("decoupled_weight_decay") is not None:
        return bool(group["decoupled_weight_decay"])
    if isinstance(optimizer, _COUPLED):
        return False
    name = type(optimizer).__name__
    if name.removeprefix("Paged").startswith(_DECOUPLED):
        return True
    raise ConfigError(
        f"A projection must know how {name} applies its weight_decay={group['weight_decay']}: set "
        f"group['decoupled_weight_decay'] of each of its param_groups to True (as AdamW) or False (as SGD), or "
        "weight_decay to 0."
    )


def scales_by_weight(optimizer: optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the size of a step follows the size of the weight (Adafactor's relative steps)."""
    return bool(group.get("scale_parameter", isinstance(optimizer, optim.Adafactor)))
