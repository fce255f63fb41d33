"""Where inputs and outputs are: a path of this machine, or a URL such as `s3://bucket/rows.jsonl`.

URLs are fsspec's. Its library for a kind of store takes endpoints and credentials from where that library always does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import unquote

from runtime.errors import InputError, LatteFlowError, MissingExtraError, one_line
from runtime.files import sha256_of

if TYPE_CHECKING:
    from upath import UPath

_LOCAL = ("file", "local")
"""Kinds of URLs that are paths. Files written by fsspec are not complete when they get their names."""

Place: TypeAlias = "Path | UPath"


def is_url(text: str) -> bool:
    """Returns whether a text names something that is not a path of this machine."""
    return "://" in text


def place_of(text: str) -> Place:
    """Returns the place that a text names; a `file://` URL is a path of this machine.

    Raises:
        InputError: there is no such kind of URL, or it names another machine.
        MissingExtraError: the library for it is not installed.
    """
    if not is_url(text):
        return Path(text)
    kind, _, rest = text.partition("://")
    if kind.lower() in _LOCAL:
        host, _, path = rest.partition("/")
        if host not in ("", "localhost") or "\0" in unquote(path):
            raise InputError(f"{text} must name a file of this machine by its whole path: {kind}:///PATH")
        return Path("/" + unquote(path))
    try:
        from upath import UPath

        place = UPath(text, use_listings_cache=False)  # others write there too
        _ = place.fs  # the library is imported here
    except ImportError as error:
        extra = "s3" if text.startswith("s3") else "batch"
        raise MissingExtraError(f'{text}: {one_line(error)}; run: pip install "latte-flow[{extra},cpu]"') from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{text} is not a URL that can be used: {one_line(error)}") from error
    return place


def is_remote(place: Place) -> bool:
    """Returns whether a place is a URL."""
    return not isinstance(place, Path)


def reason_of(error: OSError) -> str:
    """Returns what an error says, for the middle of a line."""
    return (error.strerror or one_line(error)).rstrip(".")


@contextmanager
def os_errors(place: Place) -> Iterator[None]:
    """Turns what goes wrong at a URL into an `OSError`: each library has errors of its own."""
    try:
        yield
    except (OSError, LatteFlowError):
        raise
    except Exception as error:
        if not is_remote(place):
            raise
        raise OSError(one_line(error)) from error


def hash_of_file(place: Place) -> str:
    """Returns a hash of a file's content, or at a URL the checksum that its store has."""
    return sha256_of(place) if isinstance(place, Path) else str(place.fs.checksum(place.path))


def files_below(folder: Place, suffixes: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yields name and size of the files with certain endings in a folder and the folders below, by name.

    Names are relative to the folder. Those that begin with a dot are left out. Links to folders are followed to folders
    that were not visited yet, so that a loop ends. A file that is not there, such as a broken link's, has size 0.
    """
    if isinstance(folder, Path):
        yield from _files_below(folder, "", suffixes, set())
        return
    root = folder.path.rstrip("/") + "/"
    sizes = {
        path.removeprefix(root): int(info["size"] or 0) for path, info in folder.fs.find(root, detail=True).items()
    }
    for name in sorted(sizes, key=lambda name: name.split("/")):
        hidden = any(part.startswith(".") for part in name.split("/"))
        if name.lower().endswith(suffixes) and not hidden:
            yield name, sizes[name]


def files_in(folder: Place, suffixes: tuple[str, ...]) -> list[Place]:
    """Returns the files with certain endings in a folder, by name, but for those that begin with a dot."""
    if isinstance(folder, Path):
        found: list[Place] = [path for path in folder.iterdir() if not path.is_dir()]
    else:
        entries = folder.fs.ls(folder.path, detail=True)
        names = [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] != "directory"]
        found = [folder / name for name in names if name]
    fitting = [path for path in found if path.name.lower().endswith(suffixes) and not path.name.startswith(".")]
    return sorted(fitting, key=lambda path: path.name)


def _files_below(
    root: Path, below: str, suffixes: tuple[str, ...], visited: set[tuple[int, int]]
) -> Iterator[tuple[str, int]]:
    status = (root / below).stat()
    if (status.st_dev, status.st_ino) in visited:
        return
    visited.add((status.st_dev, status.st_ino))
    for path in sorted((root / below).iterdir()):
        name = f"{below}{path.name}"
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files_below(root, f"{name}/", suffixes, visited)
        elif name.lower().endswith(suffixes):
            try:
                yield name, path.stat().st_size
            except OSError:
                yield name, 0
