"""Batches on many workers, simulated: where time goes, and which limit is met first.

What is simulated is the plan of `runtime.batch.cluster`: one reader hands out shards in order, each free worker takes
the next, runs it, and is busy until its part is written. Workers start late, differ, and die. The figures to put in
are those that `bench batch` measures.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.table import Table

from export.benchmarks.report import AsJson, Publisher, app
from runtime.console import stdout

BUSY = 0.9
"""Share of their time in which workers must run shards, to be what limits a job."""


@dataclass(frozen=True)
class Cluster:
    """A job and the machines that it runs on."""

    images: int
    workers: int
    images_per_hour: float
    """Of one worker."""
    rows_per_shard: int = 256
    bytes_per_image: int = 10_000
    start_seconds: float = 60.0
    """Until a new worker has loaded its engines."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a shard's time."""
    hours_between_losses: float = 24.0
    """Mean time until a worker is lost: spot machines."""
    rows_read_per_second: float = 5_000.0
    store_latency: float = 0.1
    """Seconds until the store has answered a write."""
    store_bytes_per_second: float = 1e9
    """Of the whole cluster together."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    hours: float
    efficiency: float
    """Share of the workers' time in which they ran shards that were finished."""
    waiting_for_rows: float
    waiting_for_store: float
    lost: float
    """Shares of their time, as is this: shards of workers that died, and starts."""
    losses: int
    parts: int
    limit: str
    """What the time is limited by."""


def simulate(cluster: Cluster, seed: int = 0) -> Outcome:
    """Runs a job in simulated time."""
    draw = random.Random(seed)
    shards = -(-cluster.images // cluster.rows_per_shard)
    mean = cluster.rows_per_shard * 3600 / cluster.images_per_hour
    part = cluster.rows_per_shard * cluster.bytes_per_image / cluster.store_bytes_per_second
    read = cluster.rows_per_shard / cluster.rows_read_per_second
    rate_of_loss = 1 / (3600 * cluster.hours_between_losses)
    start = cluster.start_seconds
    events: list[tuple[float, int, bool]] = [(start, worker, False) for worker in range(cluster.workers)]
    dies = [draw.expovariate(rate_of_loss) for _ in events]
    store_free = useful = for_rows = for_store = end = 0.0
    lost = start * cluster.workers
    losses = handed_out = 0
    again: deque[int] = deque()
    while events:
        now, worker, has_run = heapq.heappop(events)
        if has_run:
            store_free = max(store_free, now) + part
            end = store_free + cluster.store_latency
            for_store += end - now
            heapq.heappush(events, (end, worker, False))
            continue
        if not again and handed_out == shards:
            continue
        shard = again.popleft() if again else handed_out
        handed_out = max(handed_out, shard + 1)
        began = max(now, (shard + 1) * read)
        seconds = mean * draw.lognormvariate(-(cluster.spread**2) / 2, cluster.spread)
        for_rows += began - now
        if dies[worker] > began + seconds:
            useful += seconds
            heapq.heappush(events, (began + seconds, worker, True))
            continue
        losses += 1
        again.append(shard)
        back = max(dies[worker], began) + start
        lost += back - began
        dies[worker] = back + draw.expovariate(rate_of_loss)
        heapq.heappush(events, (back, worker, False))
    whole = end * cluster.workers
    shares = {
        "workers": useful / whole,
        "the reader": for_rows / whole,
        "the store": for_store / whole,
        "losses and starts": lost / whole,
        "the last shards": 1 - (useful + for_rows + for_store + lost) / whole,
    }
    busy = shares["workers"] >= BUSY
    limit = "workers" if busy else max(shares.keys() - {"workers"}, key=lambda name: shares[name])
    return Outcome(
        end / 3600,
        shares["workers"],
        shares["the reader"],
        shares["the store"],
        shares["losses and starts"],
        losses,
        shards,
        limit,
    )


def _cost_of_a_million(cluster: Cluster, outcome: Outcome, cost_per_hour: float) -> float:
    """Returns what a million images cost, if a worker costs so much."""
    return cost_per_hour * cluster.workers * outcome.hours * 1e6 / cluster.images


@app.command("scale-out", no_args_is_help=False)
def scale_out(
    images: Annotated[int, typer.Option(help="Number of images of the job.", min=1)] = 10_000_000,
    workers: Annotated[list[int] | None, typer.Option(help="Number of workers; may be repeated.", min=1)] = None,
    images_per_hour: Annotated[float, typer.Option(help="Of one worker, as `bench batch` measures it.", min=1)] = 5_000,
    rows_per_shard: Annotated[int, typer.Option(help="As of run-batch.", min=1)] = 256,
    bytes_per_image: Annotated[int, typer.Option(help="Size of a PNG.", min=1)] = 10_000,
    start_seconds: Annotated[float, typer.Option(help="Until a new worker has loaded its engines.", min=0)] = 60,
    hours_between_losses: Annotated[float, typer.Option(help="Mean time until a worker is lost.", min=0.01)] = 24,
    rows_read_per_second: Annotated[float, typer.Option(help="Of the reader.", min=1)] = 5_000,
    store_latency: Annotated[float, typer.Option(help="Seconds of a write.", min=0)] = 0.1,
    store_bytes_per_second: Annotated[float, typer.Option(help="Of all workers together.", min=1)] = 1e9,
    cost_per_hour: Annotated[float, typer.Option(help="Of a worker, in your currency.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the simulated chance.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Simulate a batch on many workers: hours, efficiency, and which limit is met first.

    \b
    Examples:
      latte-flow bench scale-out
      latte-flow bench scale-out --images 1000000000 --rows-per-shard 4096 --workers 1000 --images-per-hour 100000
    """
    publisher = Publisher(as_json)
    found = []
    for number in workers or (1, 10, 100, 1_000, 10_000):
        cluster = Cluster(
            images,
            number,
            images_per_hour,
            rows_per_shard,
            bytes_per_image,
            start_seconds,
            hours_between_losses=hours_between_losses,
            rows_read_per_second=rows_read_per_second,
            store_latency=store_latency,
            store_bytes_per_second=store_bytes_per_second,
        )
        found.append((cluster, simulate(cluster, seed)))

    def show() -> None:
        columns: dict[str, Callable[[Cluster, Outcome], str]] = {
            "workers": lambda cluster, _: f"{cluster.workers:,}",
            "hours": lambda _, outcome: f"{outcome.hours:,.1f}",
            "images/h": lambda cluster, outcome: f"{cluster.images / outcome.hours:,.0f}",
            "busy": lambda _, outcome: f"{outcome.efficiency:.1%}",
            "rows": lambda _, outcome: f"{outcome.waiting_for_rows:.1%}",
            "store": lambda _, outcome: f"{outcome.waiting_for_store:.1%}",
            "lost": lambda _, outcome: f"{outcome.lost:.1%}",
            "deaths": lambda _, outcome: f"{outcome.losses:,}",
            "limit": lambda _, outcome: outcome.limit,
        }
        if cost_per_hour:
            columns["cost/M"] = lambda cluster, outcome: f"{_cost_of_a_million(cluster, outcome, cost_per_hour):,.2f}"
        table = Table(*columns, title=f"{images:,} images in parts of {rows_per_shard}")
        for cluster, outcome in found:
            table.add_row(*(shown(cluster, outcome) for shown in columns.values()))
        stdout.print(table)

    runs = [
        {
            **asdict(cluster),
            **asdict(outcome),
            "cost_of_a_million": _cost_of_a_million(cluster, outcome, cost_per_hour),
        }
        for cluster, outcome in found
    ]
    publisher.publish({"runs": runs}, show)
