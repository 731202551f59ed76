"""The way of a third party: a distribution of its own whose sampler is found by its entry point."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "examples" / "plugin_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the package is installed, its metadata made by setuptools from pyproject.toml.

    pip would do no more than this, but it wants to fetch the build's requirements from the network.
    """
    source = tmp_path_factory.mktemp("source") / "package"  # building leaves files beside the code
    shutil.copytree(PACKAGE, source)
    target = tmp_path_factory.mktemp("target")
    build = "from setuptools import setup; setup()"
    commands = ("egg_info", "--egg-base", str(target), "build_py", "--build-lib", str(target))
    done = subprocess.run(
        [sys.executable, "-c", build, "-q", *commands], cwd=source, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
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
