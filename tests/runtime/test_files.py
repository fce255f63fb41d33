"""A folder is the old one or the new one, wherever a process is interrupted."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.files import replaced_directory


def write(path: Path, content: str) -> None:
    with replaced_directory(path) as folder:
        for name in ("a", "b"):
            (folder / name).write_text(content)


def read(path: Path) -> set[str]:
    return {(path / name).read_text() for name in ("a", "b")}


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    write(tmp_path / "x", "old")
    write(tmp_path / "x", "new")
    assert read(tmp_path / "x") == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", range(4))
def test_an_interrupt_at_any_call_leaves_the_old_folder_or_the_new_one(
    call: int, when: str, can_exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of everything that changes the file system, the n-th call is interrupted, before it works or after."""
    path = tmp_path / "x"
    write(path, "old")
    calls = 0

    def interrupted(function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call + 1 and when == "before":
                raise KeyboardInterrupt
            result = function(*args, **kwargs)
            if calls == call + 1 and when == "after":
                raise KeyboardInterrupt
            return result

        return wrapper

    library = ctypes.CDLL(None)

    class Library:
        def __init__(self, _: None) -> None:
            if can_exchange:
                self.renameat2 = interrupted(library.renameat2)

    monkeypatch.setattr(ctypes, "CDLL", Library)
    monkeypatch.setattr(os, "replace", interrupted(os.replace))
    monkeypatch.setattr(shutil, "rmtree", interrupted(shutil.rmtree))
    try:
        write(path, "new")
    except KeyboardInterrupt:
        pass
    else:
        assert calls <= call  # there are fewer calls than that
    assert read(path) in ({"old"}, {"new"})


def test_a_killed_process_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """A process that replaces a folder all the time is killed at a random moment, again and again."""
    path = tmp_path / "x"
    write(path, "0")
    program = (
        "import sys; from pathlib import Path; from tests.runtime.test_files import write\n"
        "n = 0\n"
        "while True: n += 1; write(Path(sys.argv[1]), str(n)); print(n, flush=True)\n"
    )
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(20):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        assert len(read(path)) == 1
