"""Several GPUs: replicas in one service, on doubles of two GPUs, and a simulation of what each arrangement gains."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from runtime.errors import DrainingError, QueueFullError
from runtime.gateway.metrics import Families
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.metrics import Metrics
from runtime.serving.replicas import ReplicatedService
from runtime.serving.requests import Event, GenerationRequest, Limits
from runtime.serving.service import LocalService
from tests.doubles import GpuDouble

# ---- replicas ----------------------------------------------------------------------------------------


@pytest.fixture
def service(plan_bundle: Path) -> Iterator[ReplicatedService]:
    limits = Limits(max_queued_images=2)
    pipelines = [
        LatteFlowPipeline.from_pretrained(plan_bundle, "tensorrt", {"device_id": str(device)}) for device in (0, 1)
    ]
    with ReplicatedService([LocalService(pipeline, limits) for pipeline in pipelines]) as service:
        yield service


def ignore(event: Event) -> None:
    """Is no listener of anything."""


def request(seed: int = 0) -> GenerationRequest:
    return GenerationRequest("a red star", seed=seed, num_inference_steps=2)


def stop(service: ReplicatedService) -> None:
    """Stops the threads, so that what is queued stays so."""
    for replica in service.replicas:
        replica.worker._stop.set()
        replica.worker._thread.join()


def test_requests_are_drawn_on_both_gpus_and_are_the_pipelines(
    service: ReplicatedService, pipe: LatteFlowPipeline, gpu: GpuDouble
) -> None:
    drawn = {}
    handles = {seed: service.submit(request(seed), None) for seed in range(4)}  # type: ignore[arg-type]
    for seed, handle in handles.items():
        events = list(handle.events(60))
        assert [event.kind for event in events if event.kind in ("image", "failed")] == ["image"], events
        drawn[seed] = next(event.pixels for event in events if event.kind == "image")
    for seed, pixels in drawn.items():
        expected = pipe("a red star", seed=seed, num_inference_steps=2, output_type="np").images[0]
        assert pixels is not None
        assert int(np.abs(pixels.astype(int) - expected).max()) <= 1
    finished = [replica.scheduler.statistics.finished for replica in service.replicas]
    assert finished == [2, 2]
    assert {block.device for block in gpu.cuda.blocks.values()} == {0, 1}
    service.check()
    assert service.drain(10)
    with pytest.raises(DrainingError):
        service.submit(request(), ignore)


def test_a_request_goes_where_the_fewest_wait_and_is_refused_when_all_are_full(service: ReplicatedService) -> None:
    stop(service)
    waiting = []
    for seed in range(4):
        service.submit(request(seed), ignore)
        waiting.append([replica.scheduler.pending for replica in service.replicas])
    assert waiting == [[1, 0], [1, 1], [2, 1], [2, 2]]
    with pytest.raises(QueueFullError):
        service.submit(request(), ignore)


def test_metrics_are_those_of_all_replicas(service: ReplicatedService) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(Families(registry), service.model.groups)
    for seed in range(4):
        list(service.submit(request(seed), None).events(30))  # type: ignore[arg-type]
    schedulers, workers = [each.scheduler for each in service.replicas], [each.worker for each in service.replicas]
    for _ in range(2):  # what is reported is not reported again
        metrics.update(schedulers, workers, 0)
    finished = {"kind": "draw", "outcome": "finished"}
    assert registry.get_sample_value("latte_flow_requests_total", finished) == 4
    assert registry.get_sample_value("latte_flow_steps_total", {"group": "0"}) == 4
    assert registry.get_sample_value("latte_flow_pending_images") == 0
    heartbeat = registry.get_sample_value("latte_flow_heartbeat_timestamp_seconds")
    assert heartbeat is not None
    assert time.time() - heartbeat < 5


# ---- when which arrangement pays ---------------------------------------------------------------------

Arrangement = Literal["one GPU", "replicas", "split rows", "placed experts"]
GROUPS, STEPS = 4, 40


class Cost(NamedTuple):
    """Of a run of an expert: reading its weights, then so much for each row. A link moves latents between two GPUs."""

    weights: float
    row: float
    link: float

    def run(self, rows: float) -> float:
        return self.weights + rows * self.row


BOUND_BY_MEMORY = Cost(weights=1.0, row=0.01, link=0.05)
"""As few rows of a large model on a fast GPU: a step takes as long as its weights."""
BOUND_BY_ARITHMETIC = Cost(weights=0.1, row=1.0, link=0.05)
"""As large images, or a slow GPU."""


def simulated(arrangement: Arrangement, images: int, cost: Cost, apart: float = 0.0, gpus: int = 2) -> float:
    """Returns the seconds until so many guided images are drawn, which come together, or so many seconds apart.

    A GPU runs one expert for all images that wait for it there; of the experts it takes the one that most wait for.
    """
    if arrangement in ("one GPU", "split rows"):
        gpu_of = {(image, group): 0 for image in range(images) for group in range(GROUPS)}
    elif arrangement == "replicas":
        gpu_of = {(image, group): image % gpus for image in range(images) for group in range(GROUPS)}
    else:
        gpu_of = {(image, group): group * gpus // GROUPS for image in range(images) for group in range(GROUPS)}
    done = dict.fromkeys(range(images), 0)
    ready = {image: image * apart for image in range(images)}
    free = [(0.0, gpu) for gpu in sorted(set(gpu_of.values()))]
    while free:
        now, gpu = heapq.heappop(free)
        ours = [(image, done[image] * GROUPS // STEPS) for image in done if done[image] < STEPS]
        ours = [(image, group) for image, group in ours if gpu_of[image, group] == gpu]
        waiting = Counter(group for image, group in ours if ready[image] <= now)
        if not waiting:
            later = [t for t, _ in free if t > now] + [ready[image] for image, _ in ours if ready[image] > now]
            if later:
                heapq.heappush(free, (min(later), gpu))
            continue
        group = waiting.most_common(1)[0][0]
        batch = [image for image, at in ours if at == group and ready[image] <= now]
        rows = 2 * len(batch)
        seconds = cost.run(rows / gpus) + cost.link if arrangement == "split rows" else cost.run(rows)
        for image in batch:
            done[image] += 1
            after = min(done[image] * GROUPS // STEPS, GROUPS - 1)
            ready[image] = now + seconds + cost.link * (gpu_of[image, after] != gpu)
        heapq.heappush(free, (now + seconds, gpu))
    return max(ready.values())


def gain(arrangement: Arrangement, images: int, cost: Cost, apart: float = 0.0) -> float:
    return simulated("one GPU", images, cost, apart) / simulated(arrangement, images, cost, apart)


def test_the_simulation_of_one_gpu_is_its_formula() -> None:
    for images, cost in itertools.product((1, 3), (BOUND_BY_MEMORY, BOUND_BY_ARITHMETIC)):
        assert simulated("one GPU", images, cost) == pytest.approx(STEPS * cost.run(2 * images))


def test_replicas_draw_twice_as_much_where_rows_cost_and_never_less() -> None:
    assert gain("replicas", 1, BOUND_BY_ARITHMETIC) == pytest.approx(1)
    assert gain("replicas", 16, BOUND_BY_ARITHMETIC) > 1.95
    # A few images share the reading of weights on one GPU as well as on two.
    assert 1 < gain("replicas", 4, BOUND_BY_MEMORY) < 1.1
    assert gain("replicas", 256, BOUND_BY_MEMORY) > 1.6


def test_split_rows_make_one_image_faster_only_where_a_row_costs_more_than_the_link() -> None:
    assert gain("split rows", 1, BOUND_BY_ARITHMETIC) > 1.75
    assert gain("split rows", 1, BOUND_BY_MEMORY) < 1
    for images in (8, 64):  # with many images replicas do the same without the link
        for cost in (BOUND_BY_MEMORY, BOUND_BY_ARITHMETIC):
            assert gain("split rows", images, cost) < gain("replicas", images, cost)


def test_placed_experts_pay_where_weights_cost_and_images_come_one_after_another() -> None:
    """Each GPU has half of the experts, and all images of a time share its runs: weights are read for twice as many.

    Images that come together go through the experts together, so one GPU waits for the other.
    """
    for images, cost in itertools.product((1, 8, 64), (BOUND_BY_MEMORY, BOUND_BY_ARITHMETIC)):
        assert gain("placed experts", images, cost) == pytest.approx(1, abs=0.01)
    for images, apart in ((8, 2.0), (64, 0.5), (64, 2.0)):
        assert gain("placed experts", images, BOUND_BY_MEMORY, apart) > 1.35
        assert gain("placed experts", images, BOUND_BY_MEMORY, apart) > gain("replicas", images, BOUND_BY_MEMORY, apart)
        assert gain("placed experts", images, BOUND_BY_ARITHMETIC, apart) < 1.2
        assert gain("replicas", images, BOUND_BY_ARITHMETIC, apart) > 1.9
