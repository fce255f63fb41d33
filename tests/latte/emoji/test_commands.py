"""`latte-flow data emoji`, from the tarball to the folder."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from latte.emoji.commands import app


def test_the_command_writes_a_data_set_and_keeps_the_package(tmp_path: Path, tarball: Path) -> None:
    arguments = ["emoji", str(tmp_path / "emoji"), "--tarball", str(tarball), "--count", "3", "--test-count", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "wrote 3 images and 2 held-out ones" in result.output
    assert (tmp_path / "emoji" / "data" / "test-00000-of-00001.parquet").is_file()
    assert (tmp_path / "emoji-package" / "emoji.json").is_file()
