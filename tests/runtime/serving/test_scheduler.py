"""Step-level batching, on a script and a clock that only moves when a station works."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Never

import numpy as np
import pytest

from runtime.errors import (
    CancelledError,
    DeadlineError,
    DrainingError,
    EngineError,
    InputError,
    QueueFullError,
    ServiceError,
)
from runtime.flow_time import ExpertSchedule, SamplingDefaults, initial_latents
from runtime.pipeline import LatteFlowPipeline
from runtime.rows import PrefixRow
from runtime.serving.jobs import EncodedPrompt, ImageJob, Station
from runtime.serving.policy import CostAwarePolicy, RunCost, SchedulingPolicy, WholeRequestPolicy
from runtime.serving.requests import Event, GenerationRequest, Handle, Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.stations import PipelineStations
from runtime.serving.worker import Worker

PREFIX = PrefixRow((np.zeros((1, 2, 1, 5, 1), np.float32),))
"""An encoded prompt of five tokens."""


class ScriptedStations:
    """Adds 1 to the latents of every job at each step; a run takes simulated seconds, `fixed` and so many `each`."""

    schedule = ExpertSchedule(boundaries=(0.0, 0.25, 0.5, 0.75, 1.0))
    latent_shape = (1, 1, 1)
    sampling = SamplingDefaults()

    def __init__(self, fixed: float = 0.01, each: float = 0.0) -> None:
        self.now = 100.0
        self._fixed = fixed
        self._each = each
        self.log: list[tuple[object, list[str]]] = []

    def clock(self) -> float:
        return self.now

    def _note(self, station: object, names: list[str]) -> None:
        self.now += self._fixed + len(names) * self._each
        self.log.append((station, names))

    def check(self, request: GenerationRequest) -> None:
        if "bad" in request.prompt:
            raise InputError("bad prompt")

    def max_rows(self, station: Station) -> int | None:
        return None

    def encode(self, jobs: Sequence[ImageJob]) -> list[EncodedPrompt]:
        self._note("encode", [job.request.prompt for job in jobs])
        if any("unreadable" in job.request.prompt for job in jobs):
            raise EngineError("engine vlm failed")
        return [EncodedPrompt(PREFIX, None) for _ in jobs]

    def step(self, group: int, jobs: Sequence[ImageJob]) -> list[np.ndarray]:
        assert all(self.schedule.group_of(job.t) == group for job in jobs)
        self._note(group, [job.request.prompt for job in jobs])
        if any("broken" in job.request.prompt for job in jobs):
            raise EngineError("engine expert_0 failed")
        added = {"overflow": np.inf, "undecodable": 1e9}
        return [job.latents + added.get(job.request.prompt, 1) for job in jobs]

    def decode(self, latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        self._note("decode", [""] * len(latents))
        if any(x.item() > 1e8 for x in latents):
            raise EngineError("engine vae_decoder failed")
        return [np.full((1, 1, 3), int(np.rint(x.item() * 1000)) % 256, np.uint8) for x in latents]


def make(limits: Limits | None = None, policy: SchedulingPolicy | None = None) -> tuple[Scheduler, ScriptedStations]:
    stations = ScriptedStations()
    return Scheduler(stations, stations.clock, limits, policy), stations


def run(scheduler: Scheduler) -> int:
    ticks = 0
    while scheduler.tick():
        ticks += 1
        assert ticks < 10_000
    return ticks


def request(prompt: str = "a", **options: object) -> GenerationRequest:
    return GenerationRequest(prompt, **{"num_inference_steps": 8, "guidance_scale": 1.0, **options})  # type: ignore


def test_a_request_alone_goes_through_every_station() -> None:
    scheduler, stations = make()
    handle = scheduler.submit(request())
    assert run(scheduler) == 10
    assert [station for station, _ in stations.log] == ["encode", 0, 0, 1, 1, 2, 2, 3, 3, "decode"]
    events = list(handle.events(0))
    assert [event.kind for event in events] == ["progress"] * 8 + ["image", "done"]
    assert [event.step for event in events[:8]] == list(range(1, 9))


def test_requests_that_come_together_share_every_run() -> None:
    scheduler, stations = make()
    for name in "abc":
        scheduler.submit(request(name))
    assert run(scheduler) == 10
    assert all(len(names) == 3 for _, names in stations.log)


def test_late_requests_join_between_steps_and_leave_when_they_are_done() -> None:
    scheduler, stations = make()
    first = scheduler.submit(request("first", num_inference_steps=32))
    for _ in range(3):
        scheduler.tick()
    late = [scheduler.submit(request("late", num_inference_steps=8)) for _ in range(3)]
    ticks = run(scheduler)
    assert ticks < 31 + 10
    assert all([event.kind for event in handle.events(0)][-1] == "done" for handle in (first, *late))
    assert any({"first", "late"} <= set(names) for _, names in stations.log)
    last_of_late = max(i for i, (_, names) in enumerate(stations.log) if "late" in names)
    assert any("first" in names for _, names in stations.log[last_of_late + 1 :])


def test_a_result_does_not_depend_on_who_shared_the_batches() -> None:
    rng = np.random.default_rng(0)
    wanted = [request(str(i), seed=i, num_inference_steps=int(rng.integers(1, 12))) for i in range(12)]
    alone = []
    for one in wanted:
        scheduler, _ = make()
        handle = scheduler.submit(one)
        run(scheduler)
        alone.append(handle.result(0)[0])
    scheduler, _ = make(Limits(max_rows_per_tick=5))
    handles = []
    for one in wanted:
        handles.append(scheduler.submit(one))
        for _ in range(int(rng.integers(0, 3))):
            scheduler.tick()
    run(scheduler)
    for handle, expected in zip(handles, alone, strict=True):
        np.testing.assert_array_equal(handle.result(0)[0], expected)


def test_a_batch_holds_no_more_rows_than_the_limit_and_a_guided_image_is_two() -> None:
    scheduler, stations = make(Limits(max_rows_per_tick=4))
    for i in range(6):
        scheduler.submit(request(f"guided {i}" if i % 2 else f"plain {i}", guidance_scale=3.0 if i % 2 else 1.0))
    run(scheduler)
    rows = [
        sum(2 if "guided" in name else 1 for name in names) for station, names in stations.log if station != "decode"
    ]
    assert max(rows) <= 4
    scheduler, stations = make(Limits(max_rows_per_tick=1))
    scheduler.submit(request(guidance_scale=3.0))
    assert run(scheduler) == 10


def test_nobody_starves_beside_a_steady_stream() -> None:
    """A lone request, while eight others keep a large batch going for as long as it takes."""
    scheduler, stations = make(Limits(max_rows_per_tick=8))
    lone = scheduler.submit(request("lone", num_inference_steps=4))
    handles = []
    ticks = 0
    while not any("lone" in names and station == 3 for station, names in stations.log):
        while scheduler.pending < 9:
            handles.append(scheduler.submit(request("stream", num_inference_steps=40)))
        scheduler.tick()
        ticks += 1
        assert ticks < 400
    run(scheduler)
    assert lone.result(0)


def test_where_not_all_can_go_priority_and_a_near_deadline_go_first() -> None:
    scheduler, stations = make(Limits(max_rows_per_tick=1))
    for name, options in (
        ("low", {"priority": -2}),
        ("plain", {}),
        ("high", {"priority": 2}),
        ("far", {"deadline": 1000.0}),
        ("near", {"deadline": 0.5}),
    ):
        scheduler.submit(request(name, num_inference_steps=1, **options))
    run(scheduler)
    order = [names[0] for station, names in stations.log if station == "encode"]
    assert order == ["high", "near", "far", "plain", "low"]


def p95_under_poisson_arrivals(
    policy: SchedulingPolicy, fixed: float, each: float, rate: float, requests: int = 500
) -> float:
    """Seconds of simulated time from arrival to the last image."""
    rng = np.random.default_rng(0)
    stations = ScriptedStations(fixed, each)
    scheduler = Scheduler(
        stations, stations.clock, Limits(max_queued_images=requests, max_images_per_client=requests), policy
    )
    arrivals = stations.now + np.cumsum(rng.exponential(1 / rate, requests))
    steps = rng.choice((10, 20, 40), requests)
    latencies: list[float] = []
    sent = 0
    while sent < requests or scheduler.pending:
        while sent < requests and arrivals[sent] <= stations.now:

            def on_event(_: Handle, event: Event, arrival: float = arrivals[sent]) -> None:
                if event.kind == "done":
                    latencies.append(stations.now - arrival)

            scheduler.submit(request(guidance_scale=3.0, num_inference_steps=int(steps[sent])), on_event)
            sent += 1
        if not scheduler.tick() and sent < requests:
            stations.now = arrivals[sent]
    assert len(latencies) == requests
    return float(np.percentile(latencies, 95))


@pytest.mark.parametrize("load", ["half", "full"])
def test_on_a_cpu_it_is_as_quick_as_whole_requests_and_where_batches_are_cheap_far_quicker(load: str) -> None:
    """Milliseconds as on two cores (a batch of 16 is worth 9 runs), and as on a GPU (1.3)."""
    on_cpu = (1.2e-3, 1.2e-3, {"half": 14.0, "full": 27.0}[load])
    assert p95_under_poisson_arrivals(CostAwarePolicy(), *on_cpu) < 1.05 * p95_under_poisson_arrivals(
        WholeRequestPolicy(16), *on_cpu
    )
    on_gpu = (2.4e-3, 0.05e-3, {"half": 85.0, "full": 160.0}[load])
    margin = {"half": 1.1, "full": 0.6}[load]
    assert p95_under_poisson_arrivals(CostAwarePolicy(), *on_gpu) < margin * p95_under_poisson_arrivals(
        WholeRequestPolicy(16), *on_gpu
    )


def test_a_small_request_does_not_wait_until_a_large_one_is_done() -> None:
    stations = ScriptedStations(fixed=1.2e-3, each=1.2e-3)
    scheduler = Scheduler(stations, stations.clock)
    scheduler.submit(request("large", num_images=16, num_inference_steps=200, guidance_scale=3.0))
    for _ in range(40):
        scheduler.tick()
    came = stations.now
    done: list[float] = []
    scheduler.submit(
        request("small", num_inference_steps=10, guidance_scale=3.0),
        lambda _, event: done.append(stations.now) if event.kind == "done" else None,
    )
    run(scheduler)
    assert done[0] - came < 0.2 * (stations.now - came)


def test_the_cost_of_a_run_is_learned() -> None:
    cost = RunCost()
    assert cost(3) == 2 * cost(1)
    for rows in (2, 2, 8, 16, 4):
        cost.observe(rows, 0.003 + 0.0005 * rows)
    assert cost(1) == pytest.approx(0.0035)
    assert cost(32) == pytest.approx(0.019)


def test_nobody_starves_beside_others_with_deadlines() -> None:
    """The batches are full of requests in a hurry, for as long as it takes."""
    scheduler, stations = make(Limits(max_rows_per_tick=2))
    patient = scheduler.submit(request("patient", num_inference_steps=4))
    while not any("patient" in names and station == 3 for station, names in stations.log):
        while scheduler.pending < 5:
            scheduler.submit(request("hurried", num_inference_steps=4, deadline=1.0, priority=1))
        scheduler.tick()
        assert len(stations.log) < 3000
    run(scheduler)
    assert patient.result(0)


def test_previews_come_between_and_never_of_the_last_step() -> None:
    scheduler, _ = make()
    handle = scheduler.submit(request(preview_every=3))
    run(scheduler)
    events = list(handle.events(0))
    assert [event.step for event in events if event.kind == "preview"] == [3, 6]
    assert all(event.pixels is not None for event in events if event.kind in ("preview", "image"))
    scheduler, _ = make()
    handle = scheduler.submit(request(preview_every=4))
    run(scheduler)
    assert [event.step for event in handle.events(0) if event.kind == "preview"] == [4]


def test_several_images_count_up_from_the_seed() -> None:
    scheduler, _ = make()
    handle = scheduler.submit(request(num_images=3, seed=7))
    run(scheduler)
    noise = initial_latents([7, 8, 9], (1, 1, 1))
    expected = [int(np.rint((x.item() + 8) * 1000)) % 256 for x in noise]
    assert [int(image[0, 0, 0]) for image in handle.result(0)] == expected


@pytest.mark.parametrize("ticks", [0, 1, 4, 9])
def test_a_cancelled_request_is_gone_before_the_next_tick(ticks: int) -> None:
    scheduler, stations = make()
    lost, kept = scheduler.submit(request("lost")), scheduler.submit(request("kept"))
    for _ in range(ticks):
        scheduler.tick()
    lost.cancel()
    before = len(stations.log)
    run(scheduler)
    assert not any("lost" in names for _, names in stations.log[before:])
    with pytest.raises(CancelledError):
        lost.result(0)
    assert len(kept.result(0)) == 1
    assert scheduler.statistics.cancelled == 1


def test_cancelling_what_is_done_changes_nothing() -> None:
    scheduler, _ = make()
    handle = scheduler.submit(request())
    run(scheduler)
    handle.cancel()
    assert not scheduler.tick()
    assert len(handle.result(0)) == 1
    assert scheduler.statistics.cancelled == 0


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    scheduler, stations = make()
    late = scheduler.submit(request("late", deadline=0.045))
    kept = scheduler.submit(request("kept"))
    run(scheduler)
    with pytest.raises(DeadlineError, match=r"0\.045 s"):
        late.result(0)
    assert len(kept.result(0)) == 1
    assert scheduler.statistics.expired == 1
    assert sum("late" in names for _, names in stations.log) == 5


def test_a_full_queue_refuses_and_loses_nothing() -> None:
    scheduler, _ = make(Limits(max_queued_images=3, max_images_per_client=3))
    kept = [scheduler.submit(request(num_images=2)), scheduler.submit(request())]
    with pytest.raises(QueueFullError, match="has 3 of 3 images"):
        scheduler.submit(request())
    run(scheduler)
    assert [len(handle.result(0)) for handle in kept] == [2, 1]
    scheduler.submit(request())
    assert scheduler.statistics.rejected == 1


def test_a_broken_batch_fails_its_own_requests_and_nobody_elses() -> None:
    scheduler, _ = make(Limits(max_rows_per_tick=1))
    broken, fine = scheduler.submit(request("broken")), scheduler.submit(request("fine"))
    run(scheduler)
    with pytest.raises(EngineError):
        broken.result(0)
    assert len(fine.result(0)) == 1
    assert (scheduler.statistics.failed, scheduler.statistics.finished) == (1, 1)


def test_a_bad_request_in_a_batch_fails_alone() -> None:
    scheduler, _ = make()
    handles = {name: scheduler.submit(request(name)) for name in ("a", "b", "broken", "c", "d")}
    run(scheduler)
    with pytest.raises(EngineError):
        handles.pop("broken").result(0)
    assert [len(handle.result(0)) for handle in handles.values()] == [1] * 4
    assert (scheduler.statistics.failed, scheduler.statistics.finished, scheduler.pending) == (1, 4, 0)


@pytest.mark.parametrize("bad", ["unreadable", "undecodable"])
def test_a_bad_request_fails_alone_at_every_station(bad: str) -> None:
    scheduler, _ = make()
    handles = [scheduler.submit(request(prompt, num_images=2)) for prompt in ("a", bad, "b")]
    run(scheduler)
    with pytest.raises(EngineError):
        handles[1].result(0)
    assert [len(handles[i].result(0)) for i in (0, 2)] == [2, 2]
    assert (scheduler.statistics.failed, scheduler.pending) == (1, 0)


def test_a_preview_that_fails_is_left_out_and_harms_nobody() -> None:
    """A preview that failed used to fail all requests of its batch; it is not time of an expert either."""
    scheduler, stations = make()
    with_previews = [scheduler.submit(request(str(i), preview_every=2)) for i in range(3)]
    without = scheduler.submit(request("none"))
    decode = stations.decode

    def fail_early(latents: Sequence[np.ndarray]) -> list[np.ndarray]:
        stations.now += 10.0
        if any(job.index < 8 for opened in scheduler._open.values() for job in opened.jobs):
            raise EngineError("no preview")
        return decode(latents)

    stations.decode = fail_early  # type: ignore[method-assign]
    run(scheduler)
    assert all(len(handle.result(0)) == 1 for handle in (*with_previews, without))
    assert scheduler.statistics.step_seconds == pytest.approx(8 * 0.01)
    assert scheduler.statistics.failed == 0


def test_a_listener_that_raises_loses_its_own_request() -> None:
    scheduler, _ = make()

    def listener(handle: Handle, event: Event) -> None:
        raise RuntimeError("no")

    lost, kept = scheduler.submit(request("lost"), listener), scheduler.submit(request("kept"))
    run(scheduler)
    assert lost.cancelled
    assert len(kept.result(0)) == 1
    assert scheduler.pending == 0


def test_the_queue_is_empty_only_when_the_last_request_was_told_its_end() -> None:
    scheduler, _ = make()
    empty: list[bool] = []
    listener = lambda _, event: empty.append(scheduler.wait_until_empty(0)) if event.kind == "done" else None  # noqa: E731
    scheduler.submit(request(), listener)
    run(scheduler)
    assert empty == [False]
    assert scheduler.wait_until_empty(0)


def test_latents_that_are_not_finite_fail_their_own_request_alone() -> None:
    scheduler, _ = make()
    broken, fine = scheduler.submit(request("overflow", num_images=2)), scheduler.submit(request("fine"))
    run(scheduler)
    with pytest.raises(EngineError, match="not finite"):
        broken.result(0)
    assert len(fine.result(0)) == 1
    assert (scheduler.statistics.failed, scheduler.statistics.finished, scheduler.pending) == (1, 1, 0)


def test_nothing_comes_after_the_failure_of_one_image() -> None:
    """The other image of the request is fine, and in the same batch."""
    scheduler, stations = make()
    step = stations.step

    def overflow_first(group: int, jobs: Sequence[ImageJob]) -> list[np.ndarray]:
        first, *rest = step(group, jobs)
        return [first + np.inf, *rest]

    stations.step = overflow_first  # type: ignore[method-assign]
    kinds: list[str] = []
    scheduler.submit(request("two", num_images=2), lambda _, event: kinds.append(event.kind))
    run(scheduler)
    assert kinds == ["failed"]
    assert (scheduler.statistics.failed, scheduler.pending) == (1, 0)


BAD_REQUESTS = {
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 200, got 0"),
    "too many steps": ({"num_inference_steps": 201}, "got 201"),
    "no images": ({"num_images": 0}, "num_images must be from 1 to 16"),
    "shift": ({"shift": -1.0}, "shift must be from 0.01 to 100"),
    "scale": ({"guidance_scale": float("nan")}, "guidance_scale must be from -100 to 100"),
    "seed": ({"seed": -1}, "a seed must be from 0 to"),
    "last seed": ({"seed": 2**63 - 2, "num_images": 3}, "a seed must be from 0 to"),
    "previews": ({"preview_every": -1}, "preview_every must be 0 or more"),
    "priority": ({"priority": 3}, "priority must be from -2 to 2"),
    "deadline": ({"deadline": 0.0}, "deadline must be a positive number"),
    "prompt": ({"prompt": "bad"}, "bad prompt"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_before_it_is_queued(name: str) -> None:
    options, message = BAD_REQUESTS[name]
    scheduler, _ = make()
    with pytest.raises(InputError, match=message):
        scheduler.submit(request(**options))
    assert scheduler.pending == 0


def test_a_thousand_requests_with_cancels_leave_nothing_behind() -> None:
    scheduler, _ = make(Limits(max_queued_images=100_000))
    rng = np.random.default_rng(1)
    handles: list[Handle] = []
    for i in range(1000):
        handles.append(scheduler.submit(request(str(i), num_inference_steps=int(rng.integers(1, 9)))))
        if rng.random() < 0.3:
            handles[-1 - int(rng.integers(min(len(handles), 5)))].cancel()
        scheduler.tick()
    run(scheduler)
    ends = [list(handle.events(0))[-1].kind for handle in handles]
    statistics = scheduler.statistics
    assert statistics.submitted == 1000 == statistics.finished + statistics.cancelled
    assert ends.count("failed") == statistics.cancelled > 100
    assert scheduler.pending == 0
    assert not scheduler._open


# ---- in a thread, and on engines --------------------------------------------------------------------


def test_a_worker_serves_many_threads_and_drains() -> None:
    stations = ScriptedStations()
    scheduler = Scheduler(stations, stations.clock)
    worker = Worker(scheduler)
    results: list[int] = []

    def client(index: int) -> None:
        results.append(len(scheduler.submit(request(str(index), num_images=2)).result(30)))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [2] * 20
    last = scheduler.submit(request("last"))
    assert worker.drain(timeout=30)
    assert len(last.result(0)) == 1
    with pytest.raises(DrainingError):
        scheduler.submit(request())
    worker.close()


def test_a_worker_that_breaks_says_so_and_leaves_nobody_waiting() -> None:
    class BrokenPolicy(CostAwarePolicy):
        def choose(self, *arguments: object) -> Never:
            raise RuntimeError("a defect")

    stations = ScriptedStations()
    scheduler = Scheduler(stations, stations.clock, policy=BrokenPolicy())
    deaths: list[BaseException] = []
    worker = Worker(scheduler, deaths.append)
    handle = scheduler.submit(request())
    with pytest.raises(ServiceError, match="broke down and must be started again: a defect"):
        handle.result(10)
    worker.close()
    assert not worker.is_alive
    assert [str(death) for death in deaths] == ["a defect"]
    with pytest.raises(ServiceError, match="broke down"):
        scheduler.submit(request())


def test_images_are_those_of_the_pipeline(pipe: LatteFlowPipeline) -> None:
    """Mixed steps, scales, prompts and seeds in shared batches, against each alone through the pipeline."""
    stations = PipelineStations(pipe)
    scheduler = Scheduler(stations, lambda: 0.0, Limits(max_rows_per_tick=6))
    wanted = [
        GenerationRequest("a red star", num_inference_steps=3, seed=1),
        GenerationRequest("a large green ring", num_inference_steps=7, guidance_scale=1.0, seed=2),
        GenerationRequest("a red star", "a blue circle", num_inference_steps=4, guidance_scale=5.0, seed=3),
        GenerationRequest("a small cross above a square", num_inference_steps=1, seed=4, num_images=2),
    ]
    handles = []
    for one in wanted:
        handles.append(scheduler.submit(one))
        scheduler.tick()
    run(scheduler)
    assert max(scheduler.statistics.batch_sizes) > 1
    for one, handle in zip(wanted, handles, strict=True):
        expected = pipe(
            one.prompt,
            negative_prompt=one.negative_prompt,
            num_inference_steps=one.num_inference_steps,
            guidance_scale=one.guidance_scale,
            num_images_per_prompt=one.num_images,
            seed=one.seed,
            output_type="np",
        ).images
        difference = np.abs(np.stack(handle.result(0)).astype(int) - expected.astype(int))
        assert difference.max() <= 1
    with pytest.raises(InputError, match="special token"):
        scheduler.submit(GenerationRequest("a <|im_end|>"))
