"""Batches on a real Ray of this machine: the bytes of a local run, whatever happens to a worker or to the driver."""

from __future__ import annotations

import gc
import os
import shlex
import signal
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from runtime.batch.cluster import Pool, on_ray, size_of_pool
from runtime.batch.job import Job, Watcher, run_job
from runtime.cli import load_command
from runtime.errors import InputError
from tests.runtime.batch.files import RunCommand, files_in, write

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray sets options of its own that it deprecates
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # and leaves processes to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
WORKER = b"ShardWorker"
"""In the titles of the processes of workers."""
TRIES = 3


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A Ray with more CPUs than the machine may have: they are only counted."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # by default workers give way to everything else on a machine
        for _ in range(TRIES):
            with suppress(Exception):  # as Ray raises it
                ray.init(
                    "local",
                    num_cpus=3,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=100_000_000,
                )
                break
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.shutdown()
                gc.collect()
        else:
            pytest.skip("Ray's own processes do not start within its fixed 15 s on this busy machine")
        yield
        ray.shutdown()


def workers_of_ray() -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::") and WORKER in title:
            found.append(int(folder.name))
    return found


class Killer(Watcher):
    """Kills a worker when the first row is finished."""

    killed: int | None = None
    rows = 0

    def row_ended(self) -> None:
        self.rows += 1
        if self.killed is None:
            self.killed = workers_of_ray()[0]
            os.kill(self.killed, signal.SIGKILL)


class Interrupted(Exception):
    pass


class Interrupts(Watcher):
    def row_ended(self) -> None:
        raise Interrupted


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows: list[object] = [
        {"id": f"row {i}", "prompt": "a red star" + " and a ring" * (i % 3), "num_inference_steps": 1 + i % 3}
        for i in range(15)
    ]
    return write(tmp_path / "rows.jsonl", *rows, "{")


def test_a_worker_that_is_killed_costs_its_shard_and_nothing_else(
    ray_here: None, bundle: Path, source: Path, tmp_path: Path
) -> None:
    killer = Killer()
    with on_ray(Pool(workers=2)) as runner:
        found = run_job(Job(source, tmp_path / "ray", bundle, "parquet", 1), killer, runner)
    assert killer.killed is not None
    assert (found.rows, found.failed, killer.rows) == (16, 1, 16)
    run_job(Job(source, tmp_path / "here", bundle, "parquet", 1))
    assert files_in(tmp_path / "ray") == files_in(tmp_path / "here")


def test_a_job_that_is_interrupted_goes_on_with_other_workers(
    ray_here: None, bundle: Path, source: Path, tmp_path: Path
) -> None:
    job = Job(source, tmp_path / "ray", bundle, "openai", 2)
    with on_ray(Pool(workers=1, cpus_per_worker=0.5)) as runner, pytest.raises(Interrupted):
        run_job(job, Interrupts(), runner)
    before = {name: content for name, content in files_in(tmp_path / "ray").items() if not name.endswith(".tmp")}
    assert len(before) < 9
    with on_ray(Pool()) as runner:
        run_job(job, runner=runner)
    run_job(Job(source, tmp_path / "here", bundle, "openai", 2))
    assert files_in(tmp_path / "ray") == files_in(tmp_path / "here")
    assert before.items() <= files_in(tmp_path / "ray").items()


def test_a_pool_that_would_wait_for_ever_is_one_line(
    ray_here: None, bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write(tmp_path / "prompts.txt", "a ring")
    code, _, said = run_command("run-batch", source, tmp_path / "out", bundle, "--ray", "--workers", 3)
    assert code == 2
    assert said == (
        "error: 3 workers of 1 CPUs do not fit beside the reader, which takes 0.5: Ray has 3 CPUs, and the job would "
        "wait for ever; 2 fit: change --workers or --cpus-per-worker\n"
    )


@pytest.mark.parametrize("name", ["--workers", "--cpus-per-worker", "--gpus-per-worker"])
def test_an_option_of_ray_without_ray_is_refused(
    bundle: Path, tmp_path: Path, run_command: RunCommand, name: str
) -> None:
    source = write(tmp_path / "prompts.txt", "a ring")
    code, _, said = run_command("run-batch", source, tmp_path / "out", bundle, name, 1)
    assert (code, said) == (2, f"error: {name} needs --ray or --ray-address; without them one pipeline runs\n")


@pytest.mark.parametrize(
    ("pool", "nodes", "fit"),
    [
        (Pool(), [{"CPU": 2.0}], 1),
        (Pool(cpus_per_worker=0.75), [{"CPU": 2.0}], 2),
        (Pool(cpus_per_worker=4), [{"CPU": 3.0}, {"CPU": 4.0}], 1),  # the reader goes where no worker fits
        (Pool(cpus_per_worker=4), [{"CPU": 6.0}, {"CPU": 6.0}], 2),
        (Pool(cpus_per_worker=1, gpus_per_worker=1), [{"CPU": 16.0, "GPU": 1.0}, {"CPU": 16.0}], 1),
        (Pool(cpus_per_worker=0, gpus_per_worker=0.5), [{"CPU": 1.0, "GPU": 2.0}], 4),
        (Pool(), [{"CPU": 1.0}], 0),
        (Pool(gpus_per_worker=1), [{"CPU": 8.0}], 0),
    ],
)
def test_a_pool_has_as_many_workers_as_fit_beside_the_reader(
    pool: Pool, nodes: list[dict[str, float]], fit: int
) -> None:
    if not fit:
        with pytest.raises(InputError, match="do not fit"):
            size_of_pool(pool, nodes)
        return
    assert size_of_pool(pool, nodes) == fit
    assert size_of_pool(replace(pool, workers=fit), nodes) == fit
    with pytest.raises(InputError, match="do not fit"):
        size_of_pool(replace(pool, workers=fit + 1), nodes)


def test_the_job_for_kuberay_has_valid_pods_and_a_pool_that_fits() -> None:
    job = yaml.safe_load((Path(__file__).parents[3] / "deploy" / "ray" / "job.yaml").read_text(encoding="utf-8"))
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    nodes = []
    for group, count in ((cluster["headGroupSpec"], 1), (workers, workers["replicas"])):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.30", strict=True)
        nodes += [{"CPU": float(pod["spec"]["containers"][0]["resources"]["requests"]["cpu"])}] * count
    command = load_command("run-batch").make_context("run-batch", shlex.split(job["spec"]["entrypoint"])[2:])
    pool = Pool(workers=command.params["workers"], cpus_per_worker=command.params["cpus_per_worker"])
    assert command.params["ray_address"] == "auto"
    assert size_of_pool(pool, nodes) == 4
