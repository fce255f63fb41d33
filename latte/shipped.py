"""The checkpoints that ship with this package, and with distributions that add some."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

ENTRY_POINTS = "latte_flow.checkpoints"
"""The group of entry points by which a distribution adds checkpoints: a name, and the package with a folder of this
name."""
_OWN = Path(__file__).parent / "checkpoints"


@cache
def shipped_checkpoints() -> dict[str, Path]:
    """Returns the folders of the installed checkpoints by name. A name is accepted wherever a path is."""
    added = {
        entry.name: Path(str(files(entry.module) / entry.name))
        for entry in entry_points(group=ENTRY_POINTS)
        if find_spec(entry.module)  # a distribution may be broken, or half removed
    }
    return added | {name: _OWN / name for name in ("shapes", "shapes-4step")}
