"""Fetches the images and names of emoji: npm's `emoji-datasource-google`, made of Google's Noto Emoji.

The package's own files are under the MIT licence, the images under the Apache License 2.0 (github.com/googlefonts/
noto-emoji).
"""

from __future__ import annotations

import json
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

from runtime.errors import InputError, one_line
from runtime.files import check_replaceable, replaced_directory

NAME = "emoji-datasource-google"
VERSION = "16.0.0"
"""The names, and so what is held out, depend on it."""
SOURCE = (
    f"npm package {NAME} {VERSION} (github.com/iamcal/emoji-data, MIT); its images are Noto Emoji by Google "
    "(github.com/googlefonts/noto-emoji, Apache License 2.0)"
)
_WANTED = re.compile(r"package/(emoji\.json|package\.json|LICENSE|README\.md|img/google/64/[0-9a-z-]+\.png)")
_LARGEST_FILE = 8 * 1024**2
_TIMEOUT_S = 900


def fetch(out: Path, tarball: Path | None = None) -> Path:
    """Unpacks what the emoji world needs of the package into a folder: names, images of 64x64 pixels, licence.

    A folder that already has it is left as it is.

    Args:
        out: the folder to create. It appears when it is complete.
        tarball: the package as `npm pack` writes it; by default npm downloads it (74 MB).

    Returns:
        `out`.

    Raises:
        InputError: the folder has other content, npm is not installed or fails, or the tarball is not this package.
    """
    if is_package(out):
        return out
    check_replaceable(out, "package.json", "package", force=True)
    if tarball is not None:
        _unpack(tarball, out)
        return out
    with tempfile.TemporaryDirectory() as folder:
        _unpack(_download(Path(folder)), out)
    return out


def is_package(folder: Path) -> bool:
    """Returns whether a folder is what `fetch` makes."""
    try:
        return is_named_package(folder)
    except InputError:
        return False


def is_named_package(folder: Path) -> bool:
    """Returns whether a folder says that it is the package.

    Raises:
        InputError: it says so, but is of another version, or incomplete.
    """
    try:
        package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(package, dict) or package.get("name") != NAME:
        return False
    _check_identity(package, folder)
    if not (folder / "emoji.json").is_file():
        raise InputError(f"{folder} has no emoji.json; fetch the package again: latte-flow data emoji")
    return True


def _check_identity(package: object, source: Path) -> None:
    found = (package.get("name"), package.get("version")) if isinstance(package, dict) else (None, None)
    if found != (NAME, VERSION):
        raise InputError(f"{source} is {found[0]} {found[1]}; expected {NAME} {VERSION}: npm pack {NAME}@{VERSION}")


def _download(folder: Path) -> Path:
    command = ["npm", "pack", f"{NAME}@{VERSION}", "--silent", "--pack-destination", str(folder)]
    otherwise = f"or pass the file that `npm pack {NAME}@{VERSION}` writes on a machine where it works"
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError as error:
        raise InputError(f"npm, which downloads {NAME}, is not installed; install Node.js, {otherwise}") from error
    except subprocess.TimeoutExpired as error:
        raise InputError(f"npm did not download {NAME} within {_TIMEOUT_S} s; try again, {otherwise}") from error
    except subprocess.CalledProcessError as error:
        reason = " ".join(error.stderr.split())[-300:] or f"exit code {error.returncode}"
        raise InputError(f"npm cannot download {NAME}@{VERSION} ({reason}); check the network, {otherwise}") from error
    return folder / f"{NAME}-{VERSION}.tgz"


def _unpack(tarball: Path, out: Path) -> None:
    """Unpacks the wanted files. Their names follow a fixed pattern, so none can lead out of the folder."""
    with replaced_directory(out) as folder:
        (folder / "img" / "google" / "64").mkdir(parents=True)
        try:
            with tarfile.open(tarball, "r:gz") as archive:
                for member in archive:
                    match = _WANTED.fullmatch(member.name)
                    if match is None or not member.isfile():
                        continue
                    source = archive.extractfile(member)
                    if source is None or member.size > _LARGEST_FILE:
                        raise InputError(f"{tarball} has a file {member.name} of {member.size} bytes; fetch it again")
                    (folder / match[1]).write_bytes(source.read())
        except (OSError, EOFError, tarfile.TarError) as error:
            raise InputError(f"{tarball} cannot be unpacked ({one_line(error)}); fetch it again") from error
        for name in ("package.json", "emoji.json", "LICENSE"):
            if not (folder / name).is_file():
                raise InputError(f"{tarball} contains no package/{name}; expected the package {NAME} {VERSION}")
        try:
            package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"package/package.json in {tarball} is not JSON; fetch it again") from error
        _check_identity(package, tarball)
