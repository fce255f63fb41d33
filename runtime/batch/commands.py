"""The command `run-batch`."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from runtime.batch.cluster import Pool, on_ray
from runtime.batch.job import ROWS_PER_SHARD, Job, Runner, Watcher, run_job
from runtime.batch.outputs import ERRORS, Format
from runtime.batch.places import place_of
from runtime.batch.reading import DEFAULT_QUESTION, RowOptions
from runtime.batch.rows import Row
from runtime.batch.shard import ShardOptions
from runtime.commands import AsJson, Bundle, Provider, ProviderOption
from runtime.console import parse_pairs, stderr
from runtime.errors import InputError

ROWS_FAILED = 3
"""Exit code of a job that is finished, but for rows that failed."""
SHOWN = 10
"""Number of bad rows that are shown; all are in the file of errors."""


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} rows/s")


class _Shown(Watcher):
    """Shows a job on stderr."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("read", total=None)
        self.bad = 0

    def bad_row(self, row: Row) -> None:
        self.bad += 1
        if self.bad <= SHOWN:
            self._progress.console.print(f"{row.place}: {row.error}", style="yellow", markup=False, soft_wrap=True)

    def start(self, rows: int, finished: int) -> None:
        if self.bad > SHOWN:
            self._progress.console.print(f"… and {self.bad - SHOWN} more rows that cannot be run", style="yellow")
        self._progress.remove_task(self._task)
        self._task = self._progress.add_task("rows", total=rows, completed=finished)

    def row_ended(self) -> None:
        self._progress.advance(self._task)


def run_batch(
    source: Annotated[
        str,
        typer.Argument(metavar="INPUT", help="JSON lines, CSV, Parquet, a text file, a folder; or the URL of one."),
    ],
    output: Annotated[
        str, typer.Argument(metavar="OUTPUT", help="Folder for the results, and for the progress; or a URL.")
    ],
    bundle: Bundle,
    format_: Annotated[Format, typer.Option("--format", help="What the results are written as.")] = "parquet",
    negative_prompt: Annotated[str | None, typer.Option(help="For rows that have none.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="For rows that have none.", min=1)] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="For rows that have none.")] = None,
    shift: Annotated[float | None, typer.Option(help="For rows that have none.")] = None,
    question: Annotated[str, typer.Option(help="For rows with an image and no question.")] = DEFAULT_QUESTION,
    max_new_tokens: Annotated[int | None, typer.Option(help="For rows that have none.", min=1)] = None,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Carry a column to the output; may be repeated.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Read only this column; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Run only the first rows.", min=1)] = None,
    rows_per_shard: Annotated[
        int,
        typer.Option(
            help="Rows in an output file; an interruption costs the one being made and the one being written.", min=1
        ),
    ] = ROWS_PER_SHARD,
    batch_size: Annotated[int, typer.Option(help="Number of images that share a run of an engine.", min=1)] = 16,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(metavar="HOST", help="Fetch images from this host by http; may be repeated. None by default."),
    ] = None,
    model_name: Annotated[str, typer.Option(help="Name of the model in OpenAI's requests.")] = "latte-flow",
    ray: Annotated[bool, typer.Option("--ray", help="Run on Ray Data, on this machine.")] = False,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on this Ray cluster, such as auto or HOST:6379.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Pipelines on Ray; by default as many as fit.", min=1, show_default=False)
    ] = None,
    cpus_per_worker: Annotated[
        float | None, typer.Option(help="CPUs of each of them; 1 by default.", min=0, show_default=False)
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(help="GPUs of each of them; none by default.", min=0, show_default=False)
    ] = None,
    provider: Provider = "cpu",
    provider_option: ProviderOption = None,
    as_json: AsJson = False,
) -> None:
    """Draw and answer all rows of a file; start it again to go on after an interruption.

    A row with a prompt is drawn, a row with an image or a question is answered. The exit code is 0, or 3 if rows
    failed; those are in OUTPUT/errors.

    \b
    Examples:
      latte-flow run-batch prompts.txt drawn demo/bundle
      latte-flow run-batch rows.csv drawn demo/bundle --format png --num-inference-steps 40
      latte-flow run-batch requests.jsonl answered demo/bundle --format openai
      latte-flow run-batch photos captions demo/bundle --question "describe the image"
      latte-flow run-batch drawn captions demo/bundle --columns id --columns image
      latte-flow run-batch s3://bucket/rows.jsonl s3://bucket/drawn demo/bundle
      latte-flow run-batch rows.jsonl drawn demo/bundle --ray --workers 4 --cpus-per-worker 2
    """
    given = {
        "negative_prompt": negative_prompt,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "shift": shift,
        "max_new_tokens": max_new_tokens,
    }
    defaults = {name: value for name, value in given.items() if value is not None}
    folder = place_of(output)
    job = Job(
        place_of(source),
        folder,
        bundle,
        format_,
        rows_per_shard,
        RowOptions(defaults, question, tuple(keep or ()), tuple(columns or ()), limit),
        ShardOptions(batch_size, model_name, tuple(allow_image_host or ())),
        provider,
        parse_pairs(provider_option, "--provider-option"),
    )
    where: AbstractContextManager[Runner | None] = nullcontext()
    if ray or ray_address is not None:
        cpus = 1.0 if cpus_per_worker is None else cpus_per_worker
        where = on_ray(Pool(ray_address, workers, cpus, gpus_per_worker or 0.0))
    else:
        of_ray = {"workers": workers, "cpus-per-worker": cpus_per_worker, "gpus-per-worker": gpus_per_worker}
        if needless := [name for name, value in of_ray.items() if value is not None]:
            raise InputError(f"--{needless[0]} needs --ray or --ray-address; without them one pipeline runs")
    shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with where as runner, Progress(*shown, console=stderr, disable=not stderr.is_terminal) as progress:
        report = run_job(job, _Shown(progress), runner)
    if as_json:
        typer.echo(json.dumps({"output": str(output), "rows": report.rows, "failed": report.failed}))
    else:
        failed = f", {report.failed} failed: see {folder / ERRORS}" if report.failed else ""
        typer.echo(f"{report.rows} rows in {output}{failed}")
    if report.failed:
        raise typer.Exit(ROWS_FAILED)
