"""Samplers that are tortured, with options under which a short run has all of their turns."""

from __future__ import annotations

from typing import Any

FIXED: dict[str, dict[str, Any]] = {
    "lisa": {},
    "cyclic": {},
    "full": {},
    "prior": {"weights": "increase"},
}
"""Those whose draws hang on the seed alone."""

ADAPTIVE: dict[str, dict[str, Any]] = {
    "misa": {},
    "grass": {"probe_batches": 0},
    "bandit": {"rate": 1.0},
    "blockllm": {"patience": 2},
    "freeze_converged": {"grace": 1, "threshold": 0.9},
    "max_wait": {"periods": 40, "sampler": "bandit"},
}
"""Those that choose by gradients and losses of the run."""


def least_period(sampler: str) -> int:
    """Optimizer steps that a period must have: a bandit is rewarded for the decrease of the loss in it."""
    return 2 if sampler in ("bandit", "max_wait") else 1
