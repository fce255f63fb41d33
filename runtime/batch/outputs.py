"""Results as files, one set for each shard: Parquet, PNGs with metadata, WebDataset, or OpenAI's output lines.

A shard is finished when its file (or its folder of PNGs) is there, complete. Failed rows are lines of a file of their
own in `errors/`, which is there before.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from typing import Any, Literal

from runtime.batch.folders import ResultFolder, unwritable
from runtime.batch.places import reason_of
from runtime.batch.reading import parquet_library
from runtime.batch.rows import COLUMNS, Row, question_of
from runtime.batch.shard import Result
from runtime.errors import InputError
from runtime.gateway import chat, images
from runtime.gateway.schema import ImagesBody
from runtime.serving.requests import AnswerRequest, GenerationRequest, RequestKind
from runtime.serving.service import ServedModel

Format = Literal["parquet", "png", "webdataset", "openai"]
SUFFIXES: dict[Format, str] = {"parquet": ".parquet", "png": "", "webdataset": ".tar", "openai": ".jsonl"}
ERRORS = "errors"
METADATA, ANSWERS = "metadata.jsonl", "answers.jsonl"
"""What a folder of PNGs says of its images, and of what has none."""
LONGEST_NAME = 80
"""Characters of an image's name without its number and ending: a WebDataset's tar has room for 100 in all."""
CREATED = 0
"""Time in OpenAI's bodies: the same job has the same bytes, whenever it ran."""
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]")
_DRAWN = {
    "prompt": "string",
    "negative_prompt": "string",
    "num_inference_steps": "int64",
    "guidance_scale": "float64",
    "shift": "float64",
}
_ANSWERED = {
    "question": "string",
    "answer": "string",
    "finish_reason": "string",
    "max_new_tokens": "int64",
    "temperature": "float64",
    "top_p": "float64",
    "input_tokens": "int64",
    "output_tokens": "int64",
}


@dataclass(frozen=True)
class Output:
    """Where results go."""

    folder: ResultFolder
    format: Format
    kinds: tuple[RequestKind, ...]
    """What the rows ask for."""
    keep: tuple[str, ...]
    model: ServedModel
    bundle_hash: str

    def name(self, shard: int) -> str:
        """Returns the name of the file or folder that a finished shard has."""
        return f"part-{shard:05d}{SUFFIXES[self.format]}"

    def finished(self, shards: Iterable[int]) -> set[int]:
        """Returns the shards that were written.

        Raises:
            InputError: the folder cannot be read.
        """
        try:
            there = self.folder.parts(METADATA)
        except OSError as error:
            raise InputError(f"cannot read {self.folder}: {reason_of(error)}") from error
        return {shard for shard in shards if self.name(shard) in there}

    def write(self, shard: int, results: Sequence[Result]) -> None:
        """Writes a shard, in place of what an interrupted run left of it.

        Raises:
            InputError: it cannot be written; finished shards stay.
        """
        name = self.name(shard)
        errors = f"{ERRORS}/part-{shard:05d}.jsonl"
        done = [result for result in results if result.error is None]
        failed = [result for result in results if result.error is not None]
        try:
            if failed:
                self.folder.write(errors, self._error_lines(failed))
            else:
                self.folder.remove(errors)
            if self.format == "png":
                self.folder.write_folder(name, self._files(done), METADATA)
            else:
                self.folder.write(name, self._content(done))
        except OSError as error:
            raise unwritable(f"{self.folder}/{name}", error) from error

    def _content(self, results: Sequence[Result]) -> bytes:
        if self.format == "parquet":
            return self._parquet(results)
        return self._tar(results) if self.format == "webdataset" else _lines(map(self._response, results))

    def _parquet(self, results: Sequence[Result]) -> bytes:
        pa, pq = parquet_to_write()
        columns = _columns(self.kinds) | dict.fromkeys(self.keep, "string")
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        types = {name: image if kind == "image" else getattr(pa, kind)() for name, kind in columns.items()}
        features = {
            name: {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}
            for name, kind in columns.items()
        }
        schema = pa.schema(
            list(types.items()),
            # What Hugging Face datasets and the hub read the kinds of columns from.
            {"huggingface": json.dumps({"info": {"features": features}}), "latte_flow_bundle": self.bundle_hash},
        )
        rows = []
        for result, index, values in _flat(results):
            row = {name: _text(value) if name in self.keep else value for name, value in values.items()}
            if index is not None:
                row["image"] = {"bytes": result.files[index], "path": f"{_key(result, index)}.{_extension(result)}"}
            rows.append(row)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), buffer, compression="zstd", row_group_size=256)
        return buffer.getvalue()

    def _tar(self, results: Sequence[Result]) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for result, index, values in _flat(results):
                key = _key(result, index)
                if index is not None:
                    _add(tar, f"{key}.{_extension(result)}", result.files[index])
                _add(tar, f"{key}.json", _json(values).encode())
        return buffer.getvalue()

    def _files(self, results: Sequence[Result]) -> dict[str, bytes]:
        """Returns the files of a folder of PNGs."""
        files = {}
        drawn, answered = [], []
        for result, index, values in _flat(results):
            if index is None:
                answered.append(values)
                continue
            name = f"{_key(result, index)}.{_extension(result)}"
            files[name] = result.files[index]
            drawn.append({"file_name": name, **values})
        return files | {name: _lines(lines) for name, lines in ((ANSWERS, answered), (METADATA, drawn)) if lines}

    def _response(self, result: Result) -> dict[str, Any]:
        """Returns OpenAI's output line."""
        assert result.body is not None
        assert result.usage is not None
        if isinstance(result.body, ImagesBody):
            assert isinstance(result.request, GenerationRequest)
            items = [{"b64_json": images.base64_text(file)} for file in result.files]
            body = images.response_body(
                result.body, self.model, result.request.seed, items, result.usage, created=CREATED
            )
        else:
            completion = chat.Completion(self.model.name, _hash(result.row), CREATED)
            uris = [images.data_uri(file, result.body.output_format) for file in result.files]
            body = completion.body(chat.drawn_message(uris) if uris else {"content": result.text}, result.usage)
        return _openai_line(result.row, 200, body)

    def _error_lines(self, failed: Sequence[Result]) -> bytes:
        if self.format == "openai":
            return _lines(_openai_line(r.row, r.error.status, r.error.body) for r in failed if r.error is not None)
        return _lines(
            {"id": r.row.id or None, "place": r.row.place, "error": r.error.message, "row": r.row.values}
            for r in failed
            if r.error is not None
        )


