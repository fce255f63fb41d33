"""Arguments of a call: one value for all images or one for each, by the kind of value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from runtime.errors import InputError


def text_list(name: str, value: str | Sequence[str]) -> list[str]:
    """Returns a list of texts, of a single one too.

    Raises:
        InputError: it is no text and no list, or an empty list.
    """
    if not isinstance(value, Iterable):
        raise InputError(f"{name} must be text or a list of texts, got {type(value).__name__}")
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise InputError(f"{name} is an empty list; give at least one")
    return values


def text_for_each(name: str, value: str | Sequence[str], count: int) -> list[str]:
    """Returns a text for each of `count` prompts: a single one repeated, or those of a list."""
    return _of_length(name, [value] * count if isinstance(value, str) else list(value), count)


def whole_number(name: str, value: Any) -> int:
    """Returns an int, of NumPy's integers too."""
    if not isinstance(value, Integral):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(value)


def numbers_for_each(name: str, value: Any, count: int) -> list[float]:
    """Returns a float for each of `count` prompts: a single one repeated, or those of a list or an array."""
    values = list(value) if isinstance(value, Iterable) else [value] * count
    for each in values:
        if not isinstance(each, Real):
            raise InputError(f"{name} must be a number, or one for each prompt, got {each!r}")
    return _of_length(name, [float(each) for each in values], count)


def _of_length(name: str, values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise InputError(f"{name} must be one value or one for each of {count} prompts, got {len(values)}")
    return values
