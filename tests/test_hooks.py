from __future__ import annotations

from functools import partial

import torch
from torch import nn

from layersample.hooks import is_users, name_of


class Called:
    def __call__(self, module: nn.Module) -> None:
        pass

    def method(self, module: nn.Module) -> None:
        pass


def test_the_name_of_a_hook() -> None:
    assert name_of(test_the_name_of_a_hook) == f"{__name__}.test_the_name_of_a_hook"
    assert name_of(partial(partial(Called().method))) == f"{__name__}.Called.method"
    assert name_of(Called()) == f"{__name__}.Called"
    assert name_of(print) == "builtins.print"


def test_whose_a_hook_is() -> None:
    assert is_users(Called()) and is_users(lambda module: None)
    assert not is_users(nn.Linear(1, 1).forward) and not is_users(name_of) and not is_users(torch.nn.Module())
