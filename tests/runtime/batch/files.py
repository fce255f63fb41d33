"""Files of jobs in tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

RunCommand = Callable[..., tuple[int, str, str]]
FEW_STEPS = ("--num-inference-steps", 2)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of all files, but for the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
