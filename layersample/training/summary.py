"""The summary of a run: its figures, for summary.json and the command line, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layersample.config import TrainConfig
from layersample.environment import environment
from layersample.plots import plot_active_layers, plot_loss

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "layers.png", "loss.png", "model")


def summarize(
    folder: Path,
    config: TrainConfig,
    records: Sequence[dict[str, Any]],
    *,
    layers: Sequence[str],
    parameters: int,
    examples: Mapping[str, int | None],
    conversations: bool,
    peaks: Sequence[dict[str, int | None]],
) -> dict[str, Any]:
    """Gather what a run measured.

    Args:
        folder: Where it is written.
        config: Its options.
        records: What it wrote of its steps and evaluations.
        layers: Names of all layers, or parts of layers, that it sampled from.
        parameters: Number of the model's parameters; tied ones once.
        examples: Numbers of examples, by what they are; ``None`` where data is read while it trains.
        conversations: Whether the data is made of messages, which the chat template renders.
        peaks: The most bytes that each rank held, by kind.
    """
    steps = [record for record in records if "loss" in record]
    held_out = [record for record in records if "held_out_loss" in record]
    trainable = [record["trainable_parameters"] for record in steps]
    moving = [record["moving_parameters"] for record in steps if "moving_parameters" in record]
    rounds = [record for record in steps if "inclusion_probabilities" in record]
    last_round = {index: record["round"] for record in steps for index in record["active"]}
    as_saved = [record["held_out_loss_as_saved"] for record in records if "held_out_loss_as_saved" in record]
    return {
        "output": str(folder),
        "files": list(FILES),
        "sampler": config.sampler,
        "model": config.model,
        "data": config.data,
        "steps": len(steps),
        "held_out_loss": {"before": held_out[0]["held_out_loss"], "after": held_out[-1]["held_out_loss"]},
        # With frozen weights: held_out_loss is that of the rounded model that trains, this that of the saved one.
        **({"held_out_loss_as_saved": {"before": as_saved[0], "after": as_saved[-1]}} if as_saved else {}),
        "examples": dict(examples),
        "conversations": conversations,
        "parameters": parameters,
        "trainable_parameters": {"mean": sum(trainable) / len(trainable), "max": max(trainable)},
        **({"moving_parameters": {"mean": sum(moving) / len(moving)}} if moving else {}),
        "granularity": config.granularity,
        "layers": list(layers),
        "layers_trained": len(last_round),
        "steps_trained": [sum(index in record["active"] for record in steps) for index in range(len(layers))],
        # Periods since each layer last trained, at the end; and its mean chance to be drawn, computed.
        "staleness": [steps[-1]["round"] - last_round.get(index, -1) for index in range(len(layers))],
        "inclusion_probabilities": _mean([record["inclusion_probabilities"] for record in rounds]),
        # Of the rank that held most; what each of several held follows.
        "peak_bytes": {kind: max(known) if (known := _known(peaks, kind)) else None for kind in peaks[0]},
        **({"ranks": {"shard": config.shard, "peak_bytes": list(peaks)}} if len(peaks) > 1 else {}),
        "seconds": {"training": sum(record["seconds"] for record in steps)},
        "environment": environment(),
    }


def _known(peaks: Sequence[dict[str, int | None]], kind: str) -> list[int]:
    return [value for peak in peaks if (value := peak[kind]) is not None]


def _mean(rows: list[list[float] | None]) -> list[float] | None:
    known = [row for row in rows if row is not None]
    return [sum(column) / len(column) for column in zip(*known, strict=True)] if known else None


def write_pictures(folder: Path, summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write ``layers.png`` and ``loss.png`` of a run."""
    steps = [record for record in records if "loss" in record]
    held_out = [record for record in records if "held_out_loss" in record]
    unit = summary["granularity"]
    name = f"{summary['sampler']} on {summary['model']}, {summary['data']}"
    plot_active_layers(
        folder / "layers.png",
        summary["layers"],
        [(record["step"], record["active"]) for record in steps],
        f"{unit.capitalize()}s that trained: {name}",
        unit=unit,
    )
    plot_loss(
        folder / "loss.png",
        [(record["step"], record["loss"]) for record in steps],
        [(record["step"], record["held_out_loss"]) for record in held_out],
        f"Loss: {name}",
    )
