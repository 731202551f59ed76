"""What ten short runs of the benchmark cost, with a process each and with a worker that they share.

``python -m layersample_benchmarks.startup_cost`` trains a tiny model for two steps ten times, in both ways in turns,
and compares their losses, which must be the same to the bit.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .side_by_side.runner import run_suite
from .side_by_side.suite import Suite
from .store import RESULTS, store

_WAYS = {"a process each": False, "one worker": True}


def main(
    runs: Annotated[int, typer.Option(help="Runs of each way.", min=1)] = 10,
    rounds: Annotated[int, typer.Option(help="Times that each way is tried.", min=1)] = 1,
    output: Annotated[Path, typer.Option(help="Folder for the JSON and the table.")] = RESULTS,
) -> None:
    """Measure both, and store them."""
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in _WAYS}
    with tempfile.TemporaryDirectory(prefix="layersample-startup-") as scratch:
        suite = tiny_suite(Path(scratch), runs)
        for turn in range(rounds):
            for name, keep in _WAYS.items():
                measured[name].append(measure(suite, Path(scratch) / f"{name}-{turn}", keep_workers=keep))
    losses = {json.dumps(one["losses"]) for tries in measured.values() for one in tries}
    rows = [
        [
            name,
            *(
                f"{_mean([one[key] for one in tries]) / (runs if part else 1):.1f}"
                for key in ("cpu_seconds", "wall_seconds")
                for part in (False, True)
            ),
        ]
        for name, tries in measured.items()
    ]
    store(
        output,
        "startup_cost",
        {"runs": runs, "rounds": rounds, "same_losses": len(losses) == 1, "ways": measured},
        title="Ten short runs" if runs == 10 else f"{runs} short runs",
        about=f"{runs} runs of two steps of a model of {measured['one worker'][0]['parameters']:,} parameters, one "
        f"after the other; mean of {rounds}. CPU seconds of all processes.",
        command=f"startup_cost --runs {runs} --rounds {rounds}",
        headings=("way", "CPU s", "CPU s a run", "wall s", "wall s a run"),
        rows=rows,
        notes=[
            "The losses of all runs are the same to the bit." if len(losses) == 1 else "The losses differ."
        ],
    )


def tiny_suite(folder: Path, runs: int) -> Suite:
    """A suite of one method with as many seeds, whose model and data are made in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<pad>", "<eos>", *map(str, range(200))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "model"
    )
    shape = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(shape).save_pretrained(folder / "model")
    sums = [{"prompt": f"{a} {b} ", "completion": f"{a + b}"} for a in range(20) for b in range(20)]
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in sums), encoding="utf-8")
    return Suite(
        model=str(folder / "model"),
        task=str(data),
        other_text=str(data),
        methods=["lisa"],
        seeds=list(range(runs)),
        steps=2,
        learning_rates=[1e-3],
        validation_size=8,
        test_size=8,
        other_size=8,
        answers=0,
        evaluations=1,
        max_length=16,
        threads=1,
    )


def measure(suite: Suite, folder: Path, *, keep_workers: bool) -> dict[str, Any]:
    """CPU and wall seconds of a benchmark's processes, and the losses that they ended with."""
    before, started = _children(), time.perf_counter()
    results = run_suite(suite, folder, keep_workers=keep_workers)
    lines = results.lines()
    if failed := [line["error"] for line in lines if "error" in line]:
        raise RuntimeError(failed[0])
    return {
        "cpu_seconds": _children() - before,
        "wall_seconds": time.perf_counter() - started,
        "parameters": lines[0]["parameters"],
        "losses": [line["loss"]["held_out"] for line in lines],
    }


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(main)
