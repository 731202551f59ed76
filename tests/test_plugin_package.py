"""The way of a third party: a distribution of its own, installed by pip, whose sampler is found by its entry point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

PACKAGE = Path(__file__).parent.parent / "examples" / "plugin_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which pip has installed the package, into a folder of its own and without the network."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs the setuptools of the test extra")
    source = tmp_path_factory.mktemp("source") / "package"  # building leaves files beside the code
    shutil.copytree(PACKAGE, source)
    target = tmp_path_factory.mktemp("target")
    # Its requirement, layersample, is what these tests run in; what builds it, setuptools, is in the test extra.
    flags = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", str(target), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(target.glob("layersample_eager-*.dist-info/entry_points.txt"))
    return {**os.environ, "PYTHONPATH": str(target)}


def run(installed: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_sampler_is_listed(installed: dict[str, str]) -> None:
    assert "Draw layers in proportion to how much" in run(installed, "-m", "layersample", "list", "eager")
    without = {**installed, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-m", "layersample", "list", "eager"], env=without, capture_output=True, text=True
    )
    assert done.returncode == 2, "it was there without being installed"


def test_it_passes_the_contract(installed: dict[str, str], tmp_path: Path) -> None:
    test = shutil.copy(PACKAGE / "test_layersample_eager.py", tmp_path)
    said = run(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(test))
    assert "passed" in said and "failed" not in said


def test_it_is_a_row_of_a_benchmark(
    installed: dict[str, str], tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    suite = {
        **{"model": str(tiny_model), "task": str(sums), "other_text": str(sums), "methods": ["eager"]},
        **{"seeds": [0], "steps": 2, "search_steps": 2, "learning_rates": [1e-2]},
        **{"validation_size": 4, "test_size": 4, "other_size": 4, "answers": 0, "evaluations": 1},
        **{"trace_every": 2, "max_length": 16, "options": {"period": 1}, "threads": 1},
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite))
    output = tmp_path / "results"
    run(installed, "-m", "layersample", "benchmark", "--suite", str(path), "--output", str(output))
    lines = [json.loads(line) for file in output.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert any("eager" in json.dumps(line) for line in lines), sorted(output.rglob("*"))
    assert any("eager" in file.read_text() for file in output.rglob("*.md"))
