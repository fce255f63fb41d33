"""A job: an input, a bundle and options, and how far it is.

The rows of shard k are the rows from k·S on, in the order of the input. A shard is finished or not there, so that the
progress of a job is the set of its finished shards, and a job that was killed goes on with the others. `job.json` says
which job it is: another one does not go on in its place.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtime.batch.outputs import Format, Output, count_failed, parquet_to_write, remove_temporaries, unwritable
from runtime.batch.reading import RowOptions, hash_of, read_rows
from runtime.batch.rows import Row
from runtime.batch.shard import ENCODERS, PendingResult, ShardOptions, start_shard
from runtime.errors import EngineError, InputError, one_line
from runtime.files import make_writable_folder, sha256_of, write_text
from runtime.manifest import FILE_NAME, Manifest, load_manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import RequestKind
from runtime.serving.service import ServedModel, warm_up

JOB_FILE = "job.json"
VERSION = 1
ROWS_PER_SHARD = 256


@dataclass(frozen=True)
class Job:
    """What to run, and where its results go."""

    source: Path
    folder: Path
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

    def row_ended(self) -> None:
        """A row is finished or has failed."""


def run_job(job: Job, watcher: Watcher | None = None) -> Report:
    """Runs what is left of a job.

    Raises:
        InputError: the input cannot be read, the output cannot be written, or another job's progress is there.
        BundleError: the bundle cannot be used.
        EngineError: the engines cannot run.
    """
    watcher = watcher or Watcher()
    manifest = load_manifest(job.bundle)
    if job.format == "parquet":
        parquet_to_write()
    with _locked(job.folder):
        plan = _open(job, watcher)
        remove_temporaries(job.folder)
        model = ServedModel.of(manifest, job.shard.model_name)
        output = Output(job.folder, job.format, plan.kinds, job.rows.keep, model, manifest.bundle_hash())
        _run_shards(job, plan, output, manifest, watcher)
        return Report(plan.rows, count_failed(job.folder))


def _run_shards(job: Job, plan: Plan, output: Output, manifest: Manifest, watcher: Watcher) -> None:
    size = job.rows_per_shard
    shards = range(-(-plan.rows // size))
    finished = {shard for shard in shards if output.is_finished(shard)}
    watcher.start(plan.rows, sum(min(size, plan.rows - shard * size) for shard in finished))
    if len(finished) == len(shards):
        return
    rows = read_rows(job.source, job.rows)
    pipeline = LatteFlowPipeline.from_pretrained(job.bundle, job.provider, job.provider_options)
    with pipeline, ThreadPoolExecutor(ENCODERS) as encoders, ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for shard in shards:
            of_shard = list(itertools.islice(rows, size))
            if shard in finished:
                continue
            pending = start_shard(pipeline, of_shard, job.shard, encoders, watcher.row_ended)
            _check_engines(pipeline, pending)
            if written is not None:
                written.result()
            written = writer.submit(_write, output, shard, pending)
        if written is not None:
            written.result()


def _write(output: Output, shard: int, pending: list[PendingResult]) -> None:
    output.write(shard, [one.result() for one in pending])


def _check_engines(pipeline: LatteFlowPipeline, pending: list[PendingResult]) -> None:
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


def _open(job: Job, watcher: Watcher) -> Plan:
    """Returns the plan of a job, which is made when it is run for the first time."""
    path = job.folder / JOB_FILE
    new = job.fingerprint()
    if not path.exists():
        plan = _plan(job, watcher)
        try:
            write_text(path, json.dumps({**new, "plan": asdict(plan)}, indent=2) + "\n")
        except OSError as error:
            raise unwritable(path, error) from error
        return plan
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**{**old["plan"], "kinds": tuple(old["plan"]["kinds"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the file of a job: {one_line(error)}; name another folder") from error
    if changed := [name.replace("_", " ") for name, value in new.items() if old.get(name) != value]:
        raise InputError(
            f"{job.folder} has the progress of another job: other {', '.join(changed)}; "
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


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps a second run of the same job out; the lock ends with the process, however that ends.

    Raises:
        InputError: the folder cannot be written, has other files, or another run writes there.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the results")
    if folder.is_dir() and any(path.name != ".lock" for path in folder.iterdir()) and not (folder / JOB_FILE).exists():
        raise InputError(f"{folder} is not empty and has no progress of a job; name another folder")
    make_writable_folder(folder)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another run writes to {folder}; wait for it, or name another folder") from error
        yield