def check_kept(keep: Sequence[str], kinds: Collection[RequestKind], format_: Format) -> None:
    """Checks that results have room for columns to keep: each needs a name that no other column has.

    Raises:
        InputError: they have none.
    """
    if keep and format_ == "openai":
        raise InputError(
            f"--keep {keep[0]}: OpenAI's lines have no place for it; choose another --format, or leave it out"
        )
    of_results = {*_columns(kinds), *(["file_name"] if format_ == "png" else [])}
    for name in keep:
        if name in of_results:
            raise InputError(f"--keep {name}: the results have a column {name!r} of their own; rename the input's")
        if name in COLUMNS:
            raise InputError(f"--keep {name}: {name!r} says how a row is run, and cannot be kept; rename the column")


def _columns(kinds: Collection[RequestKind]) -> dict[str, str]:
    """Returns the results' own columns and their types."""
    columns = {"id": "string"}
    if "draw" in kinds:
        columns |= {"index": "int64", "image": "image", **_DRAWN}
    if "ask" in kinds:
        columns |= _ANSWERED
    return columns | {"seed": "int64"}


def parquet_to_write() -> tuple[Any, Any]:
    """Returns what `parquet_library` does; another format needs nothing."""
    return parquet_library("Parquet", ", or choose another --format")


def _flat(results: Sequence[Result]) -> Iterator[tuple[Result, int | None, dict[str, Any]]]:
    """Yields each image with its number in its row, and each answer with None, and what is said of it."""
    for result in results:
        request, kept = result.request, result.row.kept
        if isinstance(request, GenerationRequest):
            said = {name: getattr(request, name) for name in _DRAWN}
            for index in range(len(result.files)):
                yield result, index, {"id": result.row.id, "index": index, **said, "seed": request.seed + index, **kept}
        elif isinstance(request, AnswerRequest) and result.usage is not None:
            settings = request.settings
            said = {
                "question": question_of(request),
                "answer": result.text,
                "finish_reason": chat.finish_reason(result.usage),
                "max_new_tokens": settings.max_new_tokens,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "input_tokens": result.usage.input_tokens,
                "output_tokens": result.usage.output_tokens,
            }
            yield result, None, {"id": result.row.id, **said, "seed": settings.seed, **kept}


def _extension(result: Result) -> str:
    return result.body.output_format if result.body is not None else "png"


def _key(result: Result, index: int | None) -> str:
    """Returns the name of an image or answer: its id where that is a good name for a file.

    Any other id is shortened, and its hash follows a ~, which no good name has: no two ids share a name.
    """
    name = _UNSAFE.sub("_", result.row.id)
    if name != result.row.id or len(name) > LONGEST_NAME:
        end = f"~{_hash(result.row)[:16]}"
        name = name[: LONGEST_NAME - len(end)] + end
    return name if index is None or len(result.files) == 1 else f"{name}+{index}"


def _hash(row: Row) -> str:
    return hashlib.sha256(row.id.encode()).hexdigest()[:32]


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return _json(value) if isinstance(value, (bool, int, float, list, tuple, dict)) else _described(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=_described)


def _described(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return value.isoformat() if isinstance(value, (date, time)) else str(value)


def _lines(values: Any) -> bytes:
    return "".join(f"{_json(value)}\n" for value in values).encode(errors="replace")


def _openai_line(row: Row, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an output line; one without an id could not even be read."""
    if not row.id:
        error = {"code": "invalid_line", "message": f"{row.place}: {row.error}"}
        return {"id": None, "custom_id": None, "response": None, "error": error}
    name = _hash(row)
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": row.id, "response": response, "error": None}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def count_failed(folder: ResultFolder) -> int:
    """Returns the number of failed rows of all finished shards."""
    return sum((folder.read(name) or b"").count(b"\n") for name in folder.files(ERRORS))
