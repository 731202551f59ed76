"""weightwatcher itself, run on matrices of our choosing: the reference for our own metrics."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layersample.errors import ConfigError
from layersample.metrics.measures import measure_eigenvalues

# Our names for weightwatcher's columns. It has no Hill estimate: that one is taken of its spectrum.
_COLUMNS = {
    "alpha": "alpha",
    "alpha_hat": "alpha_weighted",
    "log_alpha_norm": "log_alpha_norm",
    "stable_rank": "stable_rank",
}


def measure_with_weightwatcher(
    weights: Sequence[Tensor], metrics: Sequence[str]
) -> list[tuple[dict[str, float], dict[str, str]]]:
    """Measure matrices with weightwatcher's defaults.

    Each matrix goes into a linear module of its own, so that weightwatcher sees what it otherwise misses
    (experts, embeddings of more than 50,000 rows), counts nothing twice, and leaves no attribute
    (``longname``) on the user's modules.

    Args:
        weights: Matrices ``(m, n)``.
        metrics: Names from ``METRICS``.

    Returns:
        For each matrix the values, and why there is none where weightwatcher fails, skips it or returns −1.

    Raises:
        ConfigError: If weightwatcher isn't installed.
    """
    finite = [bool(torch.isfinite(weight).all()) for weight in weights]  # its SVD raises on others
    holders = nn.ModuleDict({str(i): _hold(weight) for i, weight in enumerate(weights) if finite[i]})
    spectra: dict[str, Any] = {}
    with _quiet():
        try:
            from weightwatcher import WeightWatcher
        except ImportError as error:
            raise ConfigError(
                "backend='weightwatcher' needs weightwatcher: pip install weightwatcher."
            ) from error
        watcher = WeightWatcher(model=holders)
        longest = max((max(weight.shape) for weight in weights), default=0)
        # Above its defaults only where a matrix would be skipped for its size.
        details = watcher.analyze(max_N=max(50_000, longest), max_evals=max(15_000, longest - 1))
        rows: dict[str, Any] = (
            {} if details is None else {row["longname"]: row for row in details.to_dict("records")}
        )
        if "hill" in metrics:
            # Not its get_ESD: that goes through all modules for each matrix, and skips large ones.
            spectra = {name: _spectrum(watcher, weights[int(name)]) for name in rows}
    return [
        _read(rows.get(str(i)), spectra.get(str(i)), metrics, finite[i], tuple(weight.shape))
        for i, weight in enumerate(weights)
    ]


def _hold(weight: Tensor) -> nn.Module:
    module = nn.Linear(1, 1, bias=False, device="meta")
    module.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return module


def _spectrum(watcher: Any, weight: Tensor) -> Any:
    small, large = sorted(weight.shape)
    eigenvalues, *_ = watcher.combined_eigenvalues(
        [weight.detach().cpu().float().numpy()], large, small, small
    )
    return eigenvalues


def _read(
    row: Any, spectrum: Any, metrics: Sequence[str], finite: bool, shape: tuple[int, ...]
) -> tuple[dict[str, float], dict[str, str]]:
    values: dict[str, float] = {}
    problems: dict[str, str] = {}
    for name in metrics:
        if not finite:
            problems[name] = "weightwatcher needs a finite weight, but some values are NaN or infinite."
        elif row is None:
            problems[name] = f"weightwatcher skips a matrix with fewer than 8 rows or columns, here {shape}."
        elif name == "hill":
            found, failed = measure_eigenvalues(spectrum, (name,))
            values |= found
            problems |= failed
        elif name != "stable_rank" and row["alpha"] <= 0:
            problems[name] = "weightwatcher's power-law fit failed: it returns alpha = −1."
        elif not torch.isfinite(torch.tensor(float(row[_COLUMNS[name]]))):
            problems[name] = f"weightwatcher returns {_COLUMNS[name]} = {row[_COLUMNS[name]]}."
        else:
            values[name] = float(row[_COLUMNS[name]])
    return values, problems


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Undo what importing weightwatcher does to logging and warnings, and keep its prints away."""
    root = logging.getLogger()
    handlers, level, disabled = list(root.handlers), root.level, root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)
            root.handlers[:] = handlers
            root.setLevel(level)
