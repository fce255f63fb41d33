"""Rows from files: JSON lines, CSV, Parquet, a text file of prompts, or a folder of images.

Everything is read row by row, so that memory does not grow with the input. A line that cannot be read is a row with an
error; what is wrong with the whole input is an `InputError`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import itertools
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TextIO

from runtime.batch.places import Place, files_below, files_in, hash_of_file, is_url, os_errors, reason_of
from runtime.batch.rows import COLUMNS, IMAGE_COLUMNS, Row, body_of, kind_of, missing_in
from runtime.errors import InputError, MissingExtraError, one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
MAX_ID = 512
"""Characters of an id."""
MAX_DEPTH = 100
"""Objects and lists of a JSON line in each other; pickling a row takes three calls for each."""
ROWS_AT_ONCE = 64
"""Rows of a Parquet file in memory."""
DEFAULT_QUESTION = "describe the image"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NAMED = ("custom_id", "body")
"""What tells a line of OpenAI's batch format from a plain one."""


@dataclass(frozen=True)
class RowOptions:
    """What holds for all rows."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values for rows that have none, by the names of plain rows."""
    question: str = DEFAULT_QUESTION
    """For plain rows that have an image, but no question."""
    keep: tuple[str, ...] = ()
    """Columns that are carried to the output."""
    columns: tuple[str, ...] = ()
    """Columns of plain rows that are read, besides those to keep; none for all."""

    def reads(self, column: str) -> bool:
        """Returns whether a column of plain rows is read."""
        return not self.columns or column in self.columns or column in self.keep

    limit: int | None = None
    """Number of rows to read; None for all."""


@dataclass(frozen=True)
class Record:
    """One row as its file has it."""

    place: str
    values: Mapping[str, Any]
    base: Place
    """Folder that its image paths are relative to."""
    error: str = ""


