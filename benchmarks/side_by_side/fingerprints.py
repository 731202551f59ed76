"""What tells the runs of one suite from those of another."""

from __future__ import annotations

import hashlib
import json
import sys
from functools import cache
from pathlib import Path

from layersample.registry import PLUGIN_PREFIX, list_samplers

from ..methods.method import Method
from .entries import MethodEntry
from .suite import Suite


def fingerprint(suite: Suite, entry: MethodEntry) -> str:
    """What decides the numbers of a method's runs, in a few letters, but for the learning rate and seed of each.

    The content of a data file and of the plug-in that a method comes from counts, that of a model's folder doesn't.
    """
    common = suite.identity()
    definition = entry.definition
    own = {"method": definition.name, "options": {**definition.options, **entry.options}}
    files = [
        path for path in (Path(suite.task), _plugin_of(definition)) if path is not None and path.is_file()
    ]
    digests = [_digest(path, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([common, own, suite.seeds[0], *digests], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _digest(path: Path, changed: int) -> str:
    """Hash of a file's content, read once for all rows; ``changed`` is when it was written."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plugin_of(method: Method) -> Path | None:
    """The file of a user's that a method, or its sampler, comes from."""
    sampler = list_samplers().get(str(method.options.get("sampler")))
    names = {method.prepare.__module__, getattr(sampler, "__module__", "")}
    plugins = [sys.modules[name] for name in names if name.startswith(PLUGIN_PREFIX)]
    return Path(str(plugins[0].__file__)) if plugins else None
