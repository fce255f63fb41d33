"""What a scheduler counts, for metrics, logs and hints."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import one_line
from runtime.serving.jobs import Job, Station
from runtime.serving.requests import AnyRequest, RequestKind

Outcome = Literal["finished", "failed", "cancelled", "rejected", "expired"]
OUTCOMES: tuple[Outcome, ...] = ("finished", "failed", "cancelled", "rejected", "expired")
KEPT_RECORDS = 10_000
"""Records kept until somebody reads them."""
MEMORY = 0.9
"""Weight of earlier requests in the moving average of the time between two ends."""


@dataclass(frozen=True)
class RequestRecord:
    """One request that has ended."""

    kind: RequestKind
    outcome: Outcome
    request_id: str
    client_id: str
    jobs: int
    """Images or answers that were asked for."""
    units: int
    """Steps or tokens that were run."""
    seconds: float
    """From submission to end."""
    queue_seconds: float | None
    """From submission to the first run of an engine; None if there was none."""
    first_event_seconds: float | None
    """From submission to the first step or text; None if there was none."""
    error: str | None = None


@dataclass(eq=False)
class OpenRequest:
    """A request that was not told its end. Times on the scheduler's clock."""

    request: AnyRequest
    jobs: list[Job]
    """Those that are left."""
    arrived: float
    started: float | None = None
    first_event: float | None = None
    units: int = 0
    """Steps or tokens that were run."""
    input_tokens: int = 0
    images: int = 0
    """Images that are finished."""
    ended_by_length: bool = False

    def record(self, outcome: Outcome, now: float, error: Exception | None) -> RequestRecord:
        """Returns the record of its end."""

        def since_arrival(moment: float | None) -> float | None:
            return None if moment is None else moment - self.arrived

        return RequestRecord(
            self.request.kind,
            outcome,
            self.request.request_id,
            self.request.client_id,
            self.request.num_jobs,
            self.units,
            now - self.arrived,
            since_arrival(self.started),
            since_arrival(self.first_event),
            None if error is None else one_line(error),
        )


@dataclass
class Statistics:
    """Counts since the start."""

    submitted: int = 0
    ended: Counter[tuple[RequestKind, Outcome]] = field(default_factory=Counter)
    steps_of_group: Counter[int] = field(default_factory=Counter)
    """Number of image steps that each expert has run."""
    batch_sizes: Counter[int] = field(default_factory=Counter)
    """Number of expert runs by the number of images in the batch."""
    busy_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Time by station: expert_0 …, encode, decode, preview, prefill, write."""
    tokens: int = 0
    """Tokens of answers."""
    last_image_time: float = 0.0
    """Unix time when the last image was drawn."""
    records: deque[RequestRecord] = field(default_factory=lambda: deque(maxlen=KEPT_RECORDS))
    """Requests that have ended and were not read yet."""
    seconds_per_job: defaultdict[RequestKind, float] = field(default_factory=lambda: defaultdict(float))
    """Moving average of the time between the ends of two jobs."""
    _last_end: dict[RequestKind, float] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return self._of_outcome("finished")

    @property
    def failed(self) -> int:
        return self._of_outcome("failed")

    @property
    def cancelled(self) -> int:
        return self._of_outcome("cancelled")

    @property
    def rejected(self) -> int:
        return self._of_outcome("rejected")

    @property
    def expired(self) -> int:
        return self._of_outcome("expired")

    @property
    def step_seconds(self) -> float:
        """Time spent in experts."""
        return sum(seconds for name, seconds in self.busy_seconds.items() if name.startswith("expert"))

    def _of_outcome(self, outcome: Outcome) -> int:
        return sum(count for (_, name), count in self.ended.items() if name == outcome)

    def count_run(self, station: Station, jobs: int, seconds: float) -> None:
        """Counts a run of a station."""
        self.busy_seconds[name_of(station)] += seconds
        if isinstance(station, int):
            self.steps_of_group[station] += jobs
            self.batch_sizes[jobs] += 1

    def count_end(self, record: RequestRecord, now: float) -> None:
        """Counts the end of a request."""
        self.ended[record.kind, record.outcome] += 1
        self.records.append(record)
        if record.outcome == "finished":
            last = self._last_end.get(record.kind, now - record.seconds)
            each = min(now - last, record.seconds) / record.jobs
            before = self.seconds_per_job[record.kind] or each
            self.seconds_per_job[record.kind] = MEMORY * before + (1 - MEMORY) * each
            self._last_end[record.kind] = now


def name_of(station: Station) -> str:
    """Returns a station's name in logs and metrics."""
    return f"expert_{station}" if isinstance(station, int) else station
