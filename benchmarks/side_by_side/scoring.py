"""How good a model is: its loss on text, and how many of its answers are right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase, Trainer

from layersample.errors import ConfigError
from layersample.training.trainer import NonFiniteLossError

from .tasks import Task, right_answers

_BATCH = 16
_TOKENS = 512  # of a batch whose loss is measured


@dataclass(frozen=True)
class HeldOut:
    """How good a model is on held-out examples.

    Args:
        loss: In nats a token.
        right: The share whose likeliest choice is the right one; ``None`` where choices aren't scored with the loss.
    """

    loss: float
    right: float | None


def mean_loss(trainer: Trainer, name: str) -> float:
    """The loss on one of the trainer's evaluation sets, in nats a token, as :func:`score_held_out` has it."""
    return score_held_out(trainer, name).loss


def score_held_out(trainer: Trainer, name: str, choices: Sequence[int] = ()) -> HeldOut:
    """The loss on one of the trainer's evaluation sets and, where completions are choices, the share of right ones.

    The mean over all tokens that count, where the Trainer's own would be a mean of the batches' means. Examples of the
    same length go through the model together, so that nothing is padded, and through its head only where a token of
    one of them counts. That is where the choices are as well, so they cost no pass of their own.

    Args:
        trainer: Its model and its evaluation sets.
        name: Name of the set.
        choices: The tokens to choose from, one a choice. An example that counts none of them first leaves the share
            unknown.

    Raises:
        NonFiniteLossError: If the loss is no number: no mean over seeds, and no rate, could be told from it.
    """
    total, tokens = 0.0, 0
    hits: list[bool | None] = []
    model: Any = trainer.model
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for ids, labels in _equally_long(trainer, name):
            targets = labels[:, 1:]  # the first token has nothing before it to follow from
            counted = (targets != -100).any(0).nonzero().flatten()
            logits = model(ids, logits_to_keep=counted, use_cache=False).logits
            # logits: (examples, tokens that count in one of them, vocabulary)
            wanted = targets[:, counted]
            total += float(F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="sum"))
            tokens += int((wanted != -100).sum())
            if choices:
                hits += _hits(logits, wanted, choices)
    model.train(was_training)
    if not math.isfinite(total):
        raise NonFiniteLossError(
            f"The loss on the {name.replace('_', '-')} text is {total}: training has diverged. A lower learning rate "
            "may help."
        )
    known = [hit for hit in hits if hit is not None]
    return HeldOut(total / tokens, sum(known) / len(known) if known and len(known) == len(hits) else None)


def _hits(logits: torch.Tensor, wanted: torch.Tensor, choices: Sequence[int]) -> list[bool | None]:
    """Whether the likeliest choice is the first token that counts; ``None`` where that is no choice.

    Args:
        logits: (examples, tokens, vocabulary).
        wanted: (examples, tokens), -100 where a token doesn't count.
        choices: Token ids.
    """
    if not wanted.shape[1]:
        return [None] * len(wanted)
    first = (wanted != -100).int().argmax(1)  # of the True ones; 0 where there is none
    examples = torch.arange(len(wanted), device=wanted.device)
    right = wanted[examples, first].tolist()
    likeliest = logits[examples, first][:, list(choices)].argmax(-1).tolist()
    return [
        choices[i] == token if token in choices else None for i, token in zip(likeliest, right, strict=True)
    ]


