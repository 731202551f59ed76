"""How commands are found and how their help looks: packages add commands, and help fits any terminal."""

from __future__ import annotations

import ast
import re
from importlib.metadata import EntryPoint
from typing import Any

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

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        return [*super().list_commands(ctx), *(entry.name for entry in installed(COMMANDS))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name."""
        own = super().get_command(ctx, cmd_name)
        if own is not None:
            return own
        return next((_Installed(entry) for entry in installed(COMMANDS) if entry.name == cmd_name), None)


class _Installed(TyperCommand):
    """A package's command, which stands for itself in the list of commands until it is run."""

    def __init__(self, entry: EntryPoint) -> None:
        super().__init__(entry.name, help=_first_line(entry))
        self._entry = entry

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        return get_command(self._entry.load()).make_context(*args, **kwargs)


def _first_line(entry: EntryPoint) -> str:
    """What a module says of itself, read without running it: that may take the seconds that torch takes."""
    path = find_file(entry.module)
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) if path is not None else None
    return (text or "").partition("\n")[0]
