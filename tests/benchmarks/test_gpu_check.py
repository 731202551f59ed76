from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from layersample import ConfigError
from layersample_benchmarks import gpu_check
from layersample_benchmarks.gpu import flat_memory, memory
from layersample_benchmarks.gpu.bench import Bench

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
BENCH = Bench(torch.device("cpu"), tiny=True)


@pytest.mark.parametrize("name", gpu_check.MEASUREMENTS)
def test_every_line_runs_on_a_cpu_and_gives_no_figure_of_a_gpu(name: str) -> None:
    rows = gpu_check.measure(BENCH, [name])
    verdicts = Counter(row.verdict for row in rows)
    assert rows and not verdicts["MISS"], [row for row in rows if row.verdict == "MISS"]
    for row in rows:
        assert bool(row.found) == (row.verdict in ("met", "measured")), row
    if name == "memory":
        assert len(rows) >= 10 and not verdicts["met"]  # an allocator of a GPU alone can meet a plan
        assert all(row.figures["measured_bytes"] > 0 for row in rows if row.verdict == "measured")
    if name in ("masters", "flat_memory"):
        assert verdicts["no meaning"] and verdicts["met"]
    if name == "resume":
        assert rows[0].figures["whole"] == rows[0].figures["resumed"] != ""


def test_a_miss_is_printed_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flat_memory, "BOUND", -0.5)
    found = CliRunner().invoke(
        _app(), ["--output", str(tmp_path), "--scale", "tiny", "--device", "cpu", "--only", "flat_memory"]
    )
    assert found.exit_code == 0, found.output
    assert "MISS" in found.output
    table = (tmp_path / "gpu_check_on_cpu.md").read_text(encoding="utf-8")
    assert (
        "| MISS |" in table and "which says nothing of a GPU" in table and "lines miss their bound" in table
    )
    assert not (tmp_path / "gpu_check.md").exists()


def test_what_can_not_run_is_refused(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(_app(), ["--output", str(tmp_path)])
        assert refused.exit_code == 2 and "There is no CUDA device" in refused.output
    assert CliRunner().invoke(_app(), ["--device", "cpu"]).exit_code == 2
    with pytest.raises(ConfigError, match="among memory, .* but got speed"):
        gpu_check.measure(BENCH, ["speed"])


def test_adapters_without_peft_are_said_to_lack_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    monkeypatch.setattr(memory, "SETTINGS", [s for s in memory.SETTINGS if s.lora_rank is not None])
    rows = list(memory.measure(BENCH))
    assert [row.verdict for row in rows] == ["not available"] and rows[0].figures == {"needs": "peft"}


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(gpu_check.main)
    return app
