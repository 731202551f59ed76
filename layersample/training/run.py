"""A run whose input is loaded: it trains, and writes what comes of it into its folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from layersample.bf16_products import fast_products
from layersample.checkpoints.seal import find_last, step_of
from layersample.config import TrainConfig, write_yaml
from layersample.errors import short
from layersample.exporting.cards import CARD, model_card
from layersample.exporting.sources import MODEL
from layersample.files import replace_folder, write_json, write_text
from layersample.integrations.transformers import LayerSamplingCallback
from layersample.parallel.agreement import tell_all
from layersample.sampling.pace import PROGRESS
from layersample.training.answers import is_conversation, show_learned
from layersample.training.arguments import callback_arguments
from layersample.training.ranks import Ranks
from layersample.training.recording import (
    Progress,
    RunRecorder,
    peak_device_bytes,
    peak_process_bytes,
    read_records,
)
from layersample.training.resuming import note_ranks
from layersample.training.streaming import StreamedRows, tokenize_stream
from layersample.training.summary import summarize, write_pictures
from layersample.training.trainer import CheckedTrainer, Interrupted, stop_on_signal
from layersample.training.trainer_options import naming_options

Report = Callable[[str], None]

_LOST = "answers aren't learned, because the chat template renders them differently once others follow."
_COMPARED = 256  # examples of streamed data by which ranks see whether they read the same

# What the Trainer and TRL set in a model's configuration for their own training, which is none of the model's.
_SET_BY_TRAINERS = ("use_cache", "pad_token_id", "output_router_logits", "router_aux_loss_coef")


class Run:
    """A run: its trainer, its recorder and its callback, and the folder it writes to.

    Args:
        config: Its options.
        folder: Where it is written, by the first rank.
        ranks: The processes of the run.
        data: The training data and the held-out data.
        model: The model.
        tokenizer: Its tokenizer.
        arguments: The Trainer's.
        checkpoint: The one to resume from.
        progress: Shows each step.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        ranks: Ranks,
        *,
        data: tuple[Dataset | StreamedRows, Dataset],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        arguments: SFTConfig,
        checkpoint: Path | None,
        progress: Progress | None,
    ) -> None:
        self.config, self.folder, self.tokenizer, self.checkpoint = config, folder, tokenizer, checkpoint
        self.ranks = ranks
        self.train_data, self.held_out_data = data
        self.as_it_came = _noted(model.config)
        self.sampling = LayerSamplingCallback(**callback_arguments(config))
        metrics, before = folder / "metrics.jsonl", list[dict[str, Any]]()
        if checkpoint is not None:
            last_step = step_of(checkpoint)
            before = ranks.on_first(lambda: read_records(metrics, last_step))
        if ranks.first:
            # A later --resume takes what the run is from here; how it was begun is the command's own.
            own = config.model_copy(update={"resume": False, "overwrite": False, "allow_changes": False})
            write_text(folder / "config.yaml", write_yaml(own))
            note_ranks(folder, ranks.count)
        self.recorder = RunRecorder(
            metrics if ranks.first else None,
            lambda: self.sampling.scheduler,
            records=before,
            progress=progress,
        )
        had_template = tokenizer.chat_template is not None
        train_data: Any = self.train_data
        if isinstance(train_data, StreamedRows):
            train_data = tokenize_stream(train_data, tokenizer, arguments, config.train_on, config.run_seed)
        with naming_options(config.trainer or {}):
            self.trainer = CheckedTrainer(
                model=model,
                args=arguments,
                train_dataset=train_data,
                eval_dataset=self.held_out_data,
                processing_class=tokenizer,
                callbacks=[self.recorder],
                train_on=config.train_on,
            )
        self.gave_template = tokenizer.chat_template is not None and not had_template
        self.own_loss = self.trainer.chunk_loss(
            config.chunk_positions or 0, strict=config.loss_chunk != "auto"
        )
        for callback in self.trainer.callback_handler.callbacks:
            # TensorBoard's files lie beside the run's, not among its checkpoints.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / "tensorboard")
        self.trainer.remove_callback(PrinterCallback)
        # RunFolder has verified the checkpoint, before anything was loaded.
        self.sampling.attach(self.trainer, verify=False)
        self.trainer.callback_handler.callbacks.insert(0, self.recorder.clock)
        if ranks.count > 1:
            prepared = {
                "training data": self.trainer.train_dataset,
                "held-out data": self.trainer.eval_dataset,
            }
            ranks.compare("data", {name: _describe(rows) for name, rows in prepared.items()})

    def say_what_is_learned(self, report: Report) -> None:
        """Report what became of the data, and by which loss it is learned."""
        if self.own_loss:
            report(
                f"The loss is TRL's own, by the Trainer's option {self.own_loss}: loss_chunk has no effect on it."
            )
        if self.gave_template:
            report(
                "The tokenizer has no chat template, so it gets a plain one: User: …, Assistant: …, end of text."
            )
        if self.trainer.lost_answers:
            report(f"{self.trainer.lost_answers} {_LOST}")
        for name, count in self.trainer.too_long.items():
            if count:
                kind = name.replace("_", "-")
                report(
                    f"{count} {kind} examples are longer than {self.config.max_length} tokens and are cut."
                )
        first = next(iter(self.trainer.train_dataset))  # type: ignore[arg-type]
        pieces = show_learned(self.tokenizer, first["input_ids"], first["labels"])
        shown = "".join(f"«{text}»" if learned else text for text, learned in pieces)
        report(f"The first example, with what is learned in «»: {short(shown, 400)}")

    def say_what_was_cut(self, report: Report) -> None:
        """Report at the end what only then is known of data that is read while it trains."""
        if not isinstance(self.train_data, StreamedRows):
            return
        count = self.train_data.count
        if count.lost_answers:
            report(f"{count.lost_answers} {_LOST}")
        if count.cut:
            report(
                f"Of {count.read} training examples that were read, {count.cut} are longer than "
                f"{self.config.max_length} tokens and were cut."
            )

    def train(self) -> None:
        """Train, and measure the held-out loss before and after.

        Raises:
            Interrupted: If a signal came, with a checkpoint saved.
        """
        # Not before training begins: the scheduler checks the model first, and takes seconds to say no.
        measured = any("held_out_loss" in record for record in self.recorder.records)
        self.trainer.args.eval_on_start = not measured
        with stop_on_signal() as stop, self._products():
            self.trainer.add_callback(stop)
            self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
        if stop.stopped is not None:
            saved = find_last(Path(str(self.trainer.args.output_dir)))
            assert saved is not None
            raise Interrupted(stop.stopped, saved)
        # The Trainer may have evaluated the last step; but what it has loaded since is the best one's model.
        state = self.trainer.state
        loaded = self.trainer.args.load_best_model_at_end and state.best_global_step != state.global_step
        if loaded or not any("held_out_loss" in record for record in self.recorder.records[-2:]):
            with self._products():
                self.trainer.evaluate()

    def _products(self) -> AbstractContextManager[None]:
        """Products of bf16 in fp32, where the processor asks for it; what is compiled doesn't go with it."""
        assert self.trainer.model is not None
        if self.trainer.args.torch_compile:
            return nullcontext()
        mixed = self.config.precision == "bf16-mixed"
        return fast_products(self.trainer.model, PROGRESS.info, mixed=mixed)

    def save_model(self) -> None:
        """Write the model into ``model/``, in the precision that the configuration asks for."""
        assert self.sampling.scheduler is not None
        trained = self.trainer.accelerator.unwrap_model(self.trainer.model)
        for part, values in zip(_parts(trained.config), self.as_it_came, strict=True):
            for key, value in values.items():
                setattr(part, key, value)
        exact = self.config.save_precision == "fp32"
        weights = None
        if self.config.shard is not None:  # from all ranks, on the first
            weights = self.trainer.accelerator.get_state_dict(self.trainer.model)
            if exact:
                weights = {n: w.float() if w.is_floating_point() else w for n, w in weights.items()}
        elif exact:
            weights = self.sampling.scheduler.fp32_state_dict()
        if self.ranks.first:
            _save_model(trained, weights, self.tokenizer, self.folder / MODEL, fp32=exact)
        self.ranks.wait()

    def write_summary(self) -> dict[str, Any]:
        """Write ``summary.json`` and the pictures, and return the summary, on all ranks."""
        own = {
            "process": peak_process_bytes(),
            "device": peak_device_bytes(),
            **asdict(self.recorder.peak),
        }
        peaks = tell_all(own)
        return self.ranks.on_first(lambda: self._write_summary(peaks))

    def _count_examples(self) -> dict[str, int | None]:
        cut = {f"{name}_cut_to_max_length": count for name, count in self.trainer.too_long.items()}
        counts = {"held_out": len(self.held_out_data), **cut}
        if not isinstance(self.train_data, StreamedRows):
            return {"training": len(self.train_data), **counts}
        # How many there are isn't known; those that were read are a window more than those that trained.
        count = self.train_data.count
        return {
            "training": None,
            **counts,
            "training_read": count.read,
            "training_cut_to_max_length": count.cut,
        }

    def _write_summary(self, peaks: list[dict[str, Any]]) -> dict[str, Any]:
        assert self.sampling.scheduler is not None and self.trainer.model is not None
        summary = summarize(
            self.folder,
            self.config,
            self.recorder.records,
            layers=self.sampling.scheduler.layers,
            parameters=sum(p.numel() for p in self.trainer.model.parameters()),
            examples=self._count_examples(),
            conversations=is_conversation(self.held_out_data.features),
            peaks=peaks,
        )
        summary["period"] = self.sampling.scheduler.period
        if self.sampling.scheduler.frozen is not None:
            summary["frozen_weights"] = self.sampling.scheduler.frozen.describe()
        write_pictures(self.folder, summary, self.recorder.records)
        write_json(self.folder / "summary.json", summary)
        write_text(self.folder / MODEL / CARD, model_card(self.config, summary))
        return summary


