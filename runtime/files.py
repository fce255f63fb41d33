"""Writing so that a reader sees the old thing, nothing, or the new thing, never a half."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import InputError


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name, then renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def make_writable_folder(path: Path) -> None:
    """Makes the folder now, before any long work.

    Raises:
        InputError: it cannot be made or written to.
    """
    probe = path / f".{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}; choose another output folder") from error


def link_or_copy(source: Path, target: Path) -> None:
    """The file under another name, without its bytes twice where the file system can; makes the folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_replaceable(folder: Path, marker: str, noun: str, *, force: bool) -> None:
    """Whether a folder may be written as a whole: it is not there, empty, or of its kind and `force` is given.

    Args:
        marker: the file that is in every folder of its kind, such as a bundle's manifest.
        noun: what such a folder is called.

    Raises:
        InputError: something is in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the {noun}")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / marker).is_file():
            raise InputError(f"{folder} is not empty and holds no {noun}; name another folder")
        if not force:
            raise InputError(f"{folder} holds a {noun} already; pass --force to replace it")
    make_writable_folder(folder.parent)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its place if the block succeeds.

    Raises:
        InputError: the folder that `path` is in cannot be written to.
    """
    make_writable_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    retired = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, retired)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
