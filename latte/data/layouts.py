"""Which files a local data set has, and in which layout: a folder of images, Parquet files or WebDataset tars."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from runtime.errors import InputError

Layout = Literal["imagefolder", "parquet", "webdataset"]
"""The loader of `datasets` that reads it."""
CaptionKind = Literal["column", "text", "class"]
"""Where captions are: in a column, in a .txt file beside each image, or in the name of its folder."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Names of folders, and parts of file names, that say which split they contain."""
EXPECTED = (
    "expected a folder of images with metadata.jsonl (file_name, text), with a .txt file beside each image or with a "
    "folder for each class; or Parquet files, or WebDataset tars"
)


@dataclass(frozen=True)
class LocalFiles:
    """The files of one split of a local data set."""

    layout: Layout
    patterns: tuple[str, ...]
    """What `datasets` is to read, as glob patterns."""
    root: Path
    """The folder that the paths of images must not leave."""
    captions: CaptionKind = "column"
    classes: tuple[str, ...] = ()
    """Names of the class folders, in order."""


def find_local_files(spec: str, split: str) -> LocalFiles | None:
    """Finds the files of a split of a local data set; None if `spec` is neither a path nor a pattern of local files.

    Raises:
        InputError: there are no images or no captions, or there is no such split.
    """
    path = Path(spec)
    if path.is_dir():
        return _files_of_folder(path, split)
    matches = [path] if path.is_file() else sorted(Path(match) for match in glob.glob(spec, recursive=True))
    if not matches:
        return None
    layout = layout_of_name(matches[0].name)
    if layout is None or any(layout_of_name(match.name) != layout for match in matches):
        raise InputError(f"{spec} cannot be read as a data set: {EXPECTED}")
    return _split_of_files(spec, layout, matches, Path(os.path.commonpath([m.parent for m in matches])), split)


def layout_of_name(name: str) -> Layout | None:
    """Returns the loader for a file's name or URL, if it is a Parquet file or a tar."""
    suffix = name.partition("?")[0].lower()
    if suffix.endswith(".parquet"):
        return "parquet"
    return "webdataset" if suffix.endswith((".tar", ".tar.gz", ".tgz")) else None


def split_of_name(name: str) -> str | None:
    """Returns the split that a file's name says it belongs to: `train` for train-00000-of-00002.parquet."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, known in SPLIT_WORDS.items() if any(word in known for word in words)), None)


def _files_of_folder(root: Path, split: str) -> LocalFiles:
    images: list[Path] = []
    others: list[Path] = []
    extensions = {extension for extension, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    links: list[Path] = []  # folders that `datasets` does not look into unless it is told to
    seen = {os.path.realpath(root)}
    for folder, folders, names in os.walk(root, followlinks=True):
        for name in [name for name in folders if os.path.islink(os.path.join(folder, name))]:
            target = os.path.realpath(os.path.join(folder, name))
            if target in seen or os.path.realpath(root).startswith(f"{target}{os.sep}"):
                folders.remove(name)  # a circle
            elif not name.startswith("."):
                seen.add(target)
                links.append(Path(folder, name))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                is_image = os.path.splitext(name)[1].lower() in extensions
                (images if is_image else others).append(Path(folder, name))
    if images:
        return _files_of_images(root, images, others, links, split)
    for layout in ("parquet", "webdataset"):
        if files := [path for path in others if layout_of_name(path.name) == layout]:
            return _split_of_files(str(root), layout, files, root, split)
    raise InputError(f"{root} contains no images: found {_summary(others)}; {EXPECTED}")


def _files_of_images(root: Path, images: list[Path], others: list[Path], links: list[Path], split: str) -> LocalFiles:
    # The names of image files say nothing of splits: test_1.png may be any image.
    folders = {path.relative_to(root).parts[0].lower(): path.relative_to(root).parts[0] for path in images}
    folders_of_splits = {
        name: folders[word] for name, words in SPLIT_WORDS.items() for word in words if word in folders
    }
    describes_all = any(path.name in METADATA and path.parent == root for path in others)
    if folders_of_splits and len(folders_of_splits) == len(folders) and not describes_all:
        _check_split(root, split, folders_of_splits)
        top = root / folders_of_splits[split]
        images, others = ([path for path in paths if path.is_relative_to(top)] for paths in (images, others))
    else:
        _check_split(root, split, {"train": ""})
        top = root
    tops = [top, *(link for link in links if link.is_relative_to(top) and link != top)]
    patterns = tuple(f"{glob.escape(str(folder))}/**" for folder in tops)
    if any(path.name in METADATA for path in others):
        return LocalFiles("imagefolder", patterns, top)
    texts = {path.with_suffix("") for path in others if path.suffix == ".txt"}
    if any(path.with_suffix("") in texts for path in images):
        return LocalFiles("imagefolder", patterns, top, "text")
    if classes := tuple(sorted({path.parent.name for path in images if path.parent != top})):
        return LocalFiles("imagefolder", patterns, top, "class", classes)
    raise InputError(f"{top} has no captions: found {_summary(images + others)}; {EXPECTED}")


def _split_of_files(spec: str, layout: Layout, files: list[Path], root: Path, split: str) -> LocalFiles:
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(split_of_name(str(path.relative_to(root))) or "", []).append(path)
    if list(by_split) == [""]:
        by_split = {"train": by_split[""]}
    _check_split(spec, split, by_split)
    return LocalFiles(layout, tuple(glob.escape(str(path)) for path in by_split[split]), root)


def _check_split(
    spec: str | Path, split: str, splits: dict[str, object] | dict[str, str] | dict[str, list[Path]]
) -> None:
    if split not in splits:
        known = ", ".join(sorted(name for name in splits if name)) or "none"
        raise InputError(f"{spec} has no split {split!r}; its splits: {known}")


def _summary(paths: list[Path]) -> str:
    """Returns what files a folder contains, by their suffixes."""
    counts = Counter(path.suffix.lower() or path.name for path in paths)
    return ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common(5)) or "no files"
