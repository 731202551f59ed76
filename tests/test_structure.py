"""The rooms of the repository: what may import what, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import layersample

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "layersample": "layersample",
    "strategies": "layersample_strategies",
    "benchmarks": "layersample_benchmarks",
}
MAY_IMPORT = {
    "layersample": {"layersample"},
    "strategies": {"layersample", "layersample_strategies"},
    "benchmarks": {"layersample", "layersample_strategies", "layersample_benchmarks"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_go_one_way(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        ours = {name.split(".")[0] for name in imported(path)} & set(PACKAGES.values())
        # The command line is on top of everything, and mounts the benchmark's command.
        on_top = {"layersample_benchmarks"} if path == ROOT / "layersample" / "cli.py" else set()
        assert ours <= MAY_IMPORT[room] | on_top, path


def test_the_command_line_is_on_top() -> None:
    for path in (ROOT / "layersample").rglob("*.py"):
        assert "layersample.cli" not in imported(path), path
    command = [name for name in imported(ROOT / "layersample" / "cli.py") if name.startswith("layersample_b")]
    assert command == ["layersample_benchmarks.command"]


def test_strategies_use_the_public_interface_alone() -> None:
    for path in (ROOT / "strategies").glob("*.py"):
        inside = {name for name in imported(path) if name.startswith("layersample.")}
        assert all(
            name in ("layersample.bases", "layersample.metrics", "layersample.draws") for name in inside
        ), path


def test_public_names_are_sorted_and_exist() -> None:
    assert layersample.__all__ == sorted(layersample.__all__)
    assert all(hasattr(layersample, name) for name in layersample.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        layersample.nonsense  # noqa: B018


def test_importing_the_library_does_not_import_the_trainer() -> None:
    code = "import layersample, sys; sys.exit(any(m in sys.modules for m in ('trl', 'datasets', 'transformers.trainer')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_eval_and_no_unpickling() -> None:
    for path in (p for room in PACKAGES for p in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load"), path
                if name == "torch.load":
                    assert any(
                        k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
                    )


def test_files_are_short() -> None:
    for path in (p for room in PACKAGES for p in (ROOT / room).rglob("*.py")):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 380, path


def test_nothing_but_the_configuration_and_the_samplers_name_a_sampler() -> None:
    names = {path.stem for path in (ROOT / "strategies").glob("*.py")} - {"__init__"}
    for path in (ROOT / "layersample").rglob("*.py"):
        if path.name == "config.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = {
            n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        assert not strings & names, path
