"""Where a command writes: results to stdout, everything else to stderr; and what all commands have in common there."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def progress_bar(*, transient: bool = False) -> Progress:
    """A bar on stderr for work that counts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr, transient=transient)


def command_group(help_text: str, cls: type[TyperGroup] | None = None) -> typer.Typer:
    """An empty group of commands, plain in its help and its errors."""
    group = typer.Typer(
        cls=cls,
        add_completion=False,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        help=help_text,
    )
    group.callback()(lambda: None)  # without a callback, a group of one command would be that command
    return group
