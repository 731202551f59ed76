from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("LAYERSAMPLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "metrics"