class Ids:
    """The ids of all rows so far, in a temporary database on disk."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("")
        self._database.execute("CREATE TABLE given (id TEXT PRIMARY KEY, place TEXT) WITHOUT ROWID")
        self._database.execute("CREATE TABLE made (hash BLOB PRIMARY KEY, count INTEGER) WITHOUT ROWID")

    def take(self, name: str, place: str, remedy: str = "") -> None:
        """Notes a given id.

        Args:
            remedy: ends the message if another row has it.

        Raises:
            InputError: another row has it.
        """
        if _was_made(name) and int(name[21:] or 1) <= self._made(bytes.fromhex(name[:20])):
            raise InputError(
                f"the id {name!r} of {place} was made for a row before that has none; give that row an id too"
            )
        try:
            self._database.execute("INSERT INTO given VALUES (?, ?)", (name, place))
        except sqlite3.IntegrityError:
            raise InputError(
                f"the id {name!r} is there twice, in {self._place_of(name)} and {place}; ids must differ{remedy}"
            ) from None

    def make(self, values: Mapping[str, Any], place: str) -> str:
        """Returns an id that follows from the values of a row, and from how many rows before it have the same.

        Raises:
            InputError: another row was given that id.
        """
        text = json.dumps(values, sort_keys=True, default=_described)
        content = hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:10]
        (count,) = self._database.execute(
            "INSERT INTO made VALUES (?, 1) ON CONFLICT DO UPDATE SET count = count + 1 RETURNING count", (content,)
        ).fetchone()
        name = content.hex() if count == 1 else f"{content.hex()}-{count}"
        if first := self._place_of(name):
            raise InputError(f"the id {name!r} of {first} is the one that is made for {place}; give that row an id too")
        return name

    def _made(self, content: bytes) -> int:
        """Returns how many ids were made for rows with that hash."""
        found = self._database.execute("SELECT count FROM made WHERE hash = ?", (content,)).fetchone()
        return int(found[0]) if found else 0

    def _place_of(self, name: str) -> str:
        """Returns where an id was given, or nothing."""
        found = self._database.execute("SELECT place FROM given WHERE id = ?", (name,)).fetchone()
        return str(found[0]) if found else ""

    def close(self) -> None:
        """Deletes the database."""
        self._database.close()


_was_made = re.compile(r"[0-9a-f]{20}(-(?!1$)[1-9][0-9]{0,17})?").fullmatch
"""Whether an id has the form of those that `Ids.make` returns."""


def _described(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else str(value)


def read_rows(source: Place, options: RowOptions) -> Iterator[Row]:
    """Yields all rows with their ids; those that cannot be run have an error.

    Raises:
        InputError: the input cannot be read, an id is there twice, or there is a column that has no meaning.
    """
    ids = Ids()
    try:
        with os_errors(source):
            for record in itertools.islice(_records(source, options), options.limit):
                yield _row(record, ids, options)
    except OSError as error:
        raise InputError(f"cannot read {source}: {reason_of(error)}") from error
    except sqlite3.Error as error:
        raise InputError(f"the ids cannot be kept in a temporary file: {one_line(error)}; set TMPDIR") from error
    finally:
        ids.close()


def _row(record: Record, ids: Ids, options: RowOptions) -> Row:
    values = {name: value for name, value in record.values.items() if value is not None}
    if record.error:
        return Row(record.place, "", {}, error=record.error)
    is_openai = any(name in values for name in _NAMED)
    if not is_openai:
        values = {name: value for name, value in values.items() if options.reads(name)}
    kept = {name: values.pop(name) for name in options.keep if name in values and name not in COLUMNS}
    if fault := _fault_of_values(values, kept):
        return Row(record.place, "", {}, error=fault)
    given = values.pop("custom_id" if is_openai else "id", None)
    if isinstance(given, float) and given.is_integer():
        given = int(given)  # a column of whole numbers with a gap
    if given is None and is_openai:
        return Row(record.place, "", {}, error="the line has no custom_id")
    error = "" if given is None else _fault_of_id(given)
    name = ids.make(values, record.place) if given is None or error else str(given)
    if given is not None and not error:
        ids.take(name, record.place, "" if is_openai else _WITHOUT_IDS)
    if is_openai:
        return _checked(_openai_row(record.place, name, values, kept), error, options.defaults)
    if "prompt" in values:
        values = {**{k: v for k, v in options.defaults.items() if k not in _OF_ANSWERS}, **values}
    else:
        values = {**{k: v for k, v in options.defaults.items() if k in _OF_ANSWERS}, **values}
        if any(column in values for column in IMAGE_COLUMNS):
            values.setdefault("question", options.question)
    if unknown := sorted(set(values) - set(COLUMNS)):
        error = error or _unknown(unknown)
    return _checked(Row(record.place, name, _with_paths(values, record.base), kept), error)


_WITHOUT_IDS = ": repair them, or name all columns but the id with --columns, so that ids are made"
_OF_ANSWERS = ("max_new_tokens", "temperature", "top_p")


def _openai_row(place: str, name: str, values: Mapping[str, Any], kept: Mapping[str, Any]) -> Row:
    body, url = values.get("body"), values.get("url")
    error = ""
    if unknown := sorted(set(values) - {"method", "url", "body"}):
        error = f"the line has an unknown field {unknown[0]!r}"
    elif values.get("method", "POST") != "POST":
        error = f"method must be POST, got {values['method']!r}"
    elif not isinstance(body, Mapping) or not isinstance(url, str) or not url:
        error = "the line needs a url and a body"
    return Row(place, name, body if isinstance(body, Mapping) else {}, kept, str(url or "?"), error)


def _checked(row: Row, error: str, missing: Mapping[str, Any] | None = None) -> Row:
    """Returns a row with what is wrong with it.

    Args:
        missing: values for OpenAI's bodies that have none.
    """
    try:
        if not (error := error or row.error):
            body = body_of(row)
            if fields := missing_in(body, missing or {}):
                row = replace(row, values={**row.values, **fields})
                body_of(row)
            return replace(row, kind=kind_of(body))
    except InputError as fault:
        error = one_line(fault)
    return Row(row.place, row.id, row.values, row.kept, row.url, error)


def _fault_of_values(values: Mapping[str, Any], kept: Mapping[str, Any]) -> str:
    """Returns what keeps values from being written as text."""
    if not _is_unicode([values, kept]):
        wrong = next(name for name, value in (*values.items(), *kept.items()) if not _is_unicode({name: value}))
        shown = wrong.encode(errors="backslashreplace").decode()
        return f"{shown} is not valid Unicode; write it in UTF-8"
    for name, value in kept.items():
        if _has_bytes(value):
            return f"--keep {name}: text can be kept, and the value has bytes; leave it out"
    return ""


_to_json = json.JSONEncoder(ensure_ascii=False, default=lambda _: "").encode


def _is_unicode(values: Any) -> bool:
    try:
        _to_json(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_bytes(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(map(_has_bytes, value.values() if isinstance(value, dict) else value))
    return isinstance(value, bytes)


def _fault_of_id(given: Any) -> str:
    if not isinstance(given, (str, int)) or isinstance(given, bool) or not str(given).strip():
        return f"an id must be text or a whole number, got {given!r}"
    return f"an id has at most {MAX_ID} characters, got {len(str(given))}" if len(str(given)) > MAX_ID else ""


def _unknown(names: list[str]) -> str:
    remedy = f"--keep {names[0]} carries it to the output, --columns reads only others"
    return f"unknown column {names[0]!r}; known are {', '.join(COLUMNS)}; {remedy}"


def _with_paths(values: Mapping[str, Any], base: Place) -> dict[str, Any]:
    """Returns values whose image paths do not depend on the working directory."""

    def placed(value: Any) -> Any:
        if isinstance(value, str) and value:
            return value if is_url(value) or value.startswith("data:") else str(base / value)
        if isinstance(value, Mapping) and value.get("bytes") is None and isinstance(value.get("path"), str):
            return placed(value["path"])
        return [placed(item) for item in value] if isinstance(value, list) else value

    return {name: placed(value) if name in IMAGE_COLUMNS else value for name, value in values.items()}


def _records(source: Place, options: RowOptions) -> Iterator[Record]:
    files = files_of(source)
    if not files:
        for name, _ in files_below(source, IMAGE_SUFFIXES):
            yield Record(_shown(name), {"id": name, "image": name}, source.absolute())
        return
    for file in files:
        where = "" if file == source else f"{_shown(file.name)}, "
        for place, values, error in _READERS[file.suffix.lower()](file, options):
            yield Record(where + place, values, file.absolute().parent, error)


def _shown(name: str) -> str:
    """Returns the name of a file with \\x and two digits for each byte that is not UTF-8."""
    return os.fsencode(name).decode(errors="backslashreplace")


def files_of(source: Place) -> list[Place]:
    """Returns the files with rows: the input itself, or those of one kind in a folder without images.

    Raises:
        InputError: there is no such file or folder, or it is of another kind.
    """
    if source.is_dir():
        if files_in(source, IMAGE_SUFFIXES):
            return []  # what else is there describes the images
        files = files_in(source, tuple(suffix for suffix in _READERS if suffix != ".txt"))
        if len({path.suffix.lower() for path in files}) > 1:
            raise InputError(f"{source} has files of several kinds; name one of them, such as {files[0].name}")
        return files
    if not source.exists():
        raise InputError(f"there is no {source}; name a file or a folder with rows")
    if source.suffix.lower() not in _READERS:
        raise InputError(f"{source.name} must end in {', '.join(_READERS)}, or be a folder of images")
    return [source]


def hash_of(source: Place) -> str:
    """Returns a hash of the input: of its files' content, or of the names and sizes of a folder's images."""
    total = hashlib.sha256()
    try:
        with os_errors(source):
            files = files_of(source)
            for file in files:
                total.update(f"{file.name} {hash_of_file(file)}\n".encode(errors="surrogateescape"))
            for name, size in files_below(source, IMAGE_SUFFIXES) if not files else ():
                total.update(f"{name} {size}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise InputError(f"cannot read {source}: {reason_of(error)}") from error
    return total.hexdigest()


Parsed = Iterator[tuple[str, Mapping[str, Any], str]]
"""Place, values and error of each row."""


def _json_lines(path: Place, options: RowOptions) -> Parsed:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                _check_encoding(path, line)
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                yield f"line {number}", {}, f"not JSON: {one_line(error)}"
                continue
            if not isinstance(values, dict):
                yield f"line {number}", {}, "not a JSON object"
            elif line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth_of(values) > MAX_DEPTH:
                yield f"line {number}", {}, f"objects and lists are nested more than {MAX_DEPTH} deep"
            else:
                yield f"line {number}", values, ""


def _depth_of(value: Any) -> int:
    """Returns how deep objects and lists are nested in each other."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth


