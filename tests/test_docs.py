"""What README and docs/ say holds: code runs, commands exist, figures are those stored, messages are in the source."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import layersample
from layersample import LayerSampler, LayerSamplingCallback, LayerScheduler, Projection, register
from layersample.cli import app as cli
from layersample.cli.plan_report import gib
from layersample.config import make_config, read_preset
from layersample.testing import ProjectionContract
from layersample.training import batches, data
from layersample.training.data import load_data
from layersample_benchmarks.side_by_side.suite import Suite
from tests.documents import (
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    name_of,
    prose,
    tables_of,
    tables_with_source,
    text_of,
)
from tests.helpers import make_batch, make_llama
from tests.test_structure import ROOMS

PYTHON = blocks("python")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("block", [b for b in PYTHON if not b.reason], ids=str)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama()
    rows = [{k: v[0].tolist() for k, v in make_batch(i, 1).items()} for i in range(8)]
    module = ModuleType("a_page")  # in sys.modules, where dataclasses look for the module of a class
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = module.__dict__
    names |= {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [make_batch(i) for i in range(3)],
        "torch": torch,
        "Trainer": Trainer,
        "args": TrainingArguments(
            str(tmp_path), max_steps=2, report_to="none", use_cpu=True, dataloader_pin_memory=False
        ),
        "data": Dataset.from_list(rows),
        "calibration_batches": [make_batch(i) for i in range(2)],
    }
    if "scheduler" in block.code and "LayerScheduler" not in block.code:
        names["scheduler"] = LayerScheduler(model, names["optimizer"], "lisa")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.code, str(block), "exec"), names)


class TestTheProjectionOfThePage(ProjectionContract):
    def make(self) -> Projection:
        (block,) = (b for b in PYTHON if b.page == "docs/projections.md" and "class Rows" in b.code)
        names: dict[str, Any] = {"__name__": "rows"}
        exec(compile(block.code, str(block), "exec"), names)
        made: Projection = names["Rows"](rank=4)
        return made


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    left_out = [block for block in PYTHON if block.reason]
    assert len(left_out) <= 6 and all(len(block.reason) > 10 for block in left_out)
    assert len(PYTHON) >= 20


def leave(*args: Any, **kwargs: Any) -> None:
    raise typer.Exit()


@pytest.mark.parametrize(
    ("page", "command"), commands("layersample "), ids=[f"{p}: {c}" for p, c in commands("layersample ")]
)
def test_commands_are_understood(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("layersample.cli.train_command._run", lambda config: None)
    monkeypatch.setattr("layersample.cli.train_command.launch", lambda gpus, processes: None)
    for name in (
        "chat_command._run",
        "export_command._export",
        "export_command._apply",
        "llamafactory_command._run",
    ):
        monkeypatch.setattr(f"layersample.cli.{name}", lambda *given: None)
    monkeypatch.setattr("layersample_benchmarks.side_by_side.command._run", lambda *_, **__: None)
    monkeypatch.setattr(
        "layersample_benchmarks.side_by_side.report.write_report", lambda *given: ["report.html"]
    )
    monkeypatch.setattr("layersample.training.models.load_any_model", lambda name, report: make_llama())
    for name in ("run.yaml", "suite.yaml"):
        (tmp_path / name).write_text("steps: 3\n")
    for name in ("my_sampler.py", "mine.py"):  # the block on its page is run by another test
        (tmp_path / name).write_text("")
    for name in ("alternate", "mine"):
        register(name)(type(name.title(), (LayerSampler,), {"sample": lambda self, context: [0]}))
    monkeypatch.setattr("layersample.training.models.load_tokenizer", leave)
    for module in (data, batches):  # imported before: a first import would keep what is put in its place here
        monkeypatch.setattr(module, "load_data", leave)
    monkeypatch.setattr("layersample.planning.planner.plan", leave)  # what it prints is tested with it
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli.app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


def test_modules_and_scripts_that_pages_name_exist() -> None:
    modules, scripts = set(), set()
    for page in PAGES:
        text = re.sub(r"\s+", " ", text_of(page))
        modules |= set(re.findall(r"python -m (layersample[\w.]+)", text))
        scripts |= set(re.findall(r"\bexamples/[\w/]+\.\w+", text))
    assert len(modules) >= 8 and len(scripts) >= 3
    assert [name for name in modules if find_spec(name.rstrip(".")) is None] == []
    assert [name for name in scripts if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_and_links_exist(page: Path) -> None:
    text = prose(page)
    paths = re.findall(
        r"`((?:benchmarks|docs|examples|layersample|strategies|tests|\.github|\.ci)/[\w./-]*)`", text
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [link for link in links if link and not re.match(r"\w+:", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_blocks_are_options(block: Block) -> None:
    options = yaml.safe_load(block.code)
    if block.code.startswith("# suite.yaml"):
        Suite(**options)
    elif ours := options.get("layersample") or options.get("layer_sampling"):  # in another trainer's file
        LayerSamplingCallback(**ours)
    else:
        assert block.code.startswith("# run.yaml"), "the first line says which file it is"
        make_config(("run.yaml", options))


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_blocks_name_a_group_that_is_read(block: Block) -> None:
    from layersample import plugins

    groups = tomllib.loads(block.code)["project"]["entry-points"]
    assert set(groups) <= {plugins.SAMPLERS, plugins.COMMANDS, plugins.SETTINGS}


@pytest.mark.parametrize("block", blocks("jsonl", "csv"), ids=str)
def test_samples_of_data_are_read(block: Block, tmp_path: Path) -> None:
    path = tmp_path / f"data.{block.language}"
    path.write_text(block.code, encoding="utf-8")
    headings = int(block.language == "csv")
    assert len(load_data(str(path))) == len(block.code.splitlines()) - headings


TABLES = [(name_of(page), *found) for page in PAGES for found in tables_with_source(page)]


@pytest.mark.parametrize(("page", "source", "rows"), TABLES, ids=[f"{t[0]}: {t[1]}" for t in TABLES])
def test_figures_are_those_stored(page: str, source: str, rows: list[list[str]]) -> None:
    """Each row is (a part of) a stored row; or its figures are those that several tables have of that one name."""
    tables = [[pieces(row) for row in table] for table in tables_of(ROOT / source)]
    for row in rows:
        cells, known = {cell for cell in row if cell}, set()
        for table in tables:
            same = [stored for stored in table if row[0] in stored]
            if len(same) == 1 or any(cells <= stored for stored in same):
                known |= next((stored for stored in same if cells <= stored), same[0])
        assert cells <= known, f"{row[0]}: {source} hasn't {cells - known}"


def pieces(row: list[str]) -> set[str]:
    """The cells of a stored row, and what they are made of: "1. full", "0.497 ± 0.121", "0.001: 1.008; 0.0033: 1.097"."""
    return {*row, *(piece.strip() for cell in row for piece in re.split(r"[;:±]|^\d+\. ", cell))}


def stored_peaks() -> dict[tuple[str, str], str]:
    """Planned peaks in GiB, of a model and a way to train it, in the worst case."""
    peaks = {}
    for row in json.loads(text_of(ROOT / "benchmarks/results/plan_papers.json"))["rows"]:
        peaks[row["model"], row["run"]] = row["worst_bytes"]
    for row in json.loads(text_of(ROOT / "benchmarks/results/plan_cards.json"))["rows"]:
        for way, peak in row["peak_bytes"].items():
            known = way in ("full fine-tuning", "LoRA, rank 16")
            peaks[row["model"], way if known else f"--preset {way}"] = peak
    return {key: gib(peak) for key, peak in peaks.items()}


def test_peaks_of_the_first_page_are_those_stored() -> None:
    table = next(t for t in tables_of(ROOT / "docs/index.md") if any("--preset" in c for c in t[0][3:4]))
    assert len(table) >= 8
    for memory, model, peak, way, sampler, layers, period, rate, ends in table:
        assert peak == stored_peaks()[model, way.strip("`")], (model, way)
        assert float(peak) + 1 <= float(memory.removesuffix(" GB"))
        if way.startswith("`--preset"):
            options = make_config(("preset", read_preset(way.strip("`").split()[-1])))
            assert (sampler.strip("`"), int(layers)) == (options.sampler, options.num_active), way
            assert (int(period), float(rate)) == (options.period, options.learning_rate), way
            assert {ends} == {options.embeddings, options.head}, way


def test_peaks_of_the_readme_are_those_stored() -> None:
    table = next(t for t in tables_of(ROOT / "README.md") if any("--preset" in row[0] for row in t))
    assert len(table) >= 5
    for way, peak, card in table:
        named = way if ("llama-2-7b", way) in stored_peaks() else "LoRA, rank 16"
        assert way.startswith(named) and peak == stored_peaks()["llama-2-7b", named], way
        assert float(peak) + 1 <= float(card.removesuffix(" GB"))


def test_most_tables_of_figures_say_where_they_come_from() -> None:
    assert len(TABLES) >= 8


@cache
def messages() -> tuple[str, ...]:
    """Every text in the library's source, with … for what is put into it."""
    found = []
    for path in (ROOT / "layersample").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


