"""What tells the runs of one suite from those of another."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from layersample.registry import PLUGIN_PREFIX, list_projections, list_samplers
from layersample.training.readers import files_of, is_file_source

from ..methods.method import Method
from .entries import MethodEntry
from .suite import Suite

_PART = 2**20  # bytes of each end of a large file; training changes all of its weights


def fingerprint(suite: Suite, entry: MethodEntry) -> str:
    """What decides the numbers of a method's runs, in a few letters, but for the learning rate and seed of each.

    The content of files counts: of the data, of other text, of a model's folder, of tasks for the harness and of data
    that they name, and of the plug-in that the method, its sampler or its projection comes from. Of a file above 2 MiB
    its size and both ends count.

    Raises:
        ConfigError: If a file of data is missing.
    """
    definition = entry.definition
    options = {**definition.options, **entry.options}
    own = {"method": definition.name, "options": options}
    files = [
        *_data_files(suite.task),
        *_data_files(suite.other_text),
        *_model_files(Path(suite.model)),
        *_plugins_of(definition, {**suite.options, **options}),
        *_harness_files(suite),
    ]
    digests = [_digest(path, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([suite.identity(), own, suite.seeds[0], *digests], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _digest(path: Path, changed: int) -> str:
    """Hash of a file's content, read once for all rows; ``changed`` is when it was written."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= 2 * _PART:
            return hashlib.file_digest(file, "sha256").hexdigest()
        ends = file.read(_PART)
        file.seek(-_PART, 2)
        return hashlib.sha256(ends + file.read() + str(size).encode()).hexdigest()


def _data_files(source: str) -> list[Path]:
    return files_of(source) if is_file_source(source) else []


def _model_files(model: Path) -> list[Path]:
    """The files of a local model; none of one that has a name."""
    if model.is_file():
        return [model]
    return sorted(path for path in model.iterdir() if path.is_file()) if model.is_dir() else []


def _harness_files(suite: Suite) -> list[Path]:
    """The files of the user's tasks, where the harness scores any, and the files of data that they name."""
    if suite.lm_eval_tasks is None or not suite.lm_eval:
        return []
    folder = Path(suite.lm_eval_tasks)
    own = sorted(p for p in folder.rglob("*") if p.is_file() and not _is_ignored(p.relative_to(folder)))
    named = {Path(text) for path in own if path.suffix == ".yaml" for text in _texts([_read_task(path)])}
    elsewhere = sorted(
        path for path in named if _is_file(path) and path.resolve() not in {p.resolve() for p in own}
    )
    return [*own, *elsewhere]


def _read_task(path: Path) -> Any:
    """What a task's file holds, but for what its own tags stand for (functions, other files)."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_TaskLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # the harness says what is wrong with it
        return None


class _TaskLoader(yaml.SafeLoader):
    """Plain YAML, whatever tags there are."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a template is no path, and may be too long for one
        return False


def _is_ignored(path: Path) -> bool:
    """Whether the harness reads no such file: what Python has compiled of a task's functions, and what is hidden."""
    return any(part == "__pycache__" or part.startswith(".") for part in path.parts)


def _plugins_of(method: Method, options: Mapping[str, Any]) -> list[Path]:
    """The files of a user's that a method comes from, and whatever samplers and projections its options name."""
    named = {**list_samplers(), **list_projections()}
    parts = [method.prepare, *(named[text] for text in _texts(options.values()) if text in named)]
    modules = sorted({name for part in parts if (name := part.__module__).startswith(PLUGIN_PREFIX)})
    return [Path(str(sys.modules[name].__file__)) for name in modules]


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """All texts in some options, those inside of samplers' options too: a sampler may go around another one."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            yield from _texts(value.values())
        elif isinstance(value, list | tuple):
            yield from _texts(value)
