"""TRL's SFTTrainer, which counts what it cuts, and stops at a loss that is no number or at a signal."""

from __future__ import annotations

import logging
import math
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from layersample.activations.chunked_loss import why_not_chunked
from layersample.activations.save_memory import save_memory
from layersample.checkpoints.seal import find_last
from layersample.errors import ConfigError
from layersample.frozen.weights import find_frozen_weights
from layersample.parallel.agreement import mean_over_ranks, tell_all
from layersample.training.answers import give_template, is_conversation, mark_answers
from layersample.training.sharding import keep_fp32, shard_on_cpu
from layersample.training.trainer_options import own_loss
from layersample.unwrapping import exact_model

logger = logging.getLogger(__name__)

_NAMES = {"train": "training", "eval": "held_out"}  # what SFTTrainer calls the data, and what we do


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; the message says at which step, and which checkpoint is good."""


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved a checkpoint.

    Args:
        signal_number: The signal.
        checkpoint: The checkpoint to resume from.
    """

    def __init__(self, signal_number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal_number}; saved {checkpoint}")
        self.signal_number = signal_number
        self.checkpoint = checkpoint


class CheckedTrainer(SFTTrainer):
    """SFTTrainer that counts what it cuts, and stops at a loss that is no number."""

    def __init__(self, *, train_on: Literal["answers", "all"] = "answers", **kwargs: Any) -> None:
        self._count_from_zero(train_on)
        super().__init__(**kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer does; with shards on the CPU too, gradients added up in fp32, and losses in it."""
        shard_on_cpu(self.args)
        super().create_accelerator_and_postprocess()
        keep_fp32(self.accelerator)

    def _count_from_zero(self, train_on: Literal["answers", "all"]) -> None:
        self.too_long: dict[str, int] = {}  # examples by what they are
        self.lost_answers = 0
        self._train_on = train_on
        self._chunks_loss = False
        self._may_be_empty = False

    @classmethod
    def prepare(
        cls,
        data: Any,
        tokenizer: PreTrainedTokenizerBase,
        train_on: Literal["answers", "all"],
        max_length: int | None = None,
    ) -> Any:
        """Tokens and labels of examples, as a run would have them, without a model.

        Args:
            data: As ``load_data`` gives it.
            tokenizer: The model's; it gets a chat template where it has none.
            train_on: What is learned.
            max_length: Tokens of an example, at most; ``None`` cuts none.
        """
        with tempfile.TemporaryDirectory(prefix="layersample-") as folder:
            arguments = SFTConfig(output_dir=folder, max_length=max_length, report_to="none", use_cpu=True)
        trainer = cls._for_data(data, tokenizer, train_on)
        return trainer._prepare_dataset(data, tokenizer, arguments, False, None, "train")

    @classmethod
    def prepare_chunk(
        cls,
        data: Any,
        tokenizer: PreTrainedTokenizerBase,
        train_on: Literal["answers", "all"],
        arguments: SFTConfig,
    ) -> tuple[Any, int, int]:
        """The same of a part of the examples, beside a Trainer that trains already.

        Args:
            data: As :meth:`prepare` takes it.
            tokenizer: As :meth:`prepare` takes it.
            train_on: What is learned.
            arguments: The Trainer's: new ones would reset what it has set up.

        Returns:
            The tokens and labels, of which nothing may be left; how many examples are cut; and how many answers
            aren't learned.
        """
        trainer = cls._for_data(data, tokenizer, train_on)
        trainer._may_be_empty = True
        ready = trainer._prepare_dataset(data, tokenizer, arguments, False, None, "train")
        return ready, trainer.too_long.get(_NAMES["train"], 0), trainer.lost_answers

    @classmethod
    def _for_data(
        cls, data: Any, tokenizer: PreTrainedTokenizerBase, train_on: Literal["answers", "all"]
    ) -> Any:
        """What preparing data reads of a trainer; a whole one wants the model."""
        trainer: Any = cls.__new__(cls)
        trainer._count_from_zero(train_on)
        trainer._tokenizer, trainer.chat_template = tokenizer, None
        trainer.completion_only_loss = "prompt" in data.column_names and train_on == "answers"
        return trainer

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, name: str
    ) -> Any:
        if not hasattr(dataset, "__len__"):  # streamed, and tokenized as it is read
            return dataset
        if is_conversation(dataset.features):
            give_template(processing_class)
        if "messages" in dataset.column_names and self._train_on == "answers":
            dataset = self._mark(dataset, processing_class, args.dataset_num_proc)
        # Tokenized without a limit first: SFTTrainer takes tokenized data as it is and then cuts it.
        limit, args.max_length = args.max_length, None
        try:
            whole = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, name)
        finally:
            args.max_length = limit
        if limit is not None and not packing:
            self.too_long[_NAMES.get(name, name)] = sum(len(ids) > limit for ids in whole["input_ids"])
        ready = super()._prepare_dataset(whole, processing_class, args, packing, formatting_func, name)
        if not len(ready) and not self._may_be_empty:
            raise ConfigError(
                f"No {_NAMES.get(name, name)} example is left, because the prompts alone fill "
                f"max_length={limit} tokens: raise it."
            )
        return ready

    def _mark(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, processes: int | None) -> Any:
        """Tokens and labels of conversations; TRL learns their every token, unless the template marks answers."""
        columns = dataset.column_names
        marked = dataset.map(
            mark_answers, fn_kwargs={"tokenizer": tokenizer}, remove_columns=columns, num_proc=processes
        )
        self.lost_answers += sum(marked["lost"])
        return marked.remove_columns("lost")

    def chunk_loss(self, positions: int, *, strict: bool = True) -> str | None:
        """Compute the training loss from the logits of some positions at a time.

        Args:
            positions: How many; 0 leaves the Trainer its own loss.
            strict: Whether a model that can't is an error; otherwise it keeps TRL's loss, and the reason is logged.

        Returns:
            The option by which the Trainer computes another loss than the model's: then it keeps that one.
        """
        assert self.model is not None
        if not positions or (other := own_loss(self.args)):
            return other if positions else None
        if not strict and (reason := why_not_chunked(self.model)) is not None:
            logger.warning("The loss isn't computed in chunks. %s", reason)
            return None
        save_memory(self.model, loss_chunk=positions, recompute=False)
        self._chunks_loss = True
        return None

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As SFTTrainer does; with frozen weights once more with their exact values, which will be saved."""
        metrics = super().evaluate(*args, **kwargs)
        assert self.model is not None
        if find_frozen_weights(self.accelerator.unwrap_model(self.model)) is not None:
            with exact_model(self.accelerator.unwrap_model(self.model)):
                metrics |= super().evaluate(*args, **{**kwargs, "metric_key_prefix": "saved"})
        return metrics

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The chunked loss in training, where it is on; else SFTTrainer's own.

        Raises:
            NonFiniteLossError: In training, if the loss is no number; before backward, which may already step.
        """
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[no-untyped-call]
        # SFTTrainer asks for its own fused loss; the Trainer that it extends, for the model's.
        compute = partial(Trainer.compute_loss, self) if self._chunks_loss else super().compute_loss
        loss: Any = compute(model, inputs, *args, **kwargs)
        # On all ranks alike: one that stopped alone would leave the others waiting for it.
        mean = mean_over_ranks(loss.item(), device=self.args.device)
        if not math.isfinite(mean):
            saved = find_last(Path(str(self.args.output_dir)))
            good = f"The last good checkpoint is {saved}." if saved else "There is no checkpoint yet."
            raise NonFiniteLossError(
                f"The loss is {mean} at step {self.state.global_step + 1}, so training stops before this "
                f"step changes any weight. {good} A lower learning rate or float32 may help."
            )
        return loss


class _StopOnSignal(TrainerCallback):
    """Ends training after the step in which a signal came to any rank, with a checkpoint."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.stopped: int | None = None  # by which signal, once it has come to that

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:  # asked twice: at once, without a checkpoint
            raise KeyboardInterrupt
        self.received = number

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        received = [number for number in tell_all(self.received) if number is not None]
        if received:
            self.stopped = received[0]
            control.should_save = True
            control.should_training_stop = True


@contextmanager
def stop_on_signal() -> Iterator[_StopOnSignal]:
    """A callback that ends training at SIGINT or SIGTERM, whose handlers are back as they were afterwards."""
    stop = _StopOnSignal()
    try:
        before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are someone else's
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
