"""The commands that make data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latte.emoji.data_set import TEST_COUNT, TRAIN_COUNT, build
from latte.emoji.package import NAME, VERSION, fetch
from runtime.console import command_group, stdout

app = command_group("Make data sets to train on.\n\n\b\nExample:\n  latte-flow data emoji data/emoji")


@app.command("emoji", no_args_is_help=True)
def emoji(
    out: Annotated[Path, typer.Argument(help="Folder of the data set to write.", metavar="OUT")],
    package: Annotated[
        Path | None, typer.Option(help="Folder of the unpacked package; by default OUT-package.", metavar="FOLDER")
    ] = None,
    tarball: Annotated[
        Path | None,
        typer.Option(help=f"What `npm pack {NAME}@{VERSION}` wrote; by default npm downloads it.", metavar="FILE"),
    ] = None,
    count: Annotated[int, typer.Option(help="Number of images to train on.", min=1)] = TRAIN_COUNT,
    test_count: Annotated[int, typer.Option(help="Number of held-out images.", min=1)] = TEST_COUNT,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.", min=0)] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace a data set that is there.")] = False,
) -> None:
    """Draw scenes of emoji with captions and questions, from the images of an npm package (74 MB).

    \b
    Examples:
      latte-flow data emoji data/emoji
      latte-flow data emoji data/emoji --count 20000 --force
    """
    unpacked = fetch(package if package is not None else out.with_name(f"{out.name}-package"), tarball)
    build(unpacked, out, count, seed, test_count=test_count, force=force)
    stdout.print(f"wrote {count:,} images and {test_count:,} held-out ones to {out}", soft_wrap=True)
