"""The options of a short run, which several files vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def short_run(tiny_model: Path, sums: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(tiny_model),
        "data": str(sums),
        "output": str(tmp_path / "run"),
        "steps": 6,
        "period": 2,
        "eval_size": 4,
        "learning_rate": 1e-2,
        "max_length": 16,
    }
