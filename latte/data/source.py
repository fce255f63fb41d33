"""Data sets of images with captions, read by Hugging Face `datasets`: local files, URLs and names on the hub."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latte.data.captions import (
    CAPTION_COLUMNS,
    CLASS_COLUMNS,
    TEMPLATES,
    CaptionSource,
    check_templates,
    load_class_names,
)
from latte.data.images import BadRowError
from latte.data.layouts import EXPECTED, LocalFiles, find_local_files, layout_of_name
from runtime.errors import InputError, MissingExtraError, one_line

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
QUESTIONS = "questions"
"""The column of questions and answers about the image: a list of records of `question` and `answer`."""


@dataclass(frozen=True)
class Record:
    """A row as it is stored."""

    name: str
    captions: tuple[str, ...]
    questions: tuple[tuple[str, str], ...]
    image: bytes
    """The image file, encoded."""


@dataclass(frozen=True)
class RowReader:
    """Reads a row of `datasets`. Picklable, so that worker processes can have it."""

    image_column: str
    captions: CaptionSource
    root: Path | None
    """The folder that paths of images must not leave; None for a data set that is not local."""
    has_questions: bool = False
    needs_questions: bool = False
    """Whether a row without questions cannot be used."""

    def name(self, row: Mapping[str, Any], number: int) -> str:
        """Returns what to call a row in messages.

        Args:
            number: its place in the data set, for rows without a name.
        """
        cell = row.get(self.image_column) or {}
        path = cell.get("path") or ""
        if "__url__" in row:
            return f"{os.path.basename(row['__url__'])}/{path or row.get('__key__')}"
        if path and self.root is not None and os.path.isabs(path):
            return os.path.relpath(path, self.root)
        return f"row {number} ({path})" if path else f"row {number}"

    def read(self, row: Mapping[str, Any], number: int) -> Record:
        """Reads a row, its image's bytes included.

        Raises:
            BadRowError: it has no image or no caption, or no questions where they are needed.
        """
        cell = row.get(self.image_column) or {}
        captions = self.captions.read(row, cell.get("path"))
        asked = self._questions(row)
        if self.needs_questions and not asked:
            raise BadRowError("it has no questions")
        return Record(self.name(row, number), captions, asked, self._bytes(cell))

    def _bytes(self, cell: Mapping[str, Any]) -> bytes:
        data, path = cell.get("bytes"), cell.get("path")
        if data:
            return bytes(data)
        if not path:
            raise BadRowError("it has no image")
        try:
            if self.root is None:
                import fsspec

                if "://" not in path:
                    raise BadRowError(f"its image is the local file {path}, but the data set is not local")
                with fsspec.open(path, "rb") as file:
                    return bytes(file.read())
            if not Path(os.path.abspath(path)).is_relative_to(os.path.abspath(self.root)):
                raise BadRowError(f"its image {path} is outside {self.root}")
            return Path(path).read_bytes()
        except OSError as error:
            raise BadRowError(f"its image cannot be read: {error.strerror or one_line(error)}") from error

    def _questions(self, row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
        if not self.has_questions:
            return ()
        pairs = ((item["question"], item["answer"]) for item in row[QUESTIONS] or ())
        return tuple((question, answer) for question, answer in pairs if question and answer)


class ImageTextDataSet:
    """Rows of images and captions: with an index, or streamed."""

    def __init__(self, name: str, table: Any, reader: RowReader, *, streamed: bool) -> None:
        self.name = name
        self.table = table
        """A `datasets.Dataset`, or an `IterableDataset` if streamed; its images are not decoded."""
        self.reader = reader
        self.streamed = streamed
        captions = reader.captions
        # Reading a row's captions must not read its image where they do not depend on the image's path.
        needs_path = captions.column is None or reader.root is not None
        keys = {reader.image_column} if needs_path else set()
        keys |= {captions.column.partition(".")[0]} if captions.column else set()
        keys |= {"__key__", "__url__"} & set(table.column_names)
        self._captions = None if streamed else table.select_columns(sorted(keys))

    def asking(self) -> ImageTextDataSet:
        """Returns the same data set without the rows that have no questions."""
        return ImageTextDataSet(
            self.name, self.table, replace(self.reader, needs_questions=True), streamed=self.streamed
        )

    def __len__(self) -> int:
        """Number of rows; a `TypeError` for a stream."""
        return len(self.table)

    def record(self, row: int) -> Record:
        """Reads a row.

        Raises:
            BadRowError: it cannot be used.
        """
        return self.reader.read(self.table[row], row)

    def name_of(self, row: int) -> str:
        """Returns what to call a row in messages."""
        return self.reader.name(self.table[row], row)

    def captions_of(self, row: int) -> tuple[str, ...]:
        """Returns all captions of a row without reading its image.

        Raises:
            BadRowError: it has none.
        """
        assert self._captions is not None
        cells = self._captions[row]
        return self.reader.captions.read(cells, (cells.get(self.reader.image_column) or {}).get("path"))

    def fingerprint(self) -> str:
        """Returns a hash that changes when a file of the data set changes; for a stream, only when its name does.

        It reads no image: `datasets` hashes its own files, and image files count with their sizes and times.
        """
        digest = hashlib.sha256(repr((self.name if self.streamed else "", self.reader)).encode())
        if not self.streamed:
            digest.update(self.table._fingerprint.encode())
            if self.reader.root is not None:
                for path in self._paths():
                    for file in (path, *((path.with_suffix(".txt"),) if self.reader.captions.kind == "text" else ())):
                        digest.update(_stamp(file))
        return digest.hexdigest()

    def _paths(self) -> Iterator[Path]:
        column = self.table.data.column(self.reader.image_column).combine_chunks().field("path")
        for path in column.to_pylist():
            if path and os.path.isabs(path):
                yield Path(path)


def _stamp(file: Path) -> bytes:
    try:
        status = file.stat()
    except OSError:
        return b"missing"
    return f"{file}{status.st_size}{status.st_mtime_ns}".encode()


def open_data_set(
    spec: str | Path,
    split: str = "train",
    *,
    streaming: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    class_column: str | None = None,
    class_names: Path | None = None,
    templates: Sequence[str] = TEMPLATES,
    config_name: str | None = None,
    cache_dir: Path | None = None,
) -> ImageTextDataSet:
    """Opens a data set of images with captions.

    Args:
        spec: a folder, a Parquet file or a tar, a pattern of such files, a URL, or a name on the hub.
        split: "train", "validation", "test", or whatever a data set on the hub calls it.
        streaming: read rows in order instead of indexing them, without a copy on the disk.
        image_column: the column of images; by default the only one.
        caption_column: the column of captions, strings or lists of strings; by default the first of `CAPTION_COLUMNS`.
        class_column: the column of classes, for data without captions.
        class_names: a JSON file with the names of classes, see `load_class_names`.
        templates: prompts for data with classes, in which {class} is the class's name.
        config_name: the configuration of a data set on the hub.
        cache_dir: where `datasets` keeps its copies; by default where it always does.

    Raises:
        InputError: there is no such data set, split or column, or it has no images or no captions.
        MissingExtraError: `datasets` is not installed.
    """
    datasets = _import_datasets()
    spec = str(spec)
    checked = check_templates(templates)
    names = None if class_names is None else load_class_names(class_names)
    files = find_local_files(spec, split)
    loader: str
    options: dict[str, Any]
    if files is not None:
        loader, options = files.layout, {"data_files": {split: list(files.patterns)}}
        options |= {"drop_labels": True} if files.layout == "imagefolder" else {}
    elif "://" in spec:
        loader = str(layout_of_name(spec) or "")
        if not loader:
            raise InputError(f"{spec} is neither a Parquet file nor a tar; give the URL of one")
        options = {"data_files": {split: [spec]}}
    elif HUB_NAME.fullmatch(spec):
        loader, options = spec, {"name": config_name}
    else:
        raise InputError(f"there is no data set at {spec}; {EXPECTED}, or a name on the hub")
    cache = None if cache_dir is None else str(cache_dir)
    try:
        table = datasets.load_dataset(loader, split=split, streaming=streaming, cache_dir=cache, **options)
        features = table.features if table.features is not None else table._resolve_features().features
    except Exception as error:  # `datasets` raises what its readers, file systems and the network raise
        missing = "" if files or "://" in spec else f"there is no folder {spec}, and as a name on the hub "
        raise InputError(f"{missing}{spec} cannot be read: {one_line(_root_of(error))}") from error
    image = _image_column(spec, features, image_column, datasets)
    captions = _caption_source(spec, features, files, caption_column, class_column, checked, names, datasets)
    root = None if files is None else files.root
    reader = RowReader(image, captions, root, _are_questions(features.get(QUESTIONS)))
    kept = {image, QUESTIONS, "__key__", "__url__", (captions.column or "").partition(".")[0]} & set(features)
    table = table.select_columns(sorted(kept)).cast_column(image, datasets.Image(decode=False))
    try:
        is_empty = next(iter(table), None) is None
    except Exception as error:  # a stream is read only now
        raise InputError(f"{spec} cannot be read: {one_line(_root_of(error))}") from error
    if is_empty:
        raise InputError(f"{spec} contains no images in its split {split!r}")
    return ImageTextDataSet(f"{spec}, {split}", table, reader, streamed=streaming)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:  # missing, or a pyarrow that does not fit numpy
        raise MissingExtraError(
            f"data sets need `datasets`, which cannot be imported ({one_line(error)}); "
            'run: pip install "latte-flow[train]"'
        ) from error
    return datasets


def _root_of(error: BaseException) -> BaseException:
    """Returns the error that `datasets` reports as another one."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _image_column(spec: str, features: Mapping[str, Any], wanted: str | None, datasets: Any) -> str:
    if wanted is not None:
        if wanted not in features:
            raise InputError(f"{spec} has no column {wanted!r}; {_columns(features)}")
        return wanted
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:  # written without `datasets`: bytes, or records of bytes and path
        found = [name for name in ("image", "img", "jpg", "png") if name in features]
    if len(found) != 1:
        problem = "has no column of images" if not found else f"has {len(found)} columns of images"
        raise InputError(f"{spec} {problem}; name one with --image-column; {_columns(features)}")
    return found[0]


