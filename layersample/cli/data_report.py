"""``layersample data``: what a model would see and learn of a file, before anything is trained."""

from __future__ import annotations

import statistics
from typing import Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from layersample.cli.consoles import console
from layersample.cli.quiet import quiet_libraries
from layersample.config import BUILTIN_MODEL, make_config


def data_command(
    file: Annotated[
        str, typer.Argument(help="Data, as train takes it: files, a folder, a name or a hub id.")
    ],
    model: Annotated[
        str, typer.Option(help="Built-in name, local folder, GGUF file or hub id.")
    ] = BUILTIN_MODEL,
    columns: Annotated[
        str | None, typer.Option(help="Columns under other names: prompt=question,completion=answer.")
    ] = None,
    train_on: Annotated[Literal["answers", "all"], typer.Option(help="What is learned.")] = "answers",
    max_length: Annotated[
        int, typer.Option("--max-length", "--length", help="Tokens of an example, at most.")
    ] = 256,
    examples: Annotated[int, typer.Option(min=1, max=1000, help="Examples to show.")] = 1,
) -> None:
    """Show data as a model would see and learn it.

    The format that is recognized, the first examples, their lengths, and what would be cut.
    """
    # Seconds of imports that the other commands don't need.
    from layersample.training.answers import show_learned, template_columns
    from layersample.training.data import load_data
    from layersample.training.models import load_tokenizer
    from layersample.training.trainer import CheckedTrainer

    quiet_libraries(reads_data=True)
    given: dict[str, Any] = {
        "data": file,
        "model": model,
        "columns": columns or {},
        "train_on": train_on,
        "max_length": max_length,
    }
    config = make_config(("command line", given))
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, config.columns, template_columns(tokenizer))
    console.print(data.info.description, markup=False, highlight=False)
    had_template = tokenizer.chat_template is not None
    whole = CheckedTrainer.prepare(data, tokenizer, config.train_on, None)
    if tokenizer.chat_template is not None and not had_template:
        console.print("The tokenizer has no chat template; train gives it a plain one.")
    for number in range(min(examples, len(whole))):
        row = whole[number]
        console.print(f"\n[bold]Example {number + 1}[/], what is learned in «»:", highlight=False)
        console.print(_marked(show_learned(tokenizer, row["input_ids"], row["labels"])), soft_wrap=True)
    console.print()
    console.print(_lengths(whole, config.max_length))


def _marked(pieces: list[tuple[str, bool]]) -> Text:
    shown = Text()
    for text, learned in pieces:
        shown.append(f"«{text}»" if learned else text, style="green" if learned else "dim")
    return shown


def _lengths(whole: Any, limit: int) -> Table:
    """Tokens of the examples, and what a limit does to them."""
    tokens = [len(ids) for ids in whole["input_ids"]]
    learned = [sum(label >= 0 for label in labels) for labels in whole["labels"]]
    left = [sum(label >= 0 for label in labels[:limit]) for labels in whole["labels"]]
    rows = {
        "examples": f"{len(tokens):,}",
        "tokens of one, smallest / median / largest": f"{min(tokens)} / {statistics.median(tokens):g} / {max(tokens)}",
        "tokens in all": f"{sum(tokens):,}, of which {sum(learned):,} are learned",
        f"cut at --max-length {limit}": f"{sum(count > limit for count in tokens):,}",
        "left out, as nothing learned is left of them": f"{sum(count == 0 for count in left):,}",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"[dim]{name}[/]", value)
    return table
