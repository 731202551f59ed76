"""The rooms of the repository: what may import what, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import layersample

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "layersample": "layersample",
    "strategies": "layersample_strategies",
    "benchmarks": "layersample_benchmarks",
}
# The rooms of the library, from the top to the ground. A room may import the rooms that stand below it.
ROOMS = (
    *(
        "cli",
        "training",
        "exporting",
        "integrations",
        "planning",
        "profiling",
        "testing",
        "lengths",
        "config",
        "scheduling",
    ),
    *("checkpoints", "parallel", "frozen", "optim", "activations", "metrics", "registry", "projection"),
    *(
        "sampling",
        "layers",
        "plots",
        "unwrapping",
        "notices",
        "bf16_products",
        "environment",
        "option_files",
        "options",
        "choices",
        "amounts",
        "strict_yaml",
        "model_files",
        "files",
    ),
    *("plugins", "versions", "hooks", "errors"),
)
FLOOR = {room: number for number, room in enumerate(ROOMS)}
MAY_IMPORT = {
    "layersample": {"layersample"},
    "strategies": {"layersample", "layersample_strategies"},
    "benchmarks": {"layersample", "layersample_strategies", "layersample_benchmarks"},
}


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "layersample").with_suffix("").parts[0]


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at whatever depth of its code."""
    folder, *inside = path.relative_to(ROOT).with_suffix("").parts
    package = [PACKAGES[folder], *inside[:-1]]
    names = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return names


def strings(path: Path) -> Iterator[str]:
    """Every string of a file that isn't documentation."""
    tree = parse(path)
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_between_packages_go_one_way(folder: str) -> None:
    for path in modules(folder):
        ours = {name.split(".")[0] for name in imported(path)} & set(PACKAGES.values())
        assert ours <= MAY_IMPORT[folder], path


def test_every_room_is_known() -> None:
    there = {path.stem for path in (ROOT / "layersample").glob("*.py")} - {"__init__", "__main__"}
    there |= {path.parent.name for path in (ROOT / "layersample").glob("*/__init__.py")}
    assert there == set(ROOMS)


def test_imports_between_rooms_go_down() -> None:
    for path in modules("layersample"):
        own = room_of(path)
        for name in imported(path):
            top, _, inside = name.partition(".")
            if top == "layersample" and own not in ("__init__", "__main__"):
                assert inside, f"{path} must import from a room, not from the top"
                room = inside.split(".")[0]
                assert room == own or FLOOR[room] > FLOOR[own], f"{path} reaches up to {room}"


def test_no_module_is_part_of_a_circle() -> None:
    for folder, package in PACKAGES.items():
        arrows: dict[str, set[str]] = {}
        for path in modules(folder):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            arrows[name.removesuffix(".__init__")] = imported(path)
        left = {name: targets & arrows.keys() - {name} for name, targets in arrows.items()}
        while free := {name for name, targets in left.items() if not targets & left.keys()}:
            left = {name: targets for name, targets in left.items() if name not in free}
        assert not left, f"a circle among {sorted(left)}"


def test_no_module_reaches_up_by_a_string() -> None:
    above = {
        "layersample": ("layersample_strategies", "layersample_benchmarks"),
        "strategies": ("layersample_benchmarks",),
    }
    for folder, packages in above.items():
        for path in modules(folder):
            for text in strings(path):
                assert not text.startswith(packages), f"{path} names {text}"
                room = text.removeprefix("layersample.").split(".")[0]
                if folder == "layersample" and text.startswith("layersample.") and room in FLOOR:
                    assert FLOOR[room] >= FLOOR.get(room_of(path), 0), f"{path} names {text}"


def test_no_message_points_to_what_a_wheel_lacks() -> None:
    for path in (p for folder in PACKAGES for p in modules(folder)):
        assert not any("examples/" in text for text in strings(path)), path


def test_strategies_use_the_public_interface_alone() -> None:
    for path in (ROOT / "strategies").glob("*.py"):
        inside = {name for name in imported(path) if name.startswith("layersample.")}
        assert inside <= {"layersample.projection.bases", "layersample.metrics"}, path


def test_public_names_exist() -> None:
    public: list[str] = layersample.__all__  # type: ignore[attr-defined]  # the stub can't hold it
    for name in public:
        assert hasattr(layersample, name), name
    assert {"finetune", "plan", "profile", "TrainConfig", "Draw"} <= set(public)
    assert layersample.register is layersample.register_sampler
    with pytest.raises(AttributeError, match="nonsense"):
        layersample.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_scheduler_does_not_import_the_trainer() -> None:
    names = "('trl', 'datasets', 'transformers.trainer', 'torch.distributed.tensor')"
    code = f"import sys; from layersample import LayerScheduler; sys.exit(any(m in sys.modules for m in {names}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_no_eval_and_no_unpickling() -> None:
    for path in (p for folder in PACKAGES for p in modules(folder)):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load"), path
                if name == "torch.load":
                    assert any(
                        k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords
                    )


def test_files_are_short() -> None:
    for path in (p for folder in PACKAGES for p in modules(folder)):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 380, path


def test_nothing_but_the_configuration_names_a_sampler() -> None:
    # A function of metrics and an option of the learning rate have these names too.
    others = {"__init__", "spectrum", "warmup"}
    names = {path.stem for path in (ROOT / "strategies").glob("*.py")} - others
    for path in modules("layersample"):
        assert path.name == "options.py" or not set(strings(path)) & names, path
