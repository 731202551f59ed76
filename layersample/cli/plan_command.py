"""``layersample plan``: the peak memory of a run, before it is run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import typer

from layersample.cli.consoles import console, errors, plain
from layersample.cli.flags import own_option, with_options
from layersample.cli.quiet import quiet_libraries
from layersample.cli.settings import gather_settings
from layersample.files import check_output_file
from layersample.options import Role

_OWN_OPTIONS = (
    own_option(
        "model",
        str,
        inspect.Parameter.empty,
        typer.Argument(help="Built-in shape, folder or hub id; an unknown name lists the shapes."),
    ),
    own_option(
        "gpus", int, 1, typer.Option(min=1, max=10**9, help="GPUs that share the run; --shard says how.")
    ),
    own_option(
        "offload",
        bool,
        False,
        typer.Option("--offload", help="Weights and state in the host's memory, streamed (FSDP2)."),
    ),
    own_option("as_json", bool, False, typer.Option("--json", help="Print JSON; sizes are bytes.")),
    own_option("picture", Path | None, None, typer.Option(help="PNG of stacked bars to write.")),
    own_option("baselines", bool, True, typer.Option(help="Plan the usual ways to train as well.")),
    own_option("advice", bool, True, typer.Option(help="Try what would make the run smaller.")),
)


@with_options(role=Role.MEMORY, leave_out=("trainer_option",), first=_OWN_OPTIONS)
def plan(
    *,
    model: str,
    gpus: int = 1,
    offload: bool = False,
    as_json: bool = False,
    picture: Path | None = None,
    baselines: bool = True,
    advice: bool = True,
    config: Path | None = None,
    preset: str | None = None,
    sampler_option: list[str] | None = None,
    projection_option: list[str] | None = None,
    **flags: Any,
) -> None:
    """Show the peak memory of a run before it is run.

    No GPU and no weights are needed.
    """
    # Seconds of imports that the other commands don't need.
    from layersample.cli.plan_report import print_plan
    from layersample.planning.planner import plan as plan_run
    from layersample.plots import plot_plan
    from layersample.registry import load_plugin

    quiet_libraries()
    settings = gather_settings(
        config, preset, sampler_option, projection_option, None, {**flags, "model": model}
    )
    if picture is not None:
        check_output_file(picture, "picture")
    if settings.plugin is not None:
        load_plugin(settings.plugin)
    with errors.status("Planning") as status:  # seconds a step, on a large model
        planned = plan_run(
            model,
            settings,
            gpus=gpus,
            offload=offload,
            baselines=baselines,
            advice=advice,
            progress=lambda what: status.update(f"Simulating a step: {plain(what)}"),
        )
    if picture is not None:
        plot_plan(picture, planned.to_json(), f"{model}, bytes at the peak")
    if as_json:
        typer.echo(json.dumps(planned.to_json(), indent=2))
    else:
        print_plan(console, planned)
