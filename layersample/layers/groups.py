"""Which group a parameter outside of the layers belongs to: embeddings, head, final norm or other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from layersample.layers.modules import accessor, is_inside, join, transformers_models

GroupName = Literal["embeddings", "head", "norm", "other"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)

# Whole words of a name: "embed_tokens" and "patch_embeddings" are embeddings, "unembedding" is a head.
_EMBEDDING = re.compile(r"embed(s|der|ding|dings)?\d*|embd")
_HEAD = re.compile(r"unembed(der|ding|dings)?\d*")
_PLAIN_HEAD = re.compile(r"(lm)?heads?\d*")


class Grouping:
    """Tells the group of a parameter by what its modules are, not by the model's class.

    Args:
        model: The model; transformers models may lie inside of it.
        modules: Its modules by path.
        layers: Paths of its layers.
    """

    def __init__(self, model: nn.Module, modules: dict[str, nn.Module], layers: Sequence[str]) -> None:
        self._modules, self._layers = modules, layers
        self._models = transformers_models(modules)
        path_of = {id(module): path for path, module in modules.items()}

        def accessed(method: str) -> set[str]:
            found = {path: accessor(modules[path], method) for path in self._models}
            # A tower's own embedding is named so too; a whole model is no embedding and no head of itself.
            return {path_of[id(m)] for p, m in found.items() if m is not None and path_of.get(id(m), p) != p}

        self._embeddings, self._heads = accessed("get_input_embeddings"), accessed("get_output_embeddings")
        self._bases = self._find_bases()
        # A plain module says nothing of its head: what is registered behind the last layer counts as one.
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        last = max((i for i, name in enumerate(names) if self._in_a_layer(name)), default=-1)
        self._behind = set(names[last + 1 :])

    def __call__(self, name: str) -> GroupName:
        """The group of the parameter of a name."""
        path, _, _ = name.rpartition(".")
        words = re.split(r"[._]", name.lower())
        if any(is_inside(name, embedding) for embedding in self._embeddings):
            return "embeddings"
        if any(is_inside(name, head) for head in self._heads) or any(map(_HEAD.fullmatch, words)):
            return "head"
        if isinstance(self._modules[path], nn.Embedding) or any(map(_EMBEDDING.fullmatch, words)):
            return "embeddings"
        around = [model for model in self._models if is_inside(name, model)]
        if any(is_inside(name, model) and not is_inside(name, base) for model, base in self._bases.items()):
            return "head"
        if not around and any(map(_PLAIN_HEAD.fullmatch, words)):
            return "head"
        if "norm" in type(self._modules[path]).__name__.lower():
            return "norm"
        return "head" if not around and name in self._behind else "other"

    def _find_bases(self) -> dict[str, str]:
        """The body of each outermost transformers model that has one; what is outside of it is the head."""
        bases: dict[str, str] = {}
        for path in transformers_models(self._modules, outermost=True):
            prefix = getattr(self._modules[path], "base_model_prefix", "")
            if prefix and join(path, prefix) in self._modules:
                bases[path] = join(path, prefix)
        return bases

    def _in_a_layer(self, name: str) -> bool:
        return any(is_inside(name, layer) for layer in self._layers)
