from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from layersample import ConfigError
from layersample_benchmarks import gpu_check
from layersample_benchmarks.gpu import flat_memory, memory, step_times, switches, training
from layersample_benchmarks.gpu.bench import Bench, Row
from layersample_benchmarks.gpu.stored import StoredRows

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
BENCH = Bench(torch.device("cpu"), tiny=True)


def new(folder: Path) -> StoredRows:
    return StoredRows(folder / "rows.json", {"gpu": "none"})


@pytest.mark.parametrize("name", gpu_check.MEASUREMENTS)
def test_every_line_runs_on_a_cpu_and_gives_no_figure_of_a_gpu(name: str, tmp_path: Path) -> None:
    rows = gpu_check.measure(BENCH, new(tmp_path), [name])
    verdicts = Counter(row.verdict for row in rows)
    assert rows and not verdicts["MISS"] and not verdicts["FAILED"], [
        row for row in rows if row.verdict in ("MISS", "FAILED")
    ]
    for row in rows:
        assert bool(row.found) == (row.verdict in ("met", "measured")), row
    if name == "memory":
        assert len(rows) >= 10 and not verdicts["met"]  # an allocator of a GPU alone can meet a plan
        assert all(row.figures["measured_bytes"] > 0 for row in rows if row.verdict == "measured")
        assert {"nf4", "int8"} <= {word for row in rows for word in row.setting.replace(",", " ").split()}
    if name == "step_times":
        flops = {row.setting: row.figures["flops"] for row in rows if row.verdict == "measured"}
        assert flops["2 layers at the top"] < flops["2 layers in the middle"] < flops["full fine-tuning"]
        assert all(row.claimed for row in rows if row.verdict == "measured")
        graphs = {row.setting: row.figures["compiled_graphs"] for row in rows if row.verdict == "measured"}
        assert 0 < graphs.pop("middle, compiled layers") < 8 and not any(graphs.values())
    if name in ("masters", "flat_memory"):
        assert verdicts["no meaning"] and verdicts["met"]
    if name == "resume":
        assert rows[0].figures["whole"] == rows[0].figures["resumed"] != ""


def test_products_are_those_of_plain_attention() -> None:
    """A fused kernel isn't counted, or ends in an error where keys have fewer heads than queries."""
    base = BENCH.model(BENCH.shape("tinyllama-1.1b"), torch.bfloat16)
    tokens = BENCH.tokens(base.config, 2, 64)
    counted = []
    for attention in ("sdpa", "eager"):
        base.set_attn_implementation(attention)
        counted.append(step_times._products(BENCH, base, step_times.WAYS["full fine-tuning"], tokens))
    assert counted[0] == counted[1] > 0


def test_a_miss_is_printed_as_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flat_memory, "BOUND", -0.5)
    found = _invoke(tmp_path, "flat_memory")
    assert found.exit_code == 0, found.output
    assert "MISS" in found.output
    table = (tmp_path / "gpu_check_on_cpu.md").read_text(encoding="utf-8")
    assert (
        "| MISS |" in table and "which says nothing of a GPU" in table and "lines miss their bound" in table
    )
    assert not (tmp_path / "gpu_check.md").exists()


