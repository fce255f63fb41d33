"""The service protocol: where a front door sends requests, whether they run in this process or on a server elsewhere.

Every door (the gateway, batches) speaks to a `Service`. `LocalService` runs the scheduler in this process;
`model_repository.remote` has the one that sends requests to Triton.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol, Self

from runtime.flow_time import ExpertSchedule, SamplingDefaults
from runtime.manifest import Manifest
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import AnyRequest, Handle, Limits, Listener
from runtime.serving.scheduler import OnEnd, Scheduler
from runtime.serving.stations import PipelineStations
from runtime.serving.worker import OnDeath, Worker


@dataclass(frozen=True)
class ServedModel:
    """What a service says of its model."""

    name: str
    height: int
    """Of its images, in pixels."""
    width: int
    schedule: ExpertSchedule
    """When which expert group works."""
    sampling: SamplingDefaults
    """How it is sampled where a request says nothing."""

    @property
    def groups(self) -> int:
        """Number of expert groups."""
        return self.schedule.num_groups

    @classmethod
    def of(cls, manifest: Manifest, name: str) -> Self:
        """Describes a bundle's model."""
        height, width = (side * manifest.geometry.vae_scale_factor for side in manifest.geometry.latent_size)
        return cls(name, height, width, manifest.schedule, manifest.sampling)


class Service(Protocol):
    """Takes requests and reports on them by events."""

    @property
    def model(self) -> ServedModel:
        """The model that is served."""

    @property
    def limits(self) -> Limits:
        """What the service accepts."""

    def submit(self, request: AnyRequest, listener: Listener) -> Handle:
        """Queues a request. Returns at once; `Handle.cancel` cancels it.

        Args:
            listener: called with every event, from any thread; the last is "done" or "failed".

        Raises:
            InputError: the request cannot work.
            QueueFullError: there is no room for it now.
            DrainingError: the service takes no new requests.
            ServiceError: the service cannot be reached.
        """

    def check(self) -> None:
        """Raises `ServiceError` unless the service works: a heartbeat, which takes no place in the queue."""

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for those in flight; returns whether all ended in time."""

    def close(self) -> None:
        """Ends the service's threads. Requests in flight fail."""


class LocalService:
    """The scheduler in this process, over a pipeline that it owns.

    Args:
        name: of the model.
        on_end: called with a record of each request that ends.
        on_death: called if the scheduler's thread ends by an error.
    """

    def __init__(
        self,
        pipeline: LatteFlowPipeline,
        limits: Limits | None = None,
        *,
        name: str = "latte-flow",
        on_end: OnEnd = lambda record: None,
        on_death: OnDeath = lambda error: None,
    ) -> None:
        self.model = ServedModel.of(pipeline.manifest, name)
        self.pipeline = pipeline
        self.scheduler = Scheduler(PipelineStations(pipeline), time.monotonic, limits, on_end=on_end)
        self.worker = Worker(self.scheduler, on_death)

    @property
    def limits(self) -> Limits:
        return self.scheduler.limits

    def submit(self, request: AnyRequest, listener: Listener) -> Handle:
        """Queues a request; see `Service.submit`."""
        return self.scheduler.submit(request, listener)

    def check(self) -> None:
        """Raises `ServiceError` unless the scheduler's thread works."""
        self.worker.check()

    def drain(self, timeout: float) -> bool:
        """Refuses new requests and waits for those in flight; returns whether all ended in time."""
        return self.worker.drain(timeout)

    def close(self) -> None:
        """Stops after the current run of an engine, and frees the engines."""
        self.worker.close()
        self.pipeline.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def warm_up(pipeline: LatteFlowPipeline) -> None:
    """Loads and runs every engine once, so that the first request is as fast as later ones."""
    steps = pipeline.manifest.sampling.nearest_steps(pipeline.manifest.schedule.num_groups)
    images = pipeline("", num_inference_steps=steps, seed=0, output_type="np").images
    pipeline.ask(images[0], "?", max_new_tokens=2)
