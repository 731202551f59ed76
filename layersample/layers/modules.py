"""Look inside of a model: paths of its modules, and the transformers models that it is or holds."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from torch import nn


def is_inside(name: str, path: str) -> bool:
    """Whether a module or parameter lies at a path or below it; all do below the model itself, ``""``."""
    return path == "" or name == path or name.startswith(path + ".")


def join(path: str, name: str) -> str:
    """The path of a child."""
    return f"{path}.{name}" if path and name else path or name


def children(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Paths of the children of a module."""
    return [join(path, name) for name, _ in modules[path].named_children()]


def accessor(model: nn.Module, method: str) -> nn.Module | None:
    """The module that an accessor of transformers returns; some raise for models that have none."""
    found = getattr(model, method, None)
    if found is None or not inspect.ismethod(found):
        return None
    try:
        module = found()
    except (NotImplementedError, AttributeError, TypeError):
        return None
    return module if isinstance(module, nn.Module) else None


def is_transformers_model(module: nn.Module) -> bool:
    """Whether a module is a PreTrainedModel, told by what it has, since a plain one must not cost the import."""
    return hasattr(type(module), "base_model_prefix") and hasattr(type(module), "_no_split_modules")


def transformers_models(modules: Mapping[str, nn.Module], *, outermost: bool = False) -> list[str]:
    """Paths of the transformers models in a model, ``""`` if it is one itself; parents before children.

    Args:
        modules: All modules of the model by path.
        outermost: Whether to leave out those that lie in others.
    """
    found: list[str] = []
    for path, module in modules.items():
        if is_transformers_model(module) and not (outermost and any(is_inside(path, p) for p in found)):
            found.append(path)
    return found


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The children of a module that lists its children, in order; none of any other."""
    if isinstance(module, nn.ModuleDict):
        return list(module.values())
    return list(module) if isinstance(module, nn.ModuleList) else []
