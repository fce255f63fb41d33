"""What all commands share: results go to stdout and everything else to stderr, plus helpers for options."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from runtime.errors import InputError

ValueT = TypeVar("ValueT")
WIDTH_OF_A_FILE = 200
"""Columns of what goes to a file or a pipe. Rich would take 80, and cut the numbers of wide tables."""


def _console(*, to_stderr: bool) -> Console:
    console = Console(stderr=to_stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDTH_OF_A_FILE
    return console


stdout = _console(to_stderr=False)
stderr = _console(to_stderr=True)


def progress_bar(*, transient: bool = False) -> Progress:
    """Returns a progress bar on stderr, for work of known length."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=stderr, transient=transient)


def parse_pairs(texts: Iterable[str] | None, option: str) -> dict[str, str]:
    """Parses options of the form `NAME=VALUE`.

    Args:
        option: the option's name, for messages.

    Raises:
        InputError: a text has no name or no "=".
    """
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InputError(f"expected {option} NAME=VALUE, got {text!r}")
        pairs[name] = value
    return pairs


def renamed_option(
    old: str, old_value: ValueT | None, new: str, value: ValueT, default: ValueT | None = None
) -> ValueT:
    """Returns the value of an option that was renamed; its old, hidden name still works and says so.

    Raises:
        InputError: both were given.
    """
    if old_value is None:
        return value
    if value != default:
        raise InputError(f"{old} is the old name of {new}; give {new} only")
    stderr.print(f"note: {old} is now {new}; the old name will be removed in the next release", markup=False)
    return old_value


def command_group(help_text: str, cls: type[TyperGroup] | None = None) -> typer.Typer:
    """Returns an empty group of commands with plain help and plain errors."""
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
