from __future__ import annotations

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.parallel.ranks import environment, free_port

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "common.py")

NEEDS = {"lightning"}  # an example's file begins with what it needs beyond the extra for training


def losses(said: str) -> list[float]:
    """Losses that an example prints."""
    return [float(loss) for loss in re.findall(r"step \d+: loss (-?\d+\.\d+), layers [\d( ]", said)]


@pytest.mark.filterwarnings("ignore")  # an example is no test, and libraries give advice
@pytest.mark.parametrize("name", NAMES)
def test_example_runs(
    name: str,
    tiny_model: Path,
    sums: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, where what a script imports is there."""
    needed = name.partition("_")[0]
    if needed in NEEDS and find_spec(needed) is None:
        pytest.skip(f"needs {needed}")
    arguments = ["--model", str(tiny_model), "--data", str(sums), "--steps", "6", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    sys.modules.pop("common", None)
    assert len(losses(capsys.readouterr().out)) == 6


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = (
    *("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


def on_two_ranks(launcher: tuple[str, ...], name: str, *arguments: str) -> list[str]:
    """The steps that an example prints when it is launched on two ranks."""
    if launcher is ACCELERATE:
        launcher = (*launcher, "--main_process_port", str(free_port()))
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(EXAMPLES / "torchrun" / name), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    if name == "distributed_sft.py":
        assert "2 ranks" in done.stdout
    return re.findall(r"step \d+: loss \d+\.\d+, layers [(\d][\d, ]*", done.stdout)


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_sft_example_on_two_ranks(
    launcher: tuple[str, ...], tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    arguments = ("--model", str(tiny_model), "--data", str(sums), "--steps", "4", "--output", str(tmp_path))
    assert len(on_two_ranks(launcher, "distributed_sft.py", *arguments)) == 4


def test_loop_example_on_two_ranks_goes_on_with_another_engine(
    tiny_model: Path, sums: Path, tmp_path: Path
) -> None:
    def loop(engine: str, steps: int) -> list[str]:
        data = ("--model", str(tiny_model), "--data", str(sums), "--checkpoint", str(tmp_path / "saved"))
        more = ("--engine", engine, "--steps", str(steps), "--accumulate", "2")
        return on_two_ranks(TORCHRUN, "distributed_loop.py", *data, *more)

    steps = loop("ddp", 3) + loop("fsdp", 5)
    assert [step.partition(":")[0] for step in steps] == [f"step {i}" for i in range(1, 6)]
    layers = [step.partition("layers")[2] for step in steps]
    assert layers[2] == layers[3]  # a period of two steps, cut by the checkpoint


def test_accelerate_s_file_is_fsdp2() -> None:
    config = load_config_from_file(str(EXAMPLES / "torchrun" / "fsdp2.yaml"))
    assert config.distributed_type == "FSDP" and config.fsdp_config["fsdp_version"] == 2


@pytest.mark.slow
def test_a_sampler_of_one_s_own_trains_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "custom_sampler.py"), "--steps", "4", "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(done.stdout)) == 4
