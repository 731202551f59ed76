"""Says which of the user's hooks on an optimizer's step come where they have no effect."""

from __future__ import annotations

import logging

from torch.optim import Optimizer

from layersample.hooks import is_users, name_of

logger = logging.getLogger(__name__)

_PRE = (
    "%s, a pre-hook on the optimizer's step, comes after gradients are taken for fp32 masters or low-rank parameters, "
    "so that what it does to gradients is lost: register it before the scheduler is made, or do its work in the loop, "
    "in front of optimizer.step()."
)
_POST = (
    "%s, a post-hook on the optimizer's step, comes before weights are back from fp32 masters or low-rank parameters, "
    "so that what it does to weights is lost: register it after the scheduler is made, or do its work in the loop, "
    "behind optimizer.step()."
)


def warn_of_hooks(optimizer: Optimizer, pre: int, post: int) -> bool:
    """Warn of hooks of others that run between a view's own, by name.

    Args:
        optimizer: The optimizer, without a wrapper.
        pre: Key of the view's pre-hook.
        post: Key of the view's post-hook.

    Returns:
        Whether there were any.
    """
    before, after = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    late = [*before.values()][[*before].index(pre) + 1 :]
    early = [*after.values()][: [*after].index(post)]
    found = [(_PRE, hook) for hook in late if is_users(hook)] + [
        (_POST, hook) for hook in early if is_users(hook)
    ]
    for message, hook in found:
        logger.warning(message, name_of(hook))
    return bool(found)
