"""What a model answers: transformers' own generation, behind its tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from layersample.errors import ConfigError
from layersample.lengths import positions_of
from layersample.training.answers import give_template

Message = dict[str, str]


class Chat:
    """A conversation with a model.

    Args:
        model: The model; it is put into eval mode.
        tokenizer: Its tokenizer; one without a chat template gets the plain one that ``train`` gives.
        system: What the model is told first, if anything.
        raw: Whether a question is given as it is, without the template and what was said before.
        max_tokens: Tokens of an answer, at most.
        temperature: 0 always takes the likeliest token.
        seed: Seed of the draws, where the temperature isn't 0.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        raw: bool = False,
        max_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._model, self._tokenizer, self._raw = model.eval(), tokenizer, raw
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        self._said: list[Message] = [{"role": "system", "content": system}] if system else []
        if not raw:
            give_template(tokenizer)

    def ask(self, question: str, tell: Callable[[str], None] | None = None) -> str:
        """The model's answer, which becomes part of the conversation.

        Args:
            question: What the user says.
            tell: Told each piece of the answer as soon as it is there.

        Raises:
            ConfigError: If the conversation is too long for the model. It is then as it was before.
        """
        asked: list[Message] = [*self._said, {"role": "user", "content": question}]
        inputs = self._tokens(question, asked)
        length = inputs["input_ids"].shape[1]
        self._check_length(length)
        streamer = None if tell is None else _Streamer(self._tokenizer, tell)
        torch.manual_seed(self._seed)  # the same question has the same answer
        with torch.inference_mode():
            # generate's own types know neither of its mixins.
            generate: Any = self._model.generate
            drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            if self._temperature:
                drawn = {"do_sample": True, "temperature": self._temperature}
            tokens = generate(
                **inputs,
                max_new_tokens=self._max_tokens,
                streamer=streamer,
                pad_token_id=self._padding(),
                **drawn,
            )
        answer = str(self._tokenizer.decode(tokens[0, length:], skip_special_tokens=True)).strip()
        if not self._raw:
            self._said = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _tokens(self, question: str, asked: list[Message]) -> Any:
        if self._raw:
            tokens = self._tokenizer(question, return_tensors="pt")
        else:
            tokens = self._tokenizer.apply_chat_template(
                asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        kept = ("input_ids", "attention_mask")  # a model takes no other, whatever its tokenizer gives
        return {name: tokens[name].to(self._model.device) for name in kept}

    def _check_length(self, length: int) -> None:
        positions = positions_of(self._model.config)
        if positions is not None and length + self._max_tokens > positions:
            raise ConfigError(
                f"A conversation and its answer must fit the model's {positions} positions, but it has {length} "
                f"tokens and the answer may have {self._max_tokens}: shorten it, or lower --max-tokens."
            )

    def _padding(self) -> int | None:
        ids = (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id)
        return next((token for token in ids if token is not None), None)


class _Streamer(TextStreamer):
    """Gives an answer to a function, word by word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._tell(text)
