"""What tells the runs of one suite from those of another."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from layersample.registry import PLUGIN_PREFIX, list_projections, list_samplers

from ..methods.method import Method
from .entries import MethodEntry
from .suite import Suite


def fingerprint(suite: Suite, entry: MethodEntry) -> str:
    """What decides the numbers of a method's runs, in a few letters, but for the learning rate and seed of each.

    The content of a data file and of the plug-in that a method comes from counts, that of a model's folder doesn't.
    """
    common = suite.identity()
    definition = entry.definition
    options = {**definition.options, **entry.options}
    own = {"method": definition.name, "options": options}
    plugin = _plugin_of(definition, {**suite.options, **options})
    files = [
        path
        for path in (Path(suite.task), Path(suite.other_text), plugin)
        if path is not None and path.is_file()
    ]
    digests = [_digest(path, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([common, own, suite.seeds[0], *digests], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _digest(path: Path, changed: int) -> str:
    """Hash of a file's content, read once for all rows; ``changed`` is when it was written."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plugin_of(method: Method, options: Mapping[str, Any]) -> Path | None:
    """The file of a user's that a method, its sampler or its projection comes from."""
    sampler = list_samplers().get(str(options.get("sampler")))
    projection = list_projections().get(str(options.get("projection")))
    parts = (method.prepare, sampler, projection)
    names = {getattr(part, "__module__", "") for part in parts}
    plugins = [sys.modules[name] for name in names if name.startswith(PLUGIN_PREFIX)]
    return Path(str(plugins[0].__file__)) if plugins else None