def _caption_source(
    spec: str,
    features: Mapping[str, Any],
    files: LocalFiles | None,
    caption_column: str | None,
    class_column: str | None,
    templates: tuple[str, ...],
    names: Mapping[str, tuple[str, ...]] | None,
    datasets: Any,
) -> CaptionSource:
    if caption_column is not None and class_column is not None:
        raise InputError("--caption-column and --class-column exclude each other; give one")
    if caption_column is None and class_column is None and files is not None and files.captions != "column":
        if files.captions == "class":
            _check_names(spec, files.classes, names)
        return CaptionSource(files.captions, templates=templates, class_names=names)
    if class_column is None:
        candidates = CAPTION_COLUMNS if caption_column is None else (caption_column,)
        for column in candidates:
            feature = _feature_of(features, column)
            if feature is None:
                continue
            if not _is_text(feature):
                raise InputError(
                    f"{spec}: the column {column} must contain strings or lists of strings, is {_kind(feature)}; "
                    "name another with --caption-column"
                )
            return CaptionSource("column", column)
        if caption_column is not None:
            raise InputError(f"{spec} has no column {caption_column!r}; {_columns(features)}")
    labelled = [name for name in CLASS_COLUMNS if isinstance(features.get(name), datasets.ClassLabel)]
    labelled += ["cls"] if names is not None and "cls" in features else []
    classes = class_column or next(iter(labelled), None)
    if classes is None:
        raise InputError(
            f"{spec} has no captions: expected a column of strings or lists of strings called "
            f"{', '.join(CAPTION_COLUMNS[:5])}, or a column of classes; {_columns(features)}; "
            "name it with --caption-column or --class-column"
        )
    if classes not in features:
        raise InputError(f"{spec} has no column {classes!r}; {_columns(features)}")
    labels = tuple(features[classes].names) if isinstance(features[classes], datasets.ClassLabel) else ()
    _check_names(spec, labels, names)
    return CaptionSource("class", classes, templates, names, labels)


