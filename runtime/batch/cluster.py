"""The shards of a job on Ray Data: one task reads rows, a pool of actors with a pipeline each runs and writes shards.

A shard is what a worker is given, and what a worker writes, so that results do not depend on how many workers there
are, and a worker that dies costs the shard that it was running. The finished shards are the progress, as they are on
one machine. Ray's own checkpoints would be a second record of it: docs/log.md says why they are not used.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import socket
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from runtime.batch.job import JOB_FILE, Job, Runner, Watcher, check_engines, read_shards
from runtime.batch.outputs import Output
from runtime.batch.shard import ENCODERS, start_shard
from runtime.errors import BundleError, EngineError, InputError, LatteFlowError, MissingExtraError, one_line
from runtime.files import sha256_of
from runtime.manifest import FILE_NAME
from runtime.pipeline import LatteFlowPipeline

READER_CPUS = 0.5
"""What the task that reads rows takes. A pool that leaves less than that waits for its first row for ever."""
TRIES = 4
"""How often a shard is tried whose worker dies under it."""
SHARE_IT = "use a folder that all machines share, or a URL"
AHEAD = 2
"""Shards that a worker has: the one that it runs, and the next."""


@dataclass(frozen=True)
class Pool:
    """Where workers run, and what each takes."""

    address: str | None = None
    """Of a Ray cluster; None starts Ray on this machine."""
    workers: int | None = None
    """None for as many as fit."""
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0


def size_of_pool(pool: Pool, nodes: Sequence[Mapping[str, float]]) -> int:
    """Returns the number of workers.

    Args:
        nodes: the resources of each machine, as Ray names them.

    Raises:
        InputError: they do not fit, beside the task that reads.
    """

    def fitting(cpus: float, gpus: float) -> int:
        by_cpus = cpus / pool.cpus_per_worker if pool.cpus_per_worker else math.inf
        by_gpus = gpus / pool.gpus_per_worker if pool.gpus_per_worker else math.inf
        return math.floor(min(by_cpus, by_gpus) + 1e-9) if min(by_cpus, by_gpus) < math.inf else 0

    sizes = [(node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes]
    places = [fitting(*size) for size in sizes]
    most = max(
        (
            sum(places) - places[i] + fitting(cpus - READER_CPUS, gpus)
            for i, (cpus, gpus) in enumerate(sizes)
            if cpus >= READER_CPUS
        ),
        default=0,
    )
    if (pool.workers or 1) <= most:
        return pool.workers or most
    number = pool.workers or 1
    wanted = f"{number} worker{'s' * (number > 1)} of {pool.cpus_per_worker:g} CPUs"
    there = f"{sum(cpus for cpus, _ in sizes):g} CPUs"
    if pool.gpus_per_worker:
        wanted += f" and {pool.gpus_per_worker:g} GPUs"
        there += f" and {sum(gpus for _, gpus in sizes):g} GPUs"
    raise InputError(
        f"{wanted} do not fit beside the reader, which takes {READER_CPUS}: Ray has {there}, and the job would wait "
        f"for ever; {most} fit: change --workers or --cpus-per-worker"
    )


@contextmanager
def on_ray(pool: Pool) -> Iterator[Runner]:
    """Yields what runs the shards of a job on Ray.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: Ray cannot be reached or started, or the pool does not fit.
    """
    ray = _import_ray()
    with _connected(ray, pool.address):
        workers = size_of_pool(pool, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield partial(_run_on_ray, ray, replace(pool, workers=workers))


def _run_on_ray(ray: Any, pool: Pool, job: Job, left: Sequence[int], output: Output, watcher: Watcher) -> None:
    """Runs shards.

    Raises:
        InputError: a worker cannot read or write what it has to.
        EngineError: the engines of a worker do not work, or workers died again and again.
    """
    job = replace(job, source=job.source.absolute(), bundle=job.bundle.absolute())
    errors = {error.__name__: error for error in (InputError, BundleError)}
    for report in _reports(ray, pool, job, left, output):
        if report["error"]:
            raise errors.get(report["kind"], EngineError)(report["error"])
        for _ in range(report["rows"]):
            watcher.row_ended()
    if missing := set(left) - output.finished(left):
        raise InputError(
            f"{len(missing)} parts that workers wrote are not in {output.folder}, such as "
            f"{output.name(min(missing))}; {SHARE_IT}"
        )


def _reports(ray: Any, pool: Pool, job: Job, left: Sequence[int], output: Output) -> Iterator[dict[str, Any]]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it prints its plan
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # a shard is a block, and goes to a worker of its own
    with ray.data.DataContext.current(context):
        data = ray.data.read_datasource(_shards_as_datasource(job, left), override_num_blocks=1, num_cpus=READER_CPUS)
        threads = {"threads": str(max(1, int(pool.cpus_per_worker)))} if job.provider == "cpu" else {}
        arguments = (
            replace(job, provider_options={**threads, **job.provider_options}),
            output,
            output.folder.read(JOB_FILE),
            sha256_of(job.bundle / FILE_NAME),
        )
        with warnings.catch_warnings():
            # Until 2.64 nothing else limits the tries, without which a part that ends its worker is run for ever.
            warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
            reports = data.map(
                ShardWorker,
                fn_constructor_args=arguments,
                compute=ray.data.ActorPoolStrategy(size=pool.workers, max_tasks_in_flight_per_actor=AHEAD),
                num_cpus=pool.cpus_per_worker,
                num_gpus=pool.gpus_per_worker,
                # It also keeps Ray from running the reader inside one of the workers, which needs equal arguments.
                max_task_retries=TRIES - 1,
            )
        try:
            yield from reports.iter_rows()
        except ray.exceptions.RayError as error:
            raise EngineError(
                f"Ray gave up: {one_line(error)[:300]}; finished shards stay: run the same command again"
            ) from error


class ShardWorker:
    """Runs and writes shards with a pipeline of its own. An error is returned: Ray would wrap it."""

    def __init__(self, job: Job, output: Output, job_file: bytes, manifest_hash: str) -> None:
        self._job, self._output = job, output
        self._error: LatteFlowError | None = None
        here = socket.gethostname()
        try:
            if output.folder.read(JOB_FILE) != job_file:
                raise InputError(
                    f"a worker on {here} does not see {output.folder}; use a folder that all share, or a URL"
                )
            manifest = job.bundle / FILE_NAME
            if not manifest.exists() or sha256_of(manifest) != manifest_hash:
                raise BundleError(
                    f"a worker on {here} does not have the bundle {job.bundle}; put it there on each machine"
                )
            self._pipeline = LatteFlowPipeline.from_pretrained(job.bundle, job.provider, job.provider_options)
        except LatteFlowError as error:
            self._error = error
        except OSError as error:
            self._error = InputError(f"a worker on {here} cannot read {output.folder}: {one_line(error)}")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Runs one shard."""
        given = pickle.loads(row["rows"])
        try:
            if isinstance(given, LatteFlowError):
                raise given
            if self._error is not None:
                raise self._error
            with ThreadPoolExecutor(ENCODERS) as encoders:
                pending = start_shard(self._pipeline, given, self._job.shard, encoders)
                check_engines(self._pipeline, pending)
                self._output.write(row["shard"], [one.result() for one in pending])
        except LatteFlowError as error:
            return {"rows": 0, "error": str(error), "kind": type(error).__name__}
        return {"rows": len(given), "error": "", "kind": ""}