def _equally_long(trainer: Trainer, name: str) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of an evaluation set, both (examples, tokens), in batches without padding."""
    by_length: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for batch in trainer.get_eval_dataloader(name):
        inputs = trainer._prepare_inputs(batch)
        for ids, labels, mask in zip(
            inputs["input_ids"], inputs["labels"], inputs["attention_mask"].bool(), strict=True
        ):
            by_length.setdefault(int(mask.sum()), []).append((ids[mask], labels[mask]))
    for length, examples in sorted(by_length.items()):
        together = max(1, _TOKENS // length)
        for i in range(0, len(examples), together):
            ids, labels = zip(*examples[i : i + together], strict=True)
            yield torch.stack(ids), torch.stack(labels)


def share_right(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Iterable[dict[str, Any]],
    max_new_tokens: int,
) -> float:
    """The share of problems that a model answers right, by greedy generation or by the likelier choice.

    Args:
        model: The model, wrapped or not.
        tokenizer: Its tokenizer.
        task: Says how an answer is read, or what there is to choose from.
        rows: Problems with ``prompt`` and ``completion``, both text.
        max_new_tokens: Tokens of an answer, at most.

    Raises:
        ConfigError: If the data has no prompts and completions, or a right answer can't be read.
    """
    problems = list(rows)
    right = right_answers(task, problems)
    # Prompts of like length go through the model together, so that little is padded.
    order = sorted(range(len(problems)), key=lambda i: len(problems[i]["prompt"]))
    prompts = [problems[i]["prompt"] for i in order]
    given: Sequence[str | None]
    if task.read_answer is None:
        given = _choose(model, tokenizer, task.choices, prompts)
    else:
        given = [task.read_answer(text) for text in _generate(model, tokenizer, prompts, max_new_tokens)]
    hits: int = sum(g is not None and g == right[i] for g, i in zip(given, order, strict=True))
    return hits / len(problems)


def _generate(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str], max_new_tokens: int
) -> list[str]:
    texts: list[str] = []
    for inputs in _batches(model, tokenizer, prompts):
        generated = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = generated[:, inputs["input_ids"].shape[1] :]  # (problems, new tokens)
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def _choose(
    model: Any, tokenizer: PreTrainedTokenizerBase, choices: Sequence[str], prompts: list[str]
) -> list[str]:
    """The likeliest choice behind each prompt, as lm-evaluation-harness takes it: by the sum over its tokens."""
    tokens = choice_tokens(tokenizer, choices)
    if not tokens:
        scores = choice_likelihoods(model, tokenizer, choices, prompts)
        return [choices[max(range(len(choices)), key=row.__getitem__)] for row in scores]
    # Equally long ones together: models with absolute positions would count padding, where generate() tells them.
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(tokenizer(prompts)["input_ids"]):
        by_length.setdefault(len(ids), []).append(index)
    chosen: dict[int, str] = {}
    for indices in by_length.values():
        found: list[int] = []
        for inputs in _batches(model, tokenizer, [prompts[index] for index in indices]):
            # Of single tokens, the likeliest has the highest logit.  (problems, choices)
            logits = model(**inputs, logits_to_keep=1).logits[:, -1, tokens]
            found += logits.argmax(-1).tolist()
        chosen |= {index: choices[i] for index, i in zip(indices, found, strict=True)}
    return [chosen[index] for index in range(len(prompts))]


def choice_tokens(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> list[int]:
    """The token of each choice; none where one of them is longer, and the choices must be scored as texts.

    Raises:
        ConfigError: If two choices are the same token.
    """
    ids = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    if any(len(of_one) != 1 for of_one in ids):
        return []
    tokens = [of_one[0] for of_one in ids]
    if len(set(tokens)) < len(tokens):
        raise ConfigError(f"The choices must begin with different tokens, but {', '.join(choices)} don't.")
    return tokens


def choice_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, choices: Sequence[str], prompts: Iterable[str]
) -> list[list[float]]:
    """The log-likelihood of each choice behind each prompt, summed over its tokens, in nats.

    A prompt goes through the model once; all choices go on from what its layers hold of it.

    Args:
        model: The model, wrapped or not.
        tokenizer: Its tokenizer.
        choices: The texts to choose from.
        prompts: What they stand behind.

    References:
        lm-evaluation-harness, ``TemplateLM._encode_pair`` and ``HFLM._loglikelihood_tokens``.
    """
    was_training = model.training
    model.eval()
    with torch.no_grad():
        rows = [_likelihoods_behind(model, tokenizer, choices, prompt) for prompt in prompts]
    model.train(was_training)
    return rows


def _likelihoods_behind(
    model: Any, tokenizer: PreTrainedTokenizerBase, choices: Sequence[str], prompt: str
) -> list[float]:
    pairs = [_encode_pair(tokenizer, prompt, choice) for choice in choices]
    given = pairs[0][0]  # the same before each choice
    begun = model(torch.tensor([given], device=model.device), use_cache=True, logits_to_keep=1)
    longest = max(len(ids) for _, ids in pairs)
    # Padded behind, where causal attention doesn't look; (choices, longest)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in pairs], device=model.device)
    first = begun.logits[:, -1:].expand(len(choices), -1, -1)
    cache = begun.past_key_values
    cache.batch_repeat_interleave(len(choices))
    rest = model(ids[:, :-1], past_key_values=cache, use_cache=True).logits if longest > 1 else first[:, :0]
    logits = torch.cat([first, rest], dim=1).float().log_softmax(-1)  # (choices, longest, vocabulary)
    found = logits.gather(-1, ids[..., None])[..., 0]
    return [float(row[: len(own)].sum()) for row, (_, own) in zip(found, pairs, strict=True)]


def _encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Tokens of a context and of what stands behind it, cut where the harness cuts: spaces go to the second."""
    bare = context.rstrip()
    whole = tokenizer(context + continuation)["input_ids"]
    before = tokenizer(bare)["input_ids"]
    end = tokenizer.eos_token_id
    whole, before = (
        [*ids[:-1]] if ids and ids[-1] == end and len(ids) > 1 else [*ids] for ids in (whole, before)
    )
    return before, whole[len(before) :]


def _batches(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> Iterable[dict[str, torch.Tensor]]:
    """Prompts in batches, padded on the left, so that all of them end at the same place."""
    before, tokenizer.padding_side = tokenizer.padding_side, "left"
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for i in range(0, len(prompts), _BATCH):
                # With the special tokens that stand before text, as in training, but none that end it.
                batch = tokenizer(prompts[i : i + _BATCH], return_tensors="pt", padding=True)
                given = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
                end = tokenizer.eos_token_id
                ended = end is not None and bool((given["input_ids"][:, -1] == end).all())
                yield {key: ids[:, :-1] for key, ids in given.items()} if ended else given
    finally:
        tokenizer.padding_side = before
        model.train(was_training)
