"""``layersample chat``: ask the trained model, beside its base if wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.panel import Panel

from layersample.cli.consoles import console, errors, plain
from layersample.cli.quiet import quiet_libraries
from layersample.errors import ConfigError


def chat_command(
    source: Annotated[
        str, typer.Argument(metavar="RUN", help="Folder of a run, or a model as train takes it.")
    ],
    question: Annotated[str | None, typer.Argument(help="What to ask; without it, a conversation.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base's answer beside it.")] = False,
    base: Annotated[str | None, typer.Option(help="The base to compare with. Default: the run's.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    raw: Annotated[
        bool | None,
        typer.Option(
            "--raw/--no-raw",
            show_default=False,
            help="Give the question without the chat template. Default: as the run's data.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**6, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draws above 0.")] = 0,
) -> None:
    """Ask the trained model a question, or talk with it.

    --compare shows what its base says.
    """
    options = {"system": system, "max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    _run(source, question, compare or base is not None, base, raw, options)


def _run(
    source: str,
    question: str | None,
    compare: bool,
    base: str | None,
    raw: bool | None,
    options: dict[str, Any],
) -> None:
    # Seconds of imports that the other commands don't need.
    from layersample.exporting.sources import Trained, find_trained
    from layersample.training.chat import Chat
    from layersample.training.models import load_model

    quiet_libraries()
    trained = find_trained(Path(source)) if Path(source).is_dir() else Trained(Path(source))
    base = base or trained.base
    if compare and base is None:
        raise ConfigError(
            "To compare, the base must be known, but a saved model doesn't name it: give it with --base."
        )
    if raw is None and (raw := _has_plain_prompts(trained.run)):
        errors.print("The run's data had plain prompts, so the question is given as it is.", highlight=False)
    names = {"base": str(base)} if compare else {}
    names["trained"] = str(trained.model)
    chats = {
        title: Chat(*load_model(name, report=_say), raw=bool(raw), **options) for title, name in names.items()
    }
    if question is not None:
        _answer(chats, question)
        return
    while line := _read_line():
        try:
            _answer(chats, line)
        except ConfigError as error:  # too long: what was said before still stands
            errors.print(plain(error), highlight=False, soft_wrap=True)


def _has_plain_prompts(run: Path | None) -> bool:
    path = run / "summary.json" if run is not None else None
    if path is None or not path.is_file():
        return False
    return not json.loads(path.read_text(encoding="utf-8")).get("conversations", True)


def _answer(chats: dict[str, Any], question: str) -> None:
    if len(chats) == 1:
        (chat,) = chats.values()
        chat.ask(
            question,
            lambda piece: console.print(piece, end="", markup=False, highlight=False, soft_wrap=True),
        )
        console.print()
        return
    panels = [
        Panel(plain(chat.ask(question)) or "[dim](nothing)[/]", title=title) for title, chat in chats.items()
    ]
    width = (console.width - len(panels)) // len(panels)
    console.print(Columns(panels, width=width, padding=(0, 1, 0, 0)), highlight=False)


def _read_line() -> str:
    """What the user types; empty where they end the conversation."""
    try:
        return console.input("[bold]You:[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return ""


def _say(sentence: str) -> None:
    errors.print(sentence, markup=False, highlight=False, soft_wrap=True)
