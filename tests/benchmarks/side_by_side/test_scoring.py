from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from layersample import ConfigError
from layersample.training.trainer import NonFiniteLossError
from layersample_benchmarks.side_by_side import scoring
from layersample_benchmarks.side_by_side.scoring import (
    choice_likelihoods,
    choice_tokens,
    mean_loss,
    score_held_out,
    share_right,
)
from layersample_benchmarks.side_by_side.tasks import Task, get_task


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


class Parrot(torch.nn.Module):
    """Says the same text after every prompt, and ends."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        self.sides: list[torch.Tensor] = []
        self.lengths: list[int] = []

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        self.sides.append(attention_mask[:, -1])
        self.lengths.append(input_ids.shape[1])
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], dim=1)


def test_answers_are_read_from_what_is_generated(tokenizer: Any) -> None:
    rows = [{"prompt": f"{'x' * n}?", "completion": f"so\n#### {n}"} for n in range(1, 5)]
    model = Parrot(tokenizer, "hm\n#### 3")
    before = tokenizer.padding_side
    assert share_right(model, tokenizer, get_task("gsm_symbolic"), rows, 10) == 0.25
    assert all(side.all() for side in model.sides), "padded on the left"
    assert tokenizer.padding_side == before
    assert share_right(Parrot(tokenizer, "no idea"), tokenizer, get_task("gsm_symbolic"), rows, 10) == 0


def test_choices_of_a_model_with_absolute_positions_are_those_of_each_prompt_alone(tokenizer: Any) -> None:
    """Padding would be counted as positions: such a model isn't told where a prompt begins."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config)
    prompts, choices = ["x" * (1 + 7 * n % 20) + "?" for n in range(16)], ("a", "b", "c", "d")
    alone = [scoring._choose(model, tokenizer, choices, [prompt])[0] for prompt in prompts]
    assert scoring._choose(model, tokenizer, choices, prompts) == alone and len(set(alone)) > 1