@pytest.mark.parametrize("block", blocks("text"), ids=str)
def test_quoted_messages_are_in_the_source(block: Block) -> None:
    quoted = " ".join(block.code.split())
    pattern = re.compile(".*".join(re.escape(part.strip()) for part in quoted.split("…")), re.DOTALL)
    assert any(pattern.search(message) for message in messages()), quoted


def test_every_public_name_is_in_the_reference() -> None:
    text = text_of(ROOT / "docs" / "reference" / "python.md")
    public = [name for name in layersample.__all__ if name not in ("metrics", "__version__")]  # type: ignore[attr-defined]
    shown = set(re.findall(r"^::: layersample\.(\w+)$|^\| `(\w+)` \|", text, re.MULTILINE))
    assert set(public) <= {name for names in shown for name in names}


def test_every_room_is_on_the_page_of_the_architecture() -> None:
    rooms = re.findall(r"^\| `(\w+)` \|", text_of(ROOT / "docs" / "architecture.md"), re.MULTILINE)
    assert rooms == [room for room in ROOMS if room in rooms], "in the order of tests/test_structure.py"
    folders = {path.parent.name for path in (ROOT / "layersample").glob("*/__init__.py")}
    assert folders <= set(rooms)


def test_pictures_of_the_stored_benchmark_are_the_stored_ones() -> None:
    for name in ("differences", "memory"):
        shown = ROOT / "docs" / "images" / f"default-{name}.svg"
        assert shown.read_bytes() == (ROOT / "benchmarks/results/default" / f"{name}.svg").read_bytes()
