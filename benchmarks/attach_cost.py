"""What attaching layer sampling adds to the start of a Trainer, which must be next to nothing beside its own.

``python -m layersample_benchmarks.attach_cost``
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from layersample import LayerSamplingCallback
from layersample.training.models import load_model

from .store import RESULTS, store

_PARTS = ("the Trainer is made", "attach", "train() to the first step")
_EXAMPLES = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}] * 4


class _FirstStep(TrainerCallback):
    """Notes when the first step begins, behind all that other callbacks do before it."""

    began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = time.process_time()


def start(model: PreTrainedModel, folder: str, *, attached: bool) -> list[float]:
    """CPU seconds of the parts of one start, of all threads; one step follows."""
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=0.0,  # so that all starts are of the same weights
        optim="sgd",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    first = _FirstStep()
    began = time.process_time()
    trainer = Trainer(model, arguments, train_dataset=_EXAMPLES, callbacks=[first])
    made = time.process_time()
    if attached:
        LayerSamplingCallback("lisa", period=1).attach(trainer)
    ready = time.process_time()
    trainer.train()
    return [made - began, ready - made, first.began - ready]


def measure(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Medians of starts without and with layer sampling, in turns; the first of each is left out."""
    model, _ = load_model(folder)
    taken: dict[bool, list[list[float]]] = {False: [], True: []}
    with tempfile.TemporaryDirectory(prefix="layersample-attach-") as scratch:
        for _ in range(rounds + 1):
            for attached, seconds in taken.items():
                seconds.append(start(model, scratch, attached=attached))
    plain, with_sampling = (
        [statistics.median(part) for part in zip(*seconds[1:], strict=True)] for seconds in taken.values()
    )
    return [
        {"what": what, "plain_cpu_seconds": one, "attached_cpu_seconds": other}
        for what, one, other in zip(_PARTS, plain, with_sampling, strict=True)
    ]


def main(
    model: Annotated[str, typer.Option(help="Built-in name or folder.")] = "smollm2-135m",
    rounds: Annotated[int, typer.Option(min=1, help="Starts of each kind.")] = 9,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Measure, print the table, and store it."""
    rows = measure(model, rounds)
    store(
        output,
        "attach_cost",
        {"model": model, "rounds": rounds, "rows": rows},
        title="What layer sampling adds to a Trainer's start",
        about=f"{model}, starts without and with layer sampling (lisa) in turns, medians of {rounds}, CPU "
        "milliseconds of all threads. It includes the trial of the chunked loss, a forward of four tokens.",
        command=f"attach_cost --model {model} --rounds {rounds}",
        headings=("part", "plain", "with layersample", "more"),
        rows=[_cells(row) for row in rows],
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    plain, attached = row["plain_cpu_seconds"], row["attached_cpu_seconds"]
    return (row["what"], *(f"{1e3 * seconds:.1f}" for seconds in (plain, attached, attached - plain)))


if __name__ == "__main__":
    typer.run(main)
