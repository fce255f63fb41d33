"""Where a command writes: results to stdout, everything else to stderr; and what all commands have in common there."""

from __future__ import annotations

from collections.abc import Iterable

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from runtime.errors import InputError

stdout = Console(highlight=False)
stderr = Console(stderr=True, highlight=False)


def progress_bar(*, transient: bool = False) -> Progress:
    """A bar on stderr for work that counts."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr, transient=transient)


def parse_pairs(texts: Iterable[str] | None, option: str) -> dict[str, str]:
    """`NAME=VALUE` as it stands on a command line, by name.

    Raises:
        InputError: a text without a name or without "=".
    """
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InputError(f"expected {option} NAME=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


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
