from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from layersample.activations.replay import Replay


class Count(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return x + 1


def test_what_was_given_is_given_again_in_the_same_order() -> None:
    module = Count()
    replay = Replay(module)
    assert (module(1), module(5)) == (2, 6)
    replay.replay()
    assert (module(1), module(5)) == (2, 6) and module.calls == 2
    assert module(7) == 8, "what wasn't noted is computed"
    replay.close()
    replay.close()
    assert module(1) == 2 and module.calls == 4 and "forward" not in vars(module)


@pytest.mark.parametrize(
    ("given", "again"),
    [
        (torch.tensor([1]), torch.tensor([2])),
        (torch.tensor([1]), torch.tensor([1, 1])),
        (torch.tensor([1]), torch.tensor([1.0])),
        (torch.tensor([1]), [torch.tensor([1])]),
        (True, 1),
        (object(), object()),
    ],
    ids=["value", "shape", "type", "structure", "truth", "object"],
)
def test_other_inputs_are_computed(given: Any, again: Any) -> None:
    module = nn.Identity()
    replay = Replay(module)
    assert module(given) is given
    module(given)
    replay.replay()
    assert module(given) is given
    assert module(again) is again
    replay.close()


def test_an_input_that_was_written_to_since_is_another() -> None:
    module, buffer = Count(), torch.zeros(1)
    replay = Replay(module)
    module(buffer)
    buffer += 5
    replay.replay()
    assert module(buffer) == 6


def test_a_forward_that_someone_has_put_there_stays() -> None:
    module = nn.Linear(2, 2)
    theirs = module.forward
    put = vars(module)["forward"] = lambda x: theirs(x) * 0
    replay = Replay(module)
    assert not module(torch.ones(1, 2)).any()
    replay.close()
    assert vars(module)["forward"] is put
