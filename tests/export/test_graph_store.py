"""A part is traced once per machine; what is wrong with a stored graph costs no more than another trace."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export.components import Component, solver_component
from export.graph_store import GraphStore
from export.graphs import make_graphs, write_graph
from latte.model import LatteFlow

RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture
def solver(model: LatteFlow) -> Component:
    return solver_component(model.config)


@pytest.fixture
def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is an error, in this process and in those it forks."""

    def refuse(parts: list[object], opset: int) -> list[object]:
        if parts:
            raise AssertionError("a part is traced")
        return []

    monkeypatch.setattr("export.graphs.trace_parts", refuse)


def graph_of(component: Component, store: GraphStore, opset: int = 18) -> bytes:
    (model,) = make_graphs([component], opset, store)
    return write_graph(model)


def test_what_was_traced_is_not_traced_again(solver: Component, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    first = graph_of(solver, GraphStore(tmp_path))
    assert len(list(tmp_path.glob("*/*.onnx"))) == 1
    request.getfixturevalue("no_tracing")
    assert graph_of(solver, GraphStore(tmp_path)) == first
    with pytest.raises(AssertionError, match="a part is traced"):
        graph_of(solver, GraphStore(tmp_path), opset=20)
    with pytest.raises(AssertionError, match="a part is traced"):
        graph_of(solver, GraphStore(None))


@pytest.mark.parametrize("content", [b"", b"not a graph", None])
def test_a_corrupt_entry_is_traced_again_and_replaced(
    content: bytes | None, solver: Component, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = graph_of(solver, GraphStore(tmp_path))
    (file,) = tmp_path.glob("*/*.onnx")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content is None else content)
    assert graph_of(solver, GraphStore(tmp_path)) == first
    request.getfixturevalue("no_tracing")
    assert graph_of(solver, GraphStore(tmp_path)) == first


def test_a_folder_that_cannot_be_written_is_no_error(solver: Component, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert graph_of(solver, GraphStore(tmp_path / "file" / "graphs"))


def test_entries_that_nobody_used_for_a_month_are_deleted(solver: Component, tmp_path: Path) -> None:
    """And nothing else in that folder is."""
    long_ago = time.time() - 40 * 24 * 3600
    for name in ("0123456789abcdef" * 2, "my-figures"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (long_ago, long_ago))
    graph_of(solver, GraphStore(tmp_path))
    assert not (tmp_path / ("0123456789abcdef" * 2)).exists()
    assert (tmp_path / "my-figures").exists()


def test_a_store_of_another_user_is_read(
    solver: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    first = graph_of(solver, GraphStore(tmp_path))

    def not_permitted(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", not_permitted)
    request.getfixturevalue("no_tracing")
    assert graph_of(solver, GraphStore(tmp_path)) == first


def test_an_entry_that_another_process_replaces_is_no_error(
    solver: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = graph_of(solver, GraphStore(tmp_path))

    def gone(_: Path, pattern: str) -> Iterator[Path]:
        raise FileNotFoundError(pattern)

    monkeypatch.setattr(Path, "glob", gone)
    assert graph_of(solver, GraphStore(tmp_path)) == first


def test_a_second_export_traces_nothing_unless_it_is_told_to(
    bundle: Path, checkpoint: Path, tmp_path: Path, no_tracing: None, run_command: RunCommand
) -> None:
    code, _, error = run_command("export", checkpoint, tmp_path / "again", "--no-verify")
    assert code == 0, error
    with pytest.raises(AssertionError, match="a part is traced"):
        run_command("export", checkpoint, tmp_path / "anew", "--no-verify", "--no-cache")


def test_doctor_knows_the_store(bundle: Path, run_command: RunCommand) -> None:
    findings = {f["what"]: f for f in json.loads(run_command("doctor", "--json")[1])["findings"]}
    assert findings["graph cache"]["found"].startswith(os.environ["LATTE_FLOW_CACHE"])
    assert int(findings["graph cache"]["found"].split(": ")[1].split()[0]) > 5
