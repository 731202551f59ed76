from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")


def run(name: str, *arguments: str, seconds: int) -> list[float]:
    """Losses that an example prints."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=seconds
    )
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"step \d+: loss (\d+\.\d+), layers [\d( ]", done.stdout)]


@pytest.mark.parametrize("name", NAMES)
def test_example_runs(name: str, tiny_model: Path, sums: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(tiny_model), "--data", str(sums), "--steps", "6", "--output", str(tmp_path))
    assert len(run(name, *arguments, seconds=120)) == 6


@pytest.mark.slow
def test_a_sampler_of_one_s_own_trains_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    losses = run("custom_sampler.py", "--steps", "4", "--output", str(tmp_path), seconds=600)
    assert len(losses) == 4
