"""`latte-flow bench precision`."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from export.benchmarks.commands.report import AsJson, Publisher, app
from export.benchmarks.precision import PARTS, Error, random_flow, study
from export.paper_size import PAPER, one_group
from latte.checkpoint import load_checkpoint
from runtime.console import progress_bar, stdout


@app.command(no_args_is_help=False)
def precision(
    as_json: AsJson = False,
) -> None:
    """What half precision costs each part of an expert that the exporter keeps in fp32.

    \b
    Example:
      latte-flow bench precision
    """
    publisher = Publisher(as_json)
    expert = one_group(PAPER, PAPER.layers_per_group)
    models = {
        "shapes": lambda: load_checkpoint("shapes").flow,
        "hidden 1536, random": lambda: random_flow(expert),
        "hidden 1536, massive channel": lambda: random_flow(expert, massive=True),
    }
    errors: list[Error] = []
    with progress_bar() as progress:
        task = progress.add_task("", total=2 * (len(PARTS) + 2) * len(models))
        for name, make in models.items():
            progress.update(task, description=name)
            for error in study(name, make()):
                errors.append(error)
                progress.advance(task)

    def show() -> None:
        columns = [(model, half) for model in models for half in ("fp16", "bf16")]
        found = {(error.model, error.precision, error.part): error.error for error in errors}
        table = Table("in half precision too", *(f"{model}, {half}" for model, half in columns), title="relative error")
        for part in dict.fromkeys(error.part for error in errors):
            values = (found[(*column, part)] for column in columns)
            table.add_row(part, *("not finite" if value is None else f"{value:.1e}" for value in values))
        stdout.print(table)

    publisher.publish({"errors": [asdict(error) for error in errors]}, show)