@pytest.mark.parametrize("name", ["memory", "step_times", "switches", "masters", "flat_memory"])
def test_every_line_for_a_gpu_runs_on_a_made_up_one(
    name: str, made_up_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "SETTINGS", memory.SETTINGS[3:4])
    kept = ("full fine-tuning", "middle, frozen weights int8")
    monkeypatch.setattr(step_times, "WAYS", {way: step_times.WAYS[way] for way in kept})
    monkeypatch.setattr(switches, "_WAYS", {"state=offload": switches._WAYS["state=offload"]})
    rows = gpu_check.measure(BENCH, new(tmp_path), [name])
    assert rows and all(row.found for row in rows)
    assert {row.verdict for row in rows} <= {"met", "MISS", "measured"}, rows
    found = " ".join(row.found for row in rows)
    expected = {
        "memory": "3.00 GiB, .*%; 4.00 GiB reserved",
        "step_times": r"% of .* TFLOP/s",
        "switches": "adds .* ms to the step behind it: .*% overlaps",
        "masters": "True True",
        "flat_memory": "3072.0 MiB at most, .0.0% in the second half",
    }
    assert re.search(expected[name], found), found
    if name == "memory":
        assert rows[0].verdict == "MISS"  # a made-up card holds what it holds


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the script asks of torch.cuda, on a CPU."""
    monkeypatch.setattr(Bench, "on_gpu", property(lambda bench: True))
    monkeypatch.setattr(step_times, "_SIDE", 64)
    allocated, reserved = 3 * 2**30, 4 * 2**30
    for function, value in {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "mem_get_info": (80 * 2**30, 80 * 2**30),
        "memory_allocated": allocated,
        "max_memory_allocated": allocated,
        "memory_reserved": reserved,
        "max_memory_reserved": reserved,
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "Event", _Event)


class _Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end.at - self.at) * 1000


def test_a_command_that_was_cut_off_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran = []

    def jobs(bench: Bench) -> dict[str, gpu_check.Job]:
        def first() -> list[Row]:
            ran.append("first")
            return [Row("a", "first", "1", "", "measured", {})]

        def second() -> list[Row]:
            ran.append("second")
            if ran.count("second") == 1:
                raise KeyboardInterrupt
            if ran.count("second") == 2:
                raise RuntimeError("CUDA error: out of patience")
            return [Row("a", "second", "2", "", "measured", {})]

        return {"first": first, "second": second}

    monkeypatch.setattr(gpu_check, "MEASUREMENTS", {"a": jobs})
    with pytest.raises(KeyboardInterrupt):
        gpu_check.measure(BENCH, new(tmp_path))
    rows = gpu_check.measure(BENCH, new(tmp_path))
    assert [row.verdict for row in rows] == ["measured", "FAILED"]
    assert rows[1].figures == {"error": "RuntimeError: CUDA error: out of patience"}
    rows = gpu_check.measure(BENCH, new(tmp_path))
    assert [(row.found, row.verdict) for row in rows] == [("1", "measured"), ("2", "measured")]
    assert gpu_check.measure(BENCH, new(tmp_path)) == rows
    assert ran == ["first", "second", "second", "second"]


def test_an_error_is_a_row_and_the_exit_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(bench: Bench) -> list[Row]:
        raise RuntimeError("no kernel | for this")

    monkeypatch.setattr(training, "_measure", fails)
    found = _invoke(tmp_path, "training")
    assert found.exit_code == 1
    assert "FAILED" in (tmp_path / "gpu_check_on_cpu.md").read_text(encoding="utf-8")
    assert (tmp_path / "gpu_check_on_cpu.rows.json").is_file()


def test_rows_of_another_machine_are_refused(tmp_path: Path) -> None:
    new(tmp_path).add("a", [Row("a", "b", "1", "", "measured", {})])
    with pytest.raises(ConfigError, match=r"must be of this machine .*H100.*none.* remove the file"):
        StoredRows(tmp_path / "rows.json", {"gpu": "H100"})
    (tmp_path / "rows.json").write_text("[", encoding="utf-8")
    with pytest.raises(ConfigError, match="can't be read: remove it"):
        new(tmp_path)


def test_what_can_not_run_is_refused(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        refused = CliRunner().invoke(_app(), ["--output", str(tmp_path)])
        assert refused.exit_code == 2 and "There is no CUDA device" in refused.output
    assert CliRunner().invoke(_app(), ["--device", "cpu"]).exit_code == 2
    with pytest.raises(ConfigError, match="among memory, .* but got speed"):
        gpu_check.measure(BENCH, new(tmp_path), ["speed"])


def test_a_package_that_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    monkeypatch.setattr(memory, "SETTINGS", [s for s in memory.SETTINGS if s.needs is not None])
    rows = gpu_check.measure(BENCH, new(tmp_path), ["memory"])
    assert {row.verdict for row in rows} == {"not available"}
    assert {row.figures["needs"] for row in rows} == {"peft", "bitsandbytes"}


def test_it_needs_neither_trl_nor_datasets() -> None:
    script = (
        "import sys; sys.modules['trl'] = sys.modules['datasets'] = None; "
        "from layersample_benchmarks import gpu_check; from layersample_benchmarks.gpu import resume"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def _invoke(folder: Path, only: str) -> Result:
    return CliRunner().invoke(
        _app(), ["--output", str(folder), "--scale", "tiny", "--device", "cpu", "--only", only]
    )


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(gpu_check.main)
    return app
