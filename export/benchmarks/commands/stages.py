"""`latte-flow bench stages`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import Against, AsJson, ProviderName, Publisher, app, bundle_for_the_run
from export.benchmarks.stages import measure_stages
from runtime.console import stdout
from runtime.pipeline import DEFAULT_STEPS


@app.command(no_args_is_help=False)
def stages(
    bundle: Annotated[Path | None, typer.Option(help="A bundle; `shapes` is exported where none is given.")] = None,
    provider: ProviderName = "cpu",
    images: Annotated[int, typer.Option(help="Pictures in a call.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Calls.", min=1)] = 9,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of the last call here.")] = None,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Where a call's time goes: tokeniser, prefix, each expert, solver, decoder, and the host between steps.

    \b
    Examples:
      latte-flow bench stages
      latte-flow bench stages --bundle my-bundle --images 8 --trace trace.json
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle) as bundle:
        profile = measure_stages(bundle, provider, images, rounds, trace)

    def show() -> None:
        table = Table(
            "stage", "runs", "ms", "share", title=f"{images} image{'s' * (images > 1)}, {DEFAULT_STEPS} steps"
        )
        for stage in profile.stages:
            share = f"{stage.seconds / profile.seconds:.1%}"
            table.add_row(stage.what, str(stage.runs or ""), f"{1000 * stage.seconds:.2f}", share)
        table.add_row("all", "", f"{1000 * profile.seconds:.2f}", "")
        stdout.print(table)
        stdout.print(f"host between steps: {profile.host_share_of_a_step:.1%} of a step")

    publisher.publish({"provider": provider, "images": images} | asdict(profile), show)
