"""The summary of a run: its figures, for summary.json and the command line, and its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layersample.config import TrainConfig
from layersample.environment import environment
from layersample.plots import plot_active_layers, plot_loss
from layersample.recording import RunRecorder, peak_device_bytes, peak_process_bytes

FILES = ("config.yaml", "metrics.jsonl", "summary.json", "layers.png", "loss.png", "model")


def summarize(
    folder: Path,
    config: TrainConfig,
    recorder: RunRecorder,
    *,
    layers: Sequence[str],
    parameters: int,
    examples: dict[str, int],
) -> dict[str, Any]:
    """Gather what a run measured.

    Args:
        folder: Where it is written.
        config: Its options.
        recorder: Its steps and peaks.
        layers: Names of all layers that it sampled from.
        parameters: Number of the model's parameters; tied ones once.
        examples: Numbers of examples, by what they are.
    """
    steps = [record for record in recorder.records if "loss" in record]
    held_out = [record for record in recorder.records if "held_out_loss" in record]
    trainable = [record["trainable_parameters"] for record in steps]
    visited = {index for record in steps for index in record["active"]}
    return {
        "output": str(folder),
        "files": list(FILES),
        "sampler": config.sampler,
        "model": config.model,
        "data": config.data,
        "steps": len(steps),
        "held_out_loss": {"before": held_out[0]["held_out_loss"], "after": held_out[-1]["held_out_loss"]},
        "examples": examples,
        "parameters": parameters,
        "trainable_parameters": {"mean": sum(trainable) / len(trainable), "max": max(trainable)},
        "layers": list(layers),
        "layers_trained": len(visited),
        "peak_bytes": {
            "process": peak_process_bytes(),
            "device": peak_device_bytes(),
            **asdict(recorder.peak),
        },
        "seconds": {"training": sum(record["seconds"] for record in steps)},
        "environment": environment(),
    }


def write_pictures(folder: Path, summary: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Write ``layers.png`` and ``loss.png`` of a run."""
    steps = [record for record in records if "loss" in record]
    held_out = [record for record in records if "held_out_loss" in record]
    name = f"{summary['sampler']} on {summary['model']}, {summary['data']}"
    plot_active_layers(
        folder / "layers.png",
        summary["layers"],
        [(record["step"], record["active"]) for record in steps],
        f"Layers that trained: {name}",
    )
    plot_loss(
        folder / "loss.png",
        [(record["step"], record["loss"]) for record in steps],
        [(record["step"], record["held_out_loss"]) for record in held_out],
        f"Loss: {name}",
    )
