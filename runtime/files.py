"""Files and folders, written so that a reader finds the old version or the new one, never part of one."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import InputError

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of `renameat2`: paths are relative to the working directory; exchange the two."""


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
    """Gives a file another name, as a hard link where the file system allows and as a copy elsewhere.

    A symbolic link is followed: a relative one would point to nothing from another folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
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

    Whenever the process is interrupted, `path` is the old directory or the new one.

    Raises:
        InputError: the parent folder of `path` cannot be written to.
    """
    make_writable_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            _exchange(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(new: Path, old: Path) -> None:
    """Exchanges two directories: in one step where Linux can, in three renames elsewhere."""
    try:
        if ctypes.CDLL(None).renameat2(AT_FDCWD, bytes(new), AT_FDCWD, bytes(old), RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError, TypeError):  # not Linux, or a C library without it
        pass
    retired = new.with_suffix(".old")
    try:
        os.replace(old, retired)
        os.replace(new, old)
    finally:
        if not old.exists():
            os.replace(retired, old)
        elif retired.exists():
            os.replace(retired, new)


def permit_like_new(path: Path) -> None:
    """Gives a file the permissions of a new one: safetensors writes files that only their owner can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
