"""The README is short, its tables are whole, and .ci/run finds its two commands. What it says is tested with docs/."""

from __future__ import annotations

import re

from layersample import list_projections, list_samplers
from layersample.cli.app import app
from layersample.plugins import settings_files
from layersample.registry import describe_options
from layersample_benchmarks.side_by_side.suite_files import builtin_suites
from tests.documents import ROOT, commands, text_of

README = text_of(ROOT / "README.md")
SAMPLERS = text_of(ROOT / "docs" / "samplers.md")
PROJECTIONS = text_of(ROOT / "docs" / "projections.md")
COMMANDS = text_of(ROOT / "docs" / "reference" / "command-line.md")
BENCHMARK = text_of(ROOT / "docs" / "benchmark.md")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_every_built_in_strategy_is_in_a_table() -> None:
    for name, cls in list_samplers().items():
        if cls.__module__.startswith("layersample_strategies"):
            assert f"`{name}`" in README and f"| `{name}` |" in SAMPLERS, name
            assert SAMPLERS.count(f"`{name}`") > 1, f"{name} has a row, but no section speaks of it"
    for name, kind in list_projections().items():
        if kind.__module__.startswith("layersample_strategies"):
            assert f"| `{name}` |" in PROJECTIONS and f"## `{name}`" in PROJECTIONS


def test_every_option_of_a_built_in_strategy_is_explained() -> None:
    for page, classes in ((SAMPLERS, list_samplers()), (PROJECTIONS, list_projections())):
        for name, cls in classes.items():
            if cls.__module__.startswith("layersample_strategies"):
                lacking = [
                    o.name
                    for o in describe_options(cls)
                    if f"`{o.name}`" not in page and f"`{o.name}=" not in page
                ]
                assert not lacking, f"{name}: {lacking}"


def test_every_preset_suite_and_command_is_in_a_table() -> None:
    assert [name for name in settings_files("presets") if f"| `{name}` |" not in COMMANDS] == []
    assert [name for name in builtin_suites() if f"`{name}`" not in BENCHMARK] == []
    commands_there = [
        *(command.name for command in app.registered_commands),
        "benchmark recipes",
        "benchmark report",
    ]
    assert [name for name in commands_there if f"| `layersample {name}" not in COMMANDS] == []


def test_the_commands_of_ci_are_there() -> None:
    line = r"^pip install -c constraints.txt -e \"\.\[(demo|test)\]\" && "
    assert re.findall(line, README, re.MULTILINE) == ["demo", "test"]
    # .ci/run takes the first line of each kind.
    assert re.findall(r"^pip install .*\[(\w+)\]", README, re.MULTILINE) == ["demo", "test"]
    assert [page for page, _ in commands("layersample ")].count("README.md") >= 2
