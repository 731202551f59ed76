"""How many layers a budget of memory, or of parameters, allows to train at a time."""

from __future__ import annotations

from layersample.amounts import read_amount
from layersample.config import TrainConfig
from layersample.errors import ConfigError
from layersample.planning.active_sets import find_active_sets
from layersample.planning.fake_models import quietly
from layersample.planning.simulation import simulate_step
from layersample.planning.target import ModelLike, Target, find_target


def choose_num_active(model: ModelLike, config: TrainConfig, budget: str | float) -> int:
    """The most layers that a budget allows to train at a time.

    Args:
        model: As for :func:`layersample.plan`.
        config: All options of the run; its ``num_active`` doesn't matter.
        budget: Bytes that training may hold beyond the weights in the worst case, as in ``"2GiB"`` or
            ``"500MB"``; or the part of the parameters that may train at a time, above 0 and at most 1.

    Raises:
        ConfigError: If the budget can't be read, or doesn't suffice for one layer.
    """
    limit = parse_budget(budget)
    target, config = find_target(model, config.model_copy(update={"num_active": 1}))
    with quietly():
        return _most_within(limit, target, config, budget)


def _most_within(limit: int | float, target: Target, config: TrainConfig, budget: str | float) -> int:
    shape, kind = target.shape, target.kind

    def cost(count: int) -> float:
        chosen = config.model_copy(update={"num_active": count})
        sets = find_active_sets(shape, chosen, kind=kind)
        if isinstance(limit, float):
            return max(sets.trainable(active) for active in sets.worst) / sets.parameters
        steps = [
            simulate_step(shape, chosen, active, kind=kind, trained=sets.possible) for active in sets.worst
        ]
        return max(step.peak_bytes - step.parts["weights"] for step in steps)

    least = cost(1)
    if least > limit:
        needed = f"{least:.3g} of the parameters" if isinstance(limit, float) else f"{least / 2**30:.2f}GiB"
        raise ConfigError(
            f"The budget must suffice for one layer, which takes {needed}, but got budget={budget!r}: "
            f"raise it, freeze embeddings and head, or use gradient checkpointing."
        )
    low, high = 1, len(find_active_sets(shape, config, kind=kind).possible)
    while low < high:  # more layers never cost less
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle - 1)
    return low


def apply_budget(config: TrainConfig, model: ModelLike | None = None) -> TrainConfig:
    """The options with the ``num_active`` that their budget allows; as they are without one.

    Raises:
        ConfigError: As :func:`choose_num_active`.
    """
    if config.budget is None:
        return config
    chosen = choose_num_active(model or config.model, config, config.budget)
    return config.model_copy(update={"num_active": chosen})


def parse_budget(budget: str | float) -> int | float:
    """Bytes as an integer, or a part of the parameters as a float.

    Raises:
        ConfigError: If it is neither.
    """
    amount = read_amount(budget, "budget")
    return amount if isinstance(amount, int) else float(amount)
