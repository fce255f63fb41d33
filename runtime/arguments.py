"""Arguments of a call: one value for all images or one for each, by the kind of value.

All functions raise `InputError` for a value of another kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

from runtime.errors import InputError


def text_list(name: str, value: str | Sequence[str]) -> list[str]:
    """Returns a list of texts, of a single one too; an empty list is refused."""
    if not isinstance(value, Iterable):
        raise InputError(f"{name} must be text or a list of texts, got {type(value).__name__}")
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise InputError(f"{name} is an empty list; give at least one")
    for each in values:
        if not isinstance(each, str):
            raise InputError(f"{name} must be text or a list of texts, got a list with {type(each).__name__}")
    return values


def text_for_each(name: str, value: str | Sequence[str], count: int) -> list[str]:
    """Returns a text for each of `count` prompts: a single one repeated, or those of a list."""
    return _of_length(name, [value] * count if isinstance(value, str) else text_list(name, value), count)


def whole_number(name: str, value: Any) -> int:
    """Returns an int, of NumPy's integers too."""
    number = _item(value)
    if not isinstance(number, Integral) or isinstance(number, bool):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    return int(number)


def real_number(name: str, value: Any) -> float:
    """Returns a float, of NumPy's numbers too."""
    number = _item(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        raise InputError(f"{name} must be a number, got {value!r}")
    try:
        return float(number)
    except OverflowError as error:
        raise InputError(f"{name} must be a number of 64 bits, got one of {len(str(number))} digits") from error


def numbers_for_each(name: str, value: Any, count: int) -> list[float]:
    """Returns a float for each of `count` prompts: a single one repeated, or those of a list or an array."""
    if not _is_list(value):
        return [real_number(name, value)] * count
    return _of_length(name, [real_number(name, each) for each in value], count)


def seeds_for_each(name: str, value: Any, count: int) -> list[int]:
    """Returns a seed for each of `count` images: s, s + 1, … of a single one, or those of a list or an array."""
    if not _is_list(value):
        return [whole_number(name, value) + i for i in range(count)]
    seeds = [whole_number(name, each) for each in value]
    if len(seeds) != count:
        raise InputError(f"{name} must be one number or one for each of {count} images, got {len(seeds)}")
    return seeds


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0


def _item(value: Any) -> Any:
    """Returns the number of an array or a tensor without axes, and any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _of_length(name: str, values: list[Any], count: int) -> list[Any]:
    if len(values) != count:
        raise InputError(f"{name} must be one value or one for each of {count} prompts, got {len(values)}")
    return values
