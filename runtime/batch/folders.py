"""Folders for results: on this machine, or in an object store.

In both, a file and a folder are there completely or not at all. On this machine they get their names when they are
written. An object is complete by itself; a folder of objects is complete when it has its last one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.batch.places import Place, os_errors, reason_of
from runtime.errors import InputError
from runtime.files import make_writable_folder

if TYPE_CHECKING:
    from upath import UPath

LOCK = ".lock"
TEMPORARIES = ".*.tmp"
PROBE = ".writable"


class ResultFolder(ABC):
    """A folder for the results and the progress of a job. Names are relative to it."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def __str__(self) -> str:
        return str(self.place)

    @abstractmethod
    def prepare(self, marker: str) -> None:
        """Makes the folder and sees that it can be written.

        Raises:
            InputError: it cannot, or it has files and no `marker` among them.
        """

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Keeps a second run out for the time of a `with` block, where the place can."""

    @abstractmethod
    def parts(self, last: str) -> set[str]:
        """Returns the names of all files and folders that are complete.

        Args:
            last: the file that a folder was given last.
        """

    @abstractmethod
    def files(self, below: str) -> list[str]:
        """Returns the names of the files in a folder below."""

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """Returns a file, or None where there is none."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Writes a file, in place of one that is there."""

    @abstractmethod
    def write_folder(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        """Writes a folder with files, in place of what an interrupted run left of it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""

    @abstractmethod
    def remove_temporaries(self, *folders: str) -> None:
        """Removes what an interrupted run left here and in some of the folders below."""


class LocalFolder(ResultFolder):
    """A folder of this machine."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self._path = place

    def prepare(self, marker: str) -> None:
        path = self._path
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; name a folder for the results")
        if path.is_dir() and not (path / marker).exists() and any(not _is_of_a_start(e.name) for e in path.iterdir()):
            raise InputError(f"{path} is not empty and has no progress of a job; name another folder")
        make_writable_folder(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keeps a second run out; the lock ends with the process, however that ends."""
        with (self._path / LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"another run writes to {self}; wait for it, or name another folder") from error
            yield

    def parts(self, last: str) -> set[str]:
        return {entry.name for entry in self._path.iterdir() if not entry.name.startswith(".")}

    def files(self, below: str) -> list[str]:
        folder = self._path / below
        return sorted(f"{below}/{path.name}" for path in folder.iterdir()) if folder.is_dir() else []

    def read(self, name: str) -> bytes | None:
        try:
            return (self._path / name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Writes a file that is complete, on the disk too, before it has its name."""
        path = self._path / name
        path.parent.mkdir(exist_ok=True)
        temporary = _temporary(path)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def write_folder(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        path = self._path / name
        temporary = _temporary(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        os.replace(temporary, path)

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def remove_temporaries(self, *folders: str) -> None:
        for place in (self._path, *(self._path / folder for folder in folders)):
            for path in place.glob(TEMPORARIES):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


class RemoteFolder(ResultFolder):
    """A folder of an object store. Nothing keeps a second run out: both write the same."""

    def __init__(self, place: UPath) -> None:
        super().__init__(place)
        self._fs = place.fs
        self._root = place.path.rstrip("/")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def prepare(self, marker: str) -> None:
        try:
            with os_errors(self.place):
                if self._names("") - {PROBE} and not self._fs.exists(self._path(marker)):
                    raise InputError(f"{self} is not empty and has no progress of a job; name another folder")
                self.write(PROBE, b"")
                self.remove(PROBE)
        except OSError as error:
            reason = reason_of(error)
            raise InputError(f"cannot write to {self}: {reason}; choose another output folder") from error

    @contextmanager
    def alone(self) -> Iterator[None]:
        yield

    def _names(self, below: str) -> set[str]:
        """Returns the names in a folder; those of folders end in a slash."""
        with os_errors(self.place):
            try:
                entries = self._fs.ls(self._path(below), detail=True, refresh=True)
            except FileNotFoundError:
                return set()
        names = ((entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in entries)
        return {f"{name}/" if kind == "directory" else name for name, kind in names}

    def parts(self, last: str) -> set[str]:
        names = self._names("")
        folders = {name.rstrip("/") for name in names if name.endswith("/")}
        with os_errors(self.place):
            complete = {name for name in folders if self._fs.exists(self._path(f"{name}/{last}"))}
        return {name for name in names if not name.endswith("/")} | complete

    def files(self, below: str) -> list[str]:
        return sorted(f"{below}/{name}" for name in self._names(below) if not name.endswith("/"))

    def read(self, name: str) -> bytes | None:
        with os_errors(self.place):
            try:
                return bytes(self._fs.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        with os_errors(self.place):
            self._fs.pipe_file(self._path(name), content)

    def write_folder(self, name: str, files: Mapping[str, bytes], last: str) -> None:
        for file, content in files.items():
            if file != last:
                self.write(f"{name}/{file}", content)
        self.write(f"{name}/{last}", files.get(last, b""))

    def remove(self, name: str) -> None:
        with os_errors(self.place):
            if self._fs.exists(self._path(name)):
                self._fs.rm_file(self._path(name))

    def remove_temporaries(self, *folders: str) -> None:
        pass


def result_folder(place: Place) -> ResultFolder:
    """Returns the folder at a place."""
    return LocalFolder(place) if isinstance(place, Path) else RemoteFolder(place)


def unwritable(name: str, error: OSError) -> InputError:
    """Returns what to say if a file of a job cannot be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason, remedy = ("there is no space left", "free some") if full else (reason_of(error), "repair that")
    return InputError(f"cannot write {name}: {reason}; finished shards stay: {remedy} and run the same command again")


def _is_of_a_start(name: str) -> bool:
    """Returns whether a run that was killed before it had a marker may have left a file of that name."""
    return name == LOCK or fnmatch(name, TEMPORARIES)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")
