"""Fetching the package: only what is wanted is unpacked, nothing leaves the folder, failures are one clear line."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from latte.emoji.package import NAME, VERSION, fetch
from latte.training.arguments import drawn_world
from runtime.errors import InputError


def archive_of(path: Path, members: dict[str, bytes], links: tuple[str, ...] = ()) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            archive.addfile(info)
    return path


def contents(version: str = VERSION) -> dict[str, bytes]:
    identity = json.dumps({"name": NAME, "version": version}).encode()
    return {"package/package.json": identity, "package/emoji.json": b"[]", "package/LICENSE": b"MIT"}


def test_only_names_images_and_licence_are_unpacked(package: Path) -> None:
    found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
    assert {"emoji.json", "package.json", "LICENSE", "img/google/64/1f300.png"} <= found
    assert "index.js" not in found


def test_a_package_that_is_there_is_not_fetched_again(package: Path) -> None:
    before = (package / "emoji.json").stat().st_mtime_ns
    assert fetch(package, Path("no/such.tgz")) == package
    assert (package / "emoji.json").stat().st_mtime_ns == before


def test_nothing_is_written_outside_the_folder(tmp_path: Path) -> None:
    members = {**contents(), "package/../../evil.txt": b"x", "/evil.txt": b"x", "package/img/google/64/../x.png": b"x"}
    fetch(tmp_path / "in" / "out", archive_of(tmp_path / "a.tgz", members, ("package/img/google/64/1f600.png",)))
    written = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"a.tgz", "package.json", "emoji.json", "LICENSE"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (contents("15.0.0"), r"15\.0\.0; expected emoji-datasource-google 16"),
        ({"package/LICENSE": b"MIT"}, "contains no package/package.json"),
        ({**contents(), "package/package.json": b"{"}, "is not JSON"),
    ],
)
def test_another_tarball_is_refused_and_leaves_nothing(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    path = archive_of(tmp_path / "a.tgz", members)
    with pytest.raises(InputError, match=message):
        fetch(tmp_path / "out", path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tgz"]


def test_a_cut_tarball_is_refused(tmp_path: Path, tarball: Path) -> None:
    path = tmp_path / "cut.tgz"
    path.write_bytes(tarball.read_bytes()[:2000])
    with pytest.raises(InputError, match="cannot be unpacked"):
        fetch(tmp_path / "out", path)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_content_is_left_alone(tmp_path: Path, tarball: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty and contains no package"):
        fetch(tmp_path, tarball)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_package_of_another_version_is_no_folder_of_images(tmp_path: Path) -> None:
    """It was taken for a data set of class folders: "a photo of 64"."""
    (tmp_path / "package.json").write_text(json.dumps({"name": NAME, "version": "15.1.2"}))
    with pytest.raises(InputError, match=f"{NAME} 15.1.2; expected {NAME} {VERSION}"):
        drawn_world(str(tmp_path), 0)
    (tmp_path / "package.json").write_text(json.dumps({"name": NAME, "version": VERSION}))
    with pytest.raises(InputError, match=r"has no emoji\.json; fetch the package again"):
        drawn_world(str(tmp_path), 0)
    (tmp_path / "package.json").write_text(json.dumps({"name": "another"}))
    assert drawn_world(str(tmp_path), 0) is None


def test_without_npm_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm, which downloads .+ is not installed; install Node\.js, or pass"):
        fetch(tmp_path / "out")


def test_an_npm_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network unreachable' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"npm error network unreachable\); check the network"):
        fetch(tmp_path / "out")
    assert not (tmp_path / "out").exists()