def _check_encoding(path: Place, head: bytes) -> None:
    if head.startswith(_UTF_16) or b"\0" in head:
        raise InputError(f"{path} is not UTF-8, but probably UTF-16; save it as UTF-8")


@contextmanager
def _open_text(path: Place) -> Iterator[TextIO]:
    """Opens a text file; bytes that are not UTF-8 become lone surrogates, for the rows that have them to fail.

    Raises:
        InputError: the file is in another encoding.
    """
    with path.open("rb") as raw:
        _check_encoding(path, raw.read(1024))
        raw.seek(0)
        with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as file:
            yield file


def _text_lines(path: Place, options: RowOptions) -> Parsed:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", {"prompt": line.strip()}, ""


def _csv_rows(path: Place, options: RowOptions) -> Parsed:
    """Yields the rows of a CSV file. Every value is text: a prompt such as 007 is no number."""
    with _open_text(path) as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
        except csv.Error as error:
            raise InputError(f"{path}: the line with the names of the columns is not CSV: {one_line(error)}") from error
        _check_columns(path, header, options)
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if lines.ended:
                    raise InputError(
                        f"{path}: a quote that opens in the row of line {number} is not closed until the end of the "
                        f"file, line {reader.line_num}; close it, or double it to mean a quote"
                    ) from error
                yield _lines_from(number, reader.line_num), {}, f"not CSV: {one_line(error)}; look for a stray quote"
                continue
            if not cells:
                continue
            fits = len(cells) == len(header)
            error_of_row = "" if fits else f"the row has {len(cells)} cells, the header has {len(header)}"
            values = {k: v for k, v in zip(header, cells, strict=False) if v != ""}
            yield f"line {number}" if fits else _lines_from(number, reader.line_num), values, error_of_row


