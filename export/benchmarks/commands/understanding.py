"""`latte-flow bench understanding`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.commands.report import Against, AsJson, Publisher, app, bundle_for_the_run
from export.benchmarks.understanding import Report, measure
from latte.checkpoint import load_checkpoint
from runtime.console import progress_bar, stdout
from runtime.pipeline import LatteFlowPipeline


@app.command(no_args_is_help=False)
def understanding(
    checkpoint: Annotated[str, typer.Argument(help="`shapes`, or a checkpoint folder.")] = "shapes",
    bundle: Annotated[Path | None, typer.Option(help="Its bundle; exported for the run where none is given.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.", min=2)] = 64,
    rounds: Annotated[int, typer.Option(help="Answers of each side.", min=1)] = 9,
    against: Against = None,
    as_json: AsJson = False,
) -> None:
    """Answer one question about one picture: the engines beside transformers' `generate`.

    \b
    Examples:
      latte-flow bench understanding
      latte-flow bench understanding my-checkpoint --bundle my-bundle --json
    """
    publisher = Publisher(as_json, against)
    with bundle_for_the_run(bundle, checkpoint) as bundle:
        model = load_checkpoint(checkpoint)
        model.vlm.set_attn_implementation("sdpa")
        with LatteFlowPipeline.from_pretrained(bundle) as pipe, progress_bar() as progress:
            task = progress.add_task("answer", total=rounds)
            report = measure(pipe, model, new_tokens, rounds, lambda: progress.advance(task))

    def show() -> None:
        table = Table(
            "",
            "first token",
            "tokens per second",
            title=f"{report.prompt_tokens} tokens of prompt and picture, {report.new_tokens} new ones, {rounds} rounds",
        )
        for side in (report.engines, report.transformers):
            table.add_row(side.name, f"{1000 * side.first_token:.1f} ms", f"{side.rate:.1f}")
        table.add_row(
            "engines are faster by",
            f"{report.transformers.first_token / report.engines.first_token:.2f}x",
            f"{report.engines.rate / report.transformers.rate:.2f}x",
        )
        stdout.print(table)
        stdout.print(f"both sides wrote the same tokens: {'yes' if report.same_tokens else 'NO'}")
        for stage, megabytes in report.memory_mb.items():
            stdout.print(f"memory, {stage}: {megabytes:+.1f} MB", highlight=False)

    publisher.publish(_as_dict(report), show)


def _as_dict(report: Report) -> dict[str, object]:
    sides = (report.engines, report.transformers)
    return {
        "prompt_tokens": report.prompt_tokens,
        "new_tokens": report.new_tokens,
        "same_tokens": report.same_tokens,
        "memory_mb": report.memory_mb,
        **{
            side.name: {
                "first_token_seconds": side.first_token_seconds,
                "tokens_per_second": side.tokens_per_second,
            }
            for side in sides
        },
    }
