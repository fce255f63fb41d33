"""Where a row's captions come from: a column, the text file beside the image, or its class and prompt templates."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latte.data.images import BadRowError
from latte.data.layouts import CaptionKind
from runtime.errors import InputError, one_line

CAPTION_COLUMNS = (
    "text",
    "caption",
    "captions",
    "prompt",
    "txt",
    "json.text",
    "json.caption",
    "json.captions",
    "json.prompt",
)
"""Columns that are taken for captions, the first that exists; a dot leads into a column of records."""
CLASS_COLUMNS = ("label", "class", "fine_label")
"""Columns that are taken for classes where they have names and there are no captions."""
TEMPLATES = ("a photo of {class}",)
"""The paper's prompt for ImageNet."""
PLACEHOLDER = "{class}"


@dataclass(frozen=True)
class CaptionSource:
    """How to find the captions of a row."""

    kind: CaptionKind
    column: str | None = None
    """Of captions or classes; None where the path of the image says it."""
    templates: tuple[str, ...] = TEMPLATES
    class_names: Mapping[str, tuple[str, ...]] | None = None
    """Names of each class; None where classes are called by their own names."""
    labels: tuple[str, ...] = ()
    """Names of the classes of a column of numbers."""

    def read(self, row: Mapping[str, Any], path: str | None) -> tuple[str, ...]:
        """Returns all captions of a row.

        Args:
            path: the file of the row's image, if it has one.

        Raises:
            BadRowError: there is none.
        """
        if self.kind == "text":
            texts = _lines_of(path)
        elif self.kind == "class":
            texts = [t.replace(PLACEHOLDER, name) for name in self._names_of(row, path) for t in self.templates]
        else:
            cell = cell_of(row, self.column or "")
            texts = [cell] if isinstance(cell, str) else list(cell or ())
        captions = tuple(dict.fromkeys(text.strip() for text in texts if isinstance(text, str) and text.strip()))
        if not captions:
            raise BadRowError("it has no caption")
        return captions

    def _names_of(self, row: Mapping[str, Any], path: str | None) -> tuple[str, ...]:
        if self.column is None:
            label = os.path.basename(os.path.dirname(path or ""))
        else:
            value = row[self.column]
            if value is None or value == -1:  # -1: a row of `datasets` without label
                raise BadRowError("it has no class")
            label = self.labels[value] if self.labels else str(value)
        if self.class_names is None:
            return (label.replace("_", " "),)
        if label not in self.class_names:
            raise BadRowError(f"its class {label!r} has no name")
        return self.class_names[label]


def _lines_of(path: str | None) -> list[str]:
    """Reads the captions in the text file beside an image, one a line."""
    text = Path(path or "").with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise BadRowError(f"there is no {text.name} beside it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadRowError(f"{text.name} cannot be read: {one_line(error)}") from error


def cell_of(row: Mapping[str, Any], column: str) -> Any:
    """Returns the cell of a column; a dot leads into a column of records."""
    cell: Any = row
    for name in column.split("."):
        cell = None if cell is None else cell.get(name)
    return cell


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns the templates.

    Raises:
        InputError: there is none, or one does not contain {class}.
    """
    for template in templates:
        if PLACEHOLDER not in template:
            raise InputError(f"--template must contain {PLACEHOLDER}, got {template!r}")
    if not templates:
        raise InputError(f"at least one --template is needed, such as {TEMPLATES[0]!r}")
    return tuple(templates)


def load_class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads the names of classes from a JSON file: an object from class to name or names, or a list of names.

    Raises:
        InputError: it cannot be read, or contains something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"class names cannot be read from {path}: {one_line(error)}") from error
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    names = {str(key): (value,) if isinstance(value, str) else value for key, value in pairs}
    for key, value in names.items():
        if not isinstance(value, (list, tuple)) or not value or not all(isinstance(name, str) for name in value):
            raise InputError(f"{path}: the class {key!r} must have a name or a list of names, got {json.dumps(value)}")
    if not names:
        raise InputError(f'{path} must be a JSON object such as {{"n01440764": "tench"}}, or a list of names')
    return {key: tuple(value) for key, value in names.items()}
