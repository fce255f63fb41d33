"""A job: an input, a bundle and options, and how far it is.

The rows of shard k are the rows from k·S on, in the order of the input. A shard is finished or not there, so that the
progress of a job is the set of its finished shards, and a job that was killed goes on with the others. `job.json` says
which job it is: another one does not go on in its place.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.batch.folders import ResultFolder, result_folder, unwritable
from runtime.batch.outputs import ERRORS, Format, Output, check_kept, count_failed, parquet_to_write
from runtime.batch.places import Place, reason_of
from runtime.batch.reading import RowOptions, hash_of, read_rows
from runtime.batch.rows import Row
from runtime.batch.shard import ENCODERS, PendingResult, ShardOptions, start_shard
from runtime.errors import EngineError, InputError, one_line
from runtime.files import sha256_of
from runtime.manifest import FILE_NAME, load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import RequestKind
from runtime.serving.service import ServedModel, warm_up

JOB_FILE = "job.json"
VERSION = 1
ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class Job:
    """What to run, and where its results go."""

    source: Place
    folder: Place
    bundle: Path
    format: Format = "parquet"
    rows_per_shard: int = ROWS_PER_SHARD
    rows: RowOptions = field(default_factory=RowOptions)
    shard: ShardOptions = field(default_factory=ShardOptions)
    provider: str = "cpu"
    provider_options: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> dict[str, Any]:
        """Returns what must not change between the runs of a job."""
        return {
            "version": VERSION,
            "bundle": sha256_of(self.bundle / FILE_NAME),
            "input": hash_of(self.source),
            "format": self.format,
            "rows_per_shard": self.rows_per_shard,
            "options": json.loads(json.dumps({**asdict(self.rows), **asdict(self.shard)})),
            "provider": {"name": self.provider, **self.provider_options},
        }


@dataclass(frozen=True)
class Plan:
    """What a job's input contains."""

    rows: int
    bad: int
    """Rows that cannot be run."""
    kinds: tuple[RequestKind, ...]


@dataclass(frozen=True)
class Report:
    """What became of a job."""

    rows: int
    failed: int


class Watcher:
    """Told how a job gets on; does nothing by itself."""

    def bad_row(self, row: Row) -> None:
        """A row cannot be run."""

    def start(self, rows: int, finished: int) -> None:
        """Rows begin to be run; some are finished from before."""

    def ready(self) -> None:
        """The engines are loaded."""

    def row_ended(self) -> None:
        """A row is finished or has failed."""


Runner = Callable[["Job", Sequence[int], Output, Watcher], None]
"""Runs and writes shards of a job, whose numbers it is given."""


def run_job(job: Job, watcher: Watcher | None = None, runner: Runner | None = None) -> Report:
    """Runs what is left of a job.

    Args:
        runner: runs the shards; by default one pipeline in this process.

    Raises:
        InputError: the input cannot be read, the output cannot be written, or another job's progress is there.
        BundleError: the bundle cannot be used.
        EngineError: the engines cannot run.
    """
    watcher = watcher or Watcher()
    manifest = load_manifest(job.bundle)
    if job.format == "parquet":
        parquet_to_write()
    folder = result_folder(job.folder.absolute())
    folder.prepare(JOB_FILE)
    with folder.alone():
        plan = _open(job, folder, watcher)
        folder.remove_temporaries(ERRORS)
        model = ServedModel.of(manifest, job.shard.model_name)
        output = Output(folder, job.format, plan.kinds, job.rows.keep, model, manifest.bundle_hash())
        size = job.rows_per_shard
        shards = range(-(-plan.rows // size))
        finished = output.finished(shards)
        watcher.start(plan.rows, sum(min(size, plan.rows - shard * size) for shard in finished))
        if left := [shard for shard in shards if shard not in finished]:
            (runner or _run_here)(job, left, output, watcher)
        return Report(plan.rows, count_failed(folder))


def read_shards(job: Job, left: Sequence[int]) -> Iterator[tuple[int, list[Row]]]:
    """Yields the rows of shards, whose numbers ascend."""
    rows = read_rows(job.source, job.rows)
    wanted = set(left)
    for shard in range(left[-1] + 1):
        of_shard = list(itertools.islice(rows, job.rows_per_shard))
        if shard in wanted:
            yield shard, of_shard


def _run_here(job: Job, left: Sequence[int], output: Output, watcher: Watcher) -> None:
    pipeline = LatteFlowPipeline.from_pretrained(job.bundle, job.provider, job.provider_options)
    watcher.ready()
    with pipeline, ThreadPoolExecutor(ENCODERS) as encoders, ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for shard, rows in read_shards(job, left):
            pending = start_shard(pipeline, rows, job.shard, encoders, watcher.row_ended)
            check_engines(pipeline, pending)
            if written is not None:
                written.result()
            written = writer.submit(_write, output, shard, pending)
        if written is not None:
            written.result()


def _write(output: Output, shard: int, pending: list[PendingResult]) -> None:
    output.write(shard, [one.result() for one in pending])


def check_engines(pipeline: LatteFlowPipeline, pending: list[PendingResult]) -> None:
    """Looks whether the engines still work where a row failed in them: a lost device must not use up the rows.

    Raises:
        EngineError: they do not.
    """
    if not any(one.error is not None and not isinstance(one.error, InputError) for one in pending):
        return
    try:
        warm_up(pipeline)
    except Exception as error:
        raise EngineError(
            f"the engines do not work any more: {one_line(error)}; finished shards stay: run the same command again"
        ) from error


def _open(job: Job, folder: ResultFolder, watcher: Watcher) -> Plan:
    """Returns the plan of a job, which is made when it is run for the first time."""
    new = job.fingerprint()
    try:
        found = folder.read(JOB_FILE)
    except OSError as error:
        raise InputError(f"cannot read {folder}/{JOB_FILE}: {reason_of(error)}") from error
    if found is None:
        plan = _plan(job, watcher)
        check_kept(job.rows.keep, plan.kinds, job.format)
        try:
            folder.write(JOB_FILE, (json.dumps({**new, "plan": asdict(plan)}, indent=2) + "\n").encode())
        except OSError as error:
            raise unwritable(f"{folder}/{JOB_FILE}", error) from error
        return plan
    try:
        old = json.loads(found.decode())
        plan = Plan(**{**old["plan"], "kinds": tuple(old["plan"]["kinds"])})
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder}/{JOB_FILE} is not the file of a job: {one_line(error)}; name another folder"
        ) from error
    if changed := [name.replace("_", " ") for name, value in new.items() if old.get(name) != value]:
        raise InputError(
            f"{folder} has the progress of another job: other {', '.join(changed)}; "
            "name another folder, or delete this one to start again"
        )
    return plan


def _plan(job: Job, watcher: Watcher) -> Plan:
    """Reads the whole input once, so that what is wrong with it is said before anything runs."""
    kinds: Counter[RequestKind] = Counter()
    bad = 0
    for row in read_rows(job.source, job.rows):
        if row.error:
            bad += 1
            watcher.bad_row(row)
        else:
            kinds[row.kind] += 1
    if not bad + kinds.total():
        raise InputError(f"{job.source} has no rows")
    return Plan(bad + kinds.total(), bad, tuple(sorted(kinds)))