def test_prompts_of_like_length_go_through_the_model_together(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_BATCH", 2)
    rows = [{"prompt": "x" * n, "completion": f"#### {n}"} for n in (9, 3, 8, 2)]
    model = Parrot(tokenizer, "#### 8")
    assert share_right(model, tokenizer, get_task("gsm_symbolic"), rows, 10) == 0.25
    assert model.lengths == [3, 9]


def test_a_real_model_generates_no_more_than_it_may(tiny_model: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    rows = [{"prompt": "1+1=", "completion": "#### 2"}, {"prompt": "10+10=", "completion": "#### 20"}]
    made, generate = [], model.generate

    def watched(**given: Any) -> torch.Tensor:
        answers: torch.Tensor = generate(**given)
        made.append(answers.shape[1] - given["input_ids"].shape[1])
        return answers

    model.generate = watched
    share_right(model, tokenizer, get_task("gsm_symbolic"), rows, 4)
    assert made and max(made) <= 4
    assert model.training, "left as it was"


class Sure(torch.nn.Module):
    """Finds "y" likely where the prompt has two question marks."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.yes, self.mark = (tokenizer(c)["input_ids"][0] for c in "y?")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> Any:
        logits = torch.zeros(*input_ids.shape, 260)
        logits[..., self.yes] = torch.where((input_ids == self.mark).sum(1) > 1, 1.0, -1.0)[:, None]
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_the_likelier_choice_is_taken(tokenizer: Any) -> None:
    task = Task("t", "t", choices=("n", "y"))
    rows = [{"prompt": p, "completion": c} for p, c in (("a?", "n"), ("b??", "y"), ("c?", "y"))]
    assert math.isclose(share_right(Sure(tokenizer), tokenizer, task, rows, 1), 2 / 3)
    with pytest.raises(ConfigError, match="must begin with different tokens"):
        share_right(Sure(tokenizer), tokenizer, Task("t", "t", choices=("n", "n")), rows, 1)


def test_data_without_prompts(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match='only in data with "prompt" and "completion"'):
        share_right(None, tokenizer, get_task("gsm_symbolic"), [{"text": "x"}], 4)


def test_the_mean_loss_is_that_of_padded_batches_and_whole_logits(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    ids = torch.randint(5, 60, (5, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3, [1] * 7, [1] * 7])
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :3] = labels[1, :1] = labels[3, 2:] = -100  # of the same length, other tokens count
    labels[2] = -100  # an example of which nothing counts
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    trainer: Any = SimpleNamespace(
        model=model,
        get_eval_dataloader=lambda name: [batch] if name == "held_out" else [],
        _prepare_inputs=lambda given: given,
    )
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
    naive = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert math.isclose(mean_loss(trainer, "held_out"), float(naive), rel_tol=1e-6)
    assert model.training, "left as it was"
    torch.nn.init.constant_(model.get_input_embeddings().weight, math.nan)
    with pytest.raises(NonFiniteLossError, match="on the held-out text is nan: training has diverged"):
        mean_loss(trainer, "held_out")


def test_choices_are_scored_in_the_pass_of_the_loss_as_by_themselves(
    tiny_model: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    task = Task("t", "t", choices=("n", "y"))
    prompts = ["Is it so?", "Is it", "Not so?", "Is it no", "a?"]
    rows = [{"prompt": p, "completion": "ny"[i % 2]} for i, p in enumerate(prompts)]
    examples = [
        (tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]) for row in rows
    ]
    end = tokenizer.eos_token_id
    batches = [  # one example each: what follows a choice counts too, and comes before it in none
        {
            "input_ids": torch.tensor([[*before, *after, end]]),
            "labels": torch.tensor([[*[-100] * len(before), *after, end]]),
            "attention_mask": torch.ones(1, len(before) + len(after) + 1, dtype=torch.long),
        }
        for before, after in examples
    ]
    trainer: Any = SimpleNamespace(
        model=model, get_eval_dataloader=lambda name: batches, _prepare_inputs=lambda given: given
    )
    tokens = choice_tokens(tokenizer, task.choices)
    scored = score_held_out(trainer, "held_out", tokens)
    alone = share_right(model, tokenizer, task, rows, 1)
    assert scored.right == alone
    assert 0 < alone < 1, "or it shows nothing"
    assert scored.loss == mean_loss(trainer, "held_out")
    assert score_held_out(trainer, "held_out").right is None, "nobody asked"
    batches[0]["labels"][:, :-1] = -100  # its choice was cut off
    assert score_held_out(trainer, "held_out", tokens).right is None


def test_choices_that_are_no_single_tokens(tokenizer: Any) -> None:
    assert choice_tokens(tokenizer, ("n", "yes")) == []
    with pytest.raises(ConfigError, match="must begin with different tokens"):
        choice_tokens(tokenizer, ("n", "n"))


def test_choices_of_several_tokens_are_scored_as_the_harness_scores_them(
    tiny_model: Path, tokenizer: Any
) -> None:
    """The sum of the log-probabilities of a choice's tokens behind its prompt, each in a pass of its own."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    choices, prompts = (" no", " yes.", " a longer one"), ["Is it?", "Is it not so?"]
    found = choice_likelihoods(model, tokenizer, choices, prompts)
    assert model.training, "left as it was"
    for prompt, row in zip(prompts, found, strict=True):
        for choice, likelihood in zip(choices, row, strict=True):
            before, after = (
                tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, choice)
            )
            with torch.no_grad():
                logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            naive = sum(float(logits[place, token]) for place, token in enumerate(after))
            assert math.isclose(likelihood, naive, rel_tol=1e-4), choice
    best = [choices[max(range(3), key=row.__getitem__)] for row in found]
    rows = [{"prompt": p, "completion": c} for p, c in zip(prompts, best, strict=True)]
    assert share_right(model, tokenizer, Task("t", "t", choices=choices), rows, 1) == 1.0
    rows[0]["completion"] = " no" if best[0] != " no" else " yes."
    assert share_right(model, tokenizer, Task("t", "t", choices=choices), rows, 1) == 0.5


def test_spaces_before_a_choice_go_to_it(tiny_model: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    behind, inside = (
        choice_likelihoods(model, tokenizer, [c], [p]) for c, p in (("no", "Is it? "), (" no", "Is it?"))
    )
    assert behind == inside