def _describe(rows: Iterable[Mapping[str, Any]] | Any) -> str:
    """What a rank has for data, in a few words that differ where one token does."""
    digest, count = hashlib.sha256(), 0
    for row in rows if hasattr(rows, "__len__") else islice(rows, _COMPARED):
        digest.update(json.dumps([row["input_ids"], row.get("labels")]).encode())
        count += 1
    return f"{count} examples ({digest.hexdigest()[:8]})"


def _save_model(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    target: Path,
    *,
    fp32: bool,
) -> None:
    with tempfile.TemporaryDirectory(prefix=".model-", dir=target.parent) as scratch:
        whole = Path(scratch) / "model"
        model.save_pretrained(whole, state_dict=weights)
        if fp32:  # save_pretrained notes the type that the model has
            config = AutoConfig.from_pretrained(whole)
            config.dtype = torch.float32
            config.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        replace_folder(whole, target)


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    """A configuration and, of a model with a part for text, that part's: the same one where there is none."""
    return [config, config.get_text_config()]


def _noted(config: PretrainedConfig) -> list[dict[str, Any]]:
    """What is there, in each part, of all that trainers set."""
    return [
        {key: getattr(part, key) for key in _SET_BY_TRAINERS if hasattr(part, key)} for part in _parts(config)
    ]