def _check_names(spec: str, classes: Sequence[str], names: Mapping[str, tuple[str, ...]] | None) -> None:
    """Checks that every class has a name, before any training."""
    missing = [label for label in classes if names is not None and label not in names]
    if missing:
        raise InputError(
            f"{spec}: {len(missing)} of {len(classes)} classes have no name in --class-names, "
            f"the first is {missing[0]!r}"
        )


def _feature_of(features: Mapping[str, Any], column: str) -> Any:
    feature: Any = features
    for name in column.split("."):
        feature = feature.get(name) if isinstance(feature, Mapping) else None
    return feature


def _is_text(feature: Any) -> bool:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    return getattr(inner, "dtype", None) in ("string", "large_string", "string_view")


def _are_questions(feature: Any) -> bool:
    """Returns whether a column is of lists of records of a question and an answer, both text."""
    record = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else None)
    return isinstance(record, Mapping) and all(_is_text(record.get(name)) for name in ("question", "answer"))


def _columns(features: Mapping[str, Any]) -> str:
    return "its columns: " + ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())


def _kind(feature: Any) -> str:
    """Returns the type of a column in a word or two."""
    if isinstance(feature, Mapping):
        return "records"
    inner = getattr(feature, "feature", None)
    if inner is not None:
        return f"lists of {_kind(inner)}"
    kind = type(feature).__name__
    return str(feature.dtype) if kind == "Value" else kind
