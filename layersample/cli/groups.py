"""How commands are found and how their help looks: each is imported when it is run, and help fits any terminal."""

from __future__ import annotations

import ast
import re
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.main import get_command

from layersample.options import MOST
from layersample.plugins import COMMANDS, find_file, installed

_NO_LIMIT = re.compile(rf"\b(\S+)<=x<={MOST}(?:\.0)?")


class _Panels:
    """Help that groups options, wraps lines where typer would cut the names of flags, and ends in examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of options."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):  # type: ignore[attr-defined]
            record = parameter.get_help_record(ctx)
            if record is not None:
                usual = "Arguments" if isinstance(parameter, TyperArgument) else "Options"
                flag, text = record
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or usual, []).append(
                    (flag.replace(" range>", ">"), _NO_LIMIT.sub(r"at least \1", text))
                )
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records, col_max=26)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog, lines that a user can type, as they are."""
        if self.epilog:  # type: ignore[attr-defined]
            with formatter.section("Examples"):
                formatter.write_text(f"\b\n{self.epilog}")  # type: ignore[attr-defined]


class PanelCommand(_Panels, TyperCommand):
    """A command of our own."""


class PanelGroup(_Panels, TyperGroup):
    """A command that has commands of its own."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of options, and one for the commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


class Commands(TyperGroup):
    """The commands of layersample and those of installed packages, which are imported when they are run."""

    own: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Of each of our own: its module in ``layersample.cli`` and its function, ``module:function``; then examples."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return [*self.own, *(entry.name for entry in installed(COMMANDS))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name."""
        if cmd_name in self.own:
            place, *examples = self.own[cmd_name]
            return _NotImported(EntryPoint(cmd_name, f"layersample.cli.{place}", COMMANDS), examples)
        return next((_NotImported(entry) for entry in installed(COMMANDS) if entry.name == cmd_name), None)


class _NotImported(TyperCommand):
    """A command that stands for itself in the list of commands until it is run.

    Args:
        entry: A function of ours, or a package's typer application.
        examples: Of a function: lines for the end of its help.
    """

    def __init__(self, entry: EntryPoint, examples: list[str] | None = None) -> None:
        super().__init__(entry.name, help=_first_line(entry))
        self._entry, self._examples = entry, examples

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        loaded = self._entry.load()
        if self._examples is not None:
            function, loaded = loaded, typer.Typer(add_completion=False, rich_markup_mode=None)
            loaded.command(self._entry.name, cls=PanelCommand, epilog="\n".join(self._examples))(function)
        return get_command(loaded).make_context(*args, **kwargs)


def _first_line(entry: EntryPoint) -> str:
    """What a function, or else its module, says of itself, read without running it: that may take torch's seconds."""
    path = find_file(entry.module)
    if path is None:
        return ""
    try:
        module = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # a package's fault, which its own command shows when it is run
        return ""
    functions = (
        node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == entry.attr
    )
    return (ast.get_docstring(next(functions, module)) or "").partition("\n")[0]
