"""What tells the runs of one suite from those of another."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from glob import glob
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
    whose full path they give, and of the plug-in that the method, its sampler or its projection comes from. Of a file
    above 2 MiB its size and both ends count.

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
    named = {
        file for path in own if path.suffix == ".yaml" for text in _named_data(path) for file in _files(text)
    }
    return [*own, *sorted(named - {path.resolve() for path in own})]


def _named_data(path: Path) -> list[str]:
    """The texts in which a task's file may name data of its own."""
    try:
        task = _TaskLoader(path.read_text(encoding="utf-8")).get_single_data()
        held = task if isinstance(task, Mapping) else {}
        return list(_texts([held.get("dataset_path"), held.get("dataset_kwargs")]))
    except (yaml.YAMLError, ValueError, RecursionError):  # the harness says what is wrong with it
        return []


class _TaskLoader(yaml.BaseLoader):
    """Plain YAML, whatever tags there are: texts, lists and mappings alone come out of it."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _files(text: str) -> list[Path]:
    """The files that a text names: one, those of a folder, or those of a pattern; a name on the hub is none."""
    if not Path(text).is_absolute():  # it depends on where the harness runs, which may be elsewhere next time
        return []
    try:
        found = [Path(text)] if Path(text).exists() else [Path(name) for name in glob(text, recursive=True)]
        return [
            file.resolve()
            for path in found
            for file in (path.rglob("*") if path.is_dir() else [path])
            if file.is_file() and not _is_ignored(file.relative_to(path.parent))
        ]
    except (OSError, ValueError):  # too long, or with a NUL
        return []


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
