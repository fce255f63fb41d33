"""Files and folders, written so that a reader finds the old version or the new one, never part of one."""

from __future__ import annotations

import hashlib
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
    """Creates a folder and checks that it is writable, before any long work.

    Raises:
        InputError: it cannot be created or written to.
    """
    probe = path / f".{os.getpid()}.tmp"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror or error}; choose another output folder") from error


def link_or_copy(source: Path, target: Path) -> None:
    """Gives a file another name, as a hard link where the file system allows and as a copy elsewhere."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def check_replaceable(folder: Path, marker: str, noun: str, *, force: bool) -> None:
    """Checks that a folder may be written: it is new, empty, or a `noun` that `force` allows to replace.

    Args:
        marker: a file that every such folder contains, for example a bundle's manifest.
        noun: what such a folder is called in messages.

    Raises:
        InputError: something else is there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the {noun}")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / marker).is_file():
            raise InputError(f"{folder} is not empty and contains no {noun}; name another folder")
        if not force:
            raise InputError(f"{folder} already contains a {noun}; pass --force to replace it")
    make_writable_folder(folder.parent)


@contextmanager
def replaced_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory that replaces `path` if the block succeeds.

    Raises:
        InputError: the parent folder of `path` cannot be written to.
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


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