class _Lines:
    """The lines of a file, and whether all were read."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        yield from self._file
        self.ended = True


def _lines_from(first: int, last: int) -> str:
    return f"line {first}" if first == last else f"lines {first} to {last}"


def parquet_library(what: str, remedy: str = "") -> tuple[Any, Any]:
    """Returns pyarrow and its part for Parquet.

    Args:
        what: what needs it.
        remedy: what else can be done.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'{what} needs pyarrow, which is not installed; run: pip install "latte-flow[batch,cpu]"{remedy}'
        ) from error
    return pyarrow, pyarrow.parquet


def _parquet_rows(path: Place, options: RowOptions) -> Parsed:
    pa, pq = parquet_library("reading Parquet")
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            names = _check_columns(path, schema.names, options)
            for name in options.keep:
                if "binary" in str(schema.field(name).type):
                    raise InputError(f"--keep {name}: text can be kept, and the column has bytes; leave it out")
            rows = (row for batch in table.iter_batches(ROWS_AT_ONCE, columns=names) for row in _python_rows(batch))
            for number, (values, error_of_row) in enumerate(rows, 1):
                yield f"row {number}", values, error_of_row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a complete Parquet file: {one_line(error)}") from error


def _python_rows(batch: Any) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the values of each row, or why Python cannot hold one: a text that is not UTF-8, a date after 9999."""
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):
        rows = None
    if rows is not None:
        yield from ((row, "") for row in rows)
        return
    for index in range(batch.num_rows):
        values: dict[str, Any] = {}
        fault = ""
        for name in batch.schema.names:
            try:
                values[name] = batch.column(name)[index].as_py()
            except (ValueError, OverflowError) as error:
                fault = fault or f"{name} cannot be read: {one_line(error)}"
        yield values, fault


def _check_columns(path: Place, names: list[str], options: RowOptions) -> list[str]:
    """Returns the columns to read; a table with one that has no meaning is refused, before any row is run."""
    if missing := [name for name in (*options.columns, *options.keep) if name not in names]:
        raise InputError(f"{path.name} has no column {missing[0]!r}; its columns are {', '.join(names)}")
    names = [name for name in names if options.reads(name)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path.name} has two columns {name!r}; rename one")
    if unknown := [name for name in names if name not in COLUMNS and name not in options.keep]:
        raise InputError(f"{path.name}: {_unknown(unknown)}")
    return names


_READERS: dict[str, Callable[[Place, RowOptions], Parsed]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_lines,
}