def _shards_as_datasource(job: Job, left: Sequence[int]) -> Any:
    """Returns the shards as a source of Ray Data, read by one task, which waits while the workers are behind."""
    import pyarrow
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    def read() -> Iterable[Any]:
        for shard, rows in _shards_or_error(job, left):
            yield pyarrow.table({"shard": [shard], "rows": [pickle.dumps(rows)]})

    class ShardDatasource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, *_: Any, **__: Any) -> list[Any]:
            return [ReadTask(read, BlockMetadata(len(left), None, None, None))]

    return ShardDatasource()


def _shards_or_error(job: Job, left: Sequence[int]) -> Iterator[tuple[int, Any]]:
    try:
        yield from read_shards(job, left)
    except LatteFlowError as error:
        yield -1, InputError(f"{one_line(error)} (on {socket.gethostname()})")


def _import_ray() -> Any:
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f'--ray needs {error.name}, which is not installed; run: pip install "latte-flow[ray,cpu]"'
        ) from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connects to Ray, or starts it here; leaves it as it was."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry unless somebody asked for it
    options = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray raises that, too
        where = f"Ray cannot be reached at {address}" if address else "Ray cannot be started here"
        raise InputError(f"{where}: {one_line(error)[:300]}") from error
    try:
        yield
    finally:
        ray.shutdown()
