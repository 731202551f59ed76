"""The notebooks run from the first cell to the last, and each cell may be run twice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.documents import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
METHODS = {name: {"sampler": name} for name in ("full", "lisa")}
SMALL = {"METHODS": METHODS, "STEPS": 4, "PERIOD": 2, "SEEDS": [0, 1], "EVAL_SIZE": 4, "MAX_LENGTH": 64}


def run(path: Path, folder: Path, settings: dict[str, Any], *, times: int) -> list[Any]:
    """Run a notebook with other settings, each cell so often, and return its code cells."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    given = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(given) == 1, "one cell holds the settings"
    for name, value in settings.items():
        if f"{name} = " in given[0].source:
            given[0].source += f"\n{name} = {value!r}"
    copies = [dict(cell) for cell in cells for _ in range(times)]
    notebook.cells = [nbformat.from_dict(cell) for cell in copies]  # type: ignore[no-untyped-call]
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return list(notebook.cells)


@pytest.fixture
def _kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel imports what this process does."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")


@pytest.mark.usefixtures("_kernel")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_cell_runs_twice(path: Path, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    cells = run(
        path, tmp_path, {"MODEL": str(tiny_model), "DATA": str(sums), "LEARNING_RATE": 1e-2, **SMALL}, times=2
    )
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2
    assert [o for o in outputs if o.output_type == "error"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("_kernel")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_first_one_lowers_the_loss_of_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    cells = run(NOTEBOOKS[-1], tmp_path, {"STEPS": 6, "PERIOD": 3}, times=1)
    assert any("trained one" in o.get("text", "") for cell in cells for o in cell.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_kept_without_outputs(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:  # type: ignore[no-untyped-call]
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)
