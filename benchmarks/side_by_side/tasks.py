"""What is trained and tested: data, how an answer is read, and the splits that never touch each other."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from layersample.errors import ConfigError
from layersample.training.builtin_data import BUILTIN
from layersample.training.data import load_split

if TYPE_CHECKING:
    from datasets import Dataset

_SPLIT_SEED = 0  # the same problems for every seed, or seeds would differ by their test set


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        name: Its name, or the data's.
        data: As ``layersample train`` takes it.
        read_answer: Takes the answer out of a text; ``None`` where only the loss is measured.
        choices: The completions to choose from, for a task that is a choice.
    """

    name: str
    data: str
    read_answer: Callable[[str], str | None] | None = None
    choices: tuple[str, ...] = ()

    @property
    def has_answers(self) -> bool:
        """Whether answers are right or wrong."""
        return self.read_answer is not None or bool(self.choices)


@dataclass(frozen=True)
class Splits:
    """The parts of a task's data; no problem is in two of them."""

    train: Dataset
    validation: Dataset
    test: Dataset


def after_marker(text: str, *, marker: str) -> str | None:
    """What stands behind the last marker, up to the end of its line; without spaces and thousands' commas."""
    found = re.findall(re.escape(marker) + r"[ \t]*([^\n]*)", text)
    return found[-1].replace(",", "").strip().rstrip(".") or None if found else None


def whole_answer(text: str) -> str | None:
    """An answer that is nothing but its first line, without the full stop that ends it."""
    first = text.strip().partition("\n")[0]
    return first.partition(".")[0].strip() or None


# Of a family, as reasoning-gym names them.
_RELATIONS = (
    *("mother", "father", "son", "daughter", "sister", "brother", "wife", "husband"),
    *("grandmother", "grandfather", "mother-in-law", "father-in-law"),
)
_TASKS = {
    "chain_sum": Task("chain_sum", "chain_sum", whole_answer),
    "family_relationships": Task(
        "family_relationships", "family_relationships", choices=tuple(f" {word}." for word in _RELATIONS)
    ),
    "gsm_symbolic": Task("gsm_symbolic", "gsm_symbolic", partial(after_marker, marker="####")),
    "sarcasm": Task("sarcasm", "sarcasm", choices=(" no", " yes")),
}


def get_task(name: str, answer_marker: str | None = None) -> Task:
    """The task of a name, or a task from data of the user's.

    Args:
        name: A built-in task, or data as ``layersample train`` takes it.
        answer_marker: Text that the answer follows, in data of the user's; ``None`` measures the loss alone.

    Raises:
        ConfigError: If a marker is given for a built-in task, or is empty.
    """
    if name in _TASKS:
        if answer_marker is not None:
            raise ConfigError(f"answer_marker is for data of your own; {name} knows where its answers are.")
        return _TASKS[name]
    if answer_marker == "":
        raise ConfigError("answer_marker must not be empty; leave it out to measure the loss alone.")
    if name in BUILTIN:
        return Task(name, name)
    reader = None if answer_marker is None else partial(after_marker, marker=answer_marker)
    return Task(name.rpartition("/")[2], name, reader)


def right_answers(task: Task, problems: Sequence[Mapping[str, Any]]) -> list[str]:
    """The right answer of each problem; for a task that is a choice, its completion.

    Args:
        task: Says how an answer is read, or what there is to choose from.
        problems: With ``prompt`` and ``completion``, both text.

    Raises:
        ConfigError: If a problem is of another form, or its answer can't be read.
    """
    answers = []
    for problem in problems:
        if not isinstance(problem.get("prompt"), str) or not isinstance(problem.get("completion"), str):
            raise ConfigError(
                'Answers can be judged only in data with "prompt" and "completion" as text, but got '
                f"{', '.join(problem)}. Leave out answer_marker to measure the loss alone."
            )
        completion = problem["completion"]
        answer = completion if task.read_answer is None else task.read_answer(completion)
        if answer is None:
            raise ConfigError(
                f"Every completion must hold an answer behind its marker, but one ends in {completion[-60:]!r}."
            )
        answers.append(answer)
    return answers


def split(task: Task, *, validation_size: int, test_size: int, train_size: int, seed: int) -> Splits:
    """Load a task's data and part it.

    Args:
        task: The task.
        validation_size: Problems to choose learning rates on.
        test_size: Problems to measure the methods on.
        train_size: Examples that a run trains on, at most.
        seed: Seed of the order of the training examples; the held-out problems are the same for every seed.

    Raises:
        ConfigError: If the data can't be read or is too small.
    """
    wanted = validation_size + test_size
    train, held_out = load_split(task.data, None, eval_size=wanted, seed=_SPLIT_SEED)
    if len(held_out) < wanted:
        raise ConfigError(
            f"{task.data}: {validation_size} validation and {test_size} test problems are held out, which is half of "
            f"the data at most, but that is {len(held_out)}. Lower validation_size or test_size."
        )
    order = list(range(wanted))
    random.Random(_SPLIT_SEED).shuffle(order)
    # Only what a run needs, in an order of its own seed: tokenizing the rest would take longer than a few steps.
    chosen = random.Random(seed).sample(range(len(train)), min(train_size, len(train)))
    return Splits(
        train=train.select(chosen),
        validation=held_out.select(order[:validation_size]),
        test=held_out.select(order[validation_size:]),
    )
