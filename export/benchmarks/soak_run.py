"""Runs a soak: clients, a thread that kills and reloads, the supervisor of `latte-flow serve`, and a look at memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from export.benchmarks.soak import KINDS, End, Ended, MemorySample, Outage, Plan, Record
from export.benchmarks.triton_server import settled_figures, triton_server
from model_repository.client import GRACE_SECONDS, Client
from model_repository.layout import VERSION
from model_repository.schema import CANCELLED, DEADLINE, INTERNAL, INVALID, MODEL, UNAVAILABLE
from model_repository.server import Stub, TritonServer
from model_repository.signals import ignore_endings
from model_repository.supervisor import LOOK_SECONDS, MAX_RESTARTS, RESTARTS_SECONDS, Supervisor
from runtime.errors import CancelledError, DeadlineError, InputError, LatteFlowError, ServiceError, one_line
from runtime.images import png_bytes
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.requests import Limits

KILLS_AT_ONCE = MAX_RESTARTS - 2
"""Kills within the supervisor's window; with more it would rightly give up."""
NOTICE_SECONDS = 40.0
"""How long the supervisor may take to notice a kill; its ping is what takes longest."""
SAMPLE_SECONDS = 0.5
POLL_SECONDS = 0.05
SLACK_SECONDS = 2.0
"""A client's own work after the last wait for a response: closing a stream, on busy cores."""
_CODE = re.compile(rf"\b({'|'.join((INVALID, UNAVAILABLE, DEADLINE, CANCELLED, INTERNAL))})\b")


def run_soak(bundle: Path, plan: Plan, report: Callable[[str], None]) -> Record:
    """Serves the bundle, sends the plan's requests, and returns what was seen.

    Args:
        report: called with one line for each kill, restart and reload.
    """
    with LatteFlowPipeline.from_pretrained(bundle) as pipe:
        image = png_bytes(pipe("a red star", num_inference_steps=4, seed=0).images[0])
    record = Record()
    with triton_server(bundle, Limits()) as server:
        began = time.monotonic()
        disturbance = _Disturbance(server, plan, record, report)
        client = Client(server.grpc_url)

        def one(index: int) -> None:
            if disturbance.wait_for_its_turn(index):
                send(client, plan, index, image, record)

        with disturbance.running(), ThreadPoolExecutor(plan.clients, thread_name_prefix="client") as pool:
            try:
                list(pool.map(one, range(plan.requests)))
            except KeyboardInterrupt:
                ignore_endings()  # what follows takes as long as the requests in flight, and leaves nothing behind
                disturbance.stop()
                raise
        record.seconds = time.monotonic() - began
        try:
            settled_figures(server)
        except ServiceError as error:
            record.faults.append(one_line(error))
    record.left_behind += [f"{region}" for region in server.regions()]
    record.left_behind += [f"process {stub.pid} of {stub.model}" for stub in server.stubs()]
    return record


def send(client: Client, plan: Plan, index: int, image: bytes, record: Record) -> None:
    """Sends one request and records its end. The same seed and index make the same request.

    Args:
        image: a PNG file, to ask about.
    """
    rng = np.random.default_rng((plan.seed, index))
    kind = KINDS[rng.choice(len(KINDS))]
    cancel = rng.random() < plan.cancel
    patience = int(rng.integers(1, 4))
    inputs: dict[str, Any] = {"deadline": plan.deadline, "seed": index}
    images = int(rng.integers(1, 3))
    if kind == "question":
        tokens = int(rng.integers(2, 17))
        inputs |= {"question": "what is it?", "image": image, "max_new_tokens": tokens, "stream": cancel}
    else:
        inputs |= {"prompt": f"a red star {index % 7}", "num_images": images, "progress": cancel}
        inputs["num_inference_steps"] = int(rng.integers(4, 9))
        if kind == "images with previews":
            inputs["preview_every"] = 2
        if kind == "PNG":
            inputs["image_format"] = "png"
    began = time.monotonic()
    end, code, message = _end_of(client, inputs, patience if cancel else None, images)
    ended = time.monotonic()
    if ended - began > plan.deadline + GRACE_SECONDS - POLL_SECONDS and end != "lost":
        # The client's own patience ended the request, not the service.
        end = "lost" if end == "error" or ended - began > plan.deadline + GRACE_SECONDS + SLACK_SECONDS else end
    record.ended.append(Ended(index, kind, end, began, ended, code, message))


def _end_of(client: Client, inputs: dict[str, Any], patience: int | None, images: int) -> tuple[End, str, str]:
    """Sends a request; returns its end, and code and message of an error.

    Args:
        patience: number of responses after which the client cancels; None if it does not.
        images: number of images that a request for images must bring.
    """
    try:
        with contextlib.closing(client.stream(**inputs)) as responses:
            for number, response in enumerate(responses, 1):
                if response.event == "done":
                    complete = "question" in inputs or (response.images is not None and len(response.images) == images)
                    return ("answer", "", "") if complete else ("lost", "", "the answer is incomplete")
                if number == patience:
                    return "cancelled", "", ""
    except LatteFlowError as error:
        return "error", _code_of(error), one_line(error)
    except Exception as error:  # a soak goes on, and says so
        return "error", type(error).__name__, one_line(error)
    return "lost", "", "the stream ended without an answer"


def _code_of(error: LatteFlowError) -> str:
    for kind, code in ((InputError, INVALID), (DeadlineError, DEADLINE), (CancelledError, CANCELLED)):
        if isinstance(error, kind):
            return code
    found = _CODE.search(str(error))
    return found[1] if found else "no code"


class _Disturbance:
    """Kills and reloads the model when so many requests have ended; supervises the server and samples its memory."""

    def __init__(self, server: TritonServer, plan: Plan, record: Record, report: Callable[[str], None]) -> None:
        self._server = server
        self._clients = plan.clients
        self._record = record
        self._say = report
        self._rng = np.random.default_rng((plan.seed, plan.requests))
        self._kills = moments(self._rng, plan.kill_every, plan.requests)
        self._reloads = moments(self._rng, plan.reload_every, plan.requests)
        self._faults: list[str] = []
        self._supervisor = Supervisor(server, self._report)
        self._killed = 0.0
        """When a kill is under way: its time on the monotonic clock."""
        self._replaced: Stub | None = None
        """What was killed, if the model was being replaced; with no requests in flight nothing is wrong then."""
        self._stop = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        threads = [threading.Thread(target=part) for part in (self._supervise, self._disturb, self._sample)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop()
            for thread in threads:
                thread.join()

    def stop(self) -> None:
        """Kills and reloads no more, and lets no request begin."""
        self._stop.set()

    def wait_for_its_turn(self, index: int) -> bool:
        """Waits while a kill or a reload is due that should come before this request, so that all meet requests.

        Returns:
            Whether the request may begin: False once the soak is to stop.
        """
        while not self._stop.is_set() and self._is_behind(index - self._clients):
            time.sleep(POLL_SECONDS)
        return not self._stop.is_set()

    def _is_behind(self, ended: int) -> bool:
        due = self._reloads[:1] + (self._kills[:1] if self._may_kill() else [])
        return any(moment < ended for moment in due)

    def _report(self, line: str) -> None:
        self._faults.append(line)
        self._say(line)

    def _supervise(self) -> None:
        """Does what `Supervisor.run` does, until the clients are done and the last kill is cured."""
        while self._killed or not self._stop.is_set():
            time.sleep(LOOK_SECONDS)
            looked = time.monotonic()
            try:
                if not self._supervisor.look():
                    if self._killed and self._replaced and not self._replaced.region.exists():
                        self._killed = 0.0
                    if self._killed and looked - self._killed > NOTICE_SECONDS:
                        raise ServiceError(f"a kill was not noticed within {NOTICE_SECONDS:g} s")
                    continue
            except ServiceError as error:
                self._record.faults.append(one_line(error))
                self._killed, self._kills, self._reloads = 0.0, [], []
                return
            killed, self._killed = self._killed, 0.0
            began = killed or looked - 2 * LOOK_SECONDS
            self._record.outages.append(Outage(began, time.monotonic(), self._faults[-1], bool(killed)))

    def _disturb(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            ended = len(self._record.ended)
            if self._killed:
                continue  # the server is about to be started again
            if self._kills and ended >= self._kills[0] and self._may_kill():
                if self._kill():
                    self._kills = self._kills[1:]
            elif self._reloads and ended >= self._reloads[0]:
                self._reloads = self._reloads[1:]
                self._reload()

    def _may_kill(self) -> bool:
        window = time.monotonic() - RESTARTS_SECONDS
        return sum(outage.ended > window for outage in self._record.outages) < KILLS_AT_ONCE

    def _kill(self) -> bool:
        """Kills the model's process, or one of two while the model is being replaced; returns whether it did."""
        stubs = self._stubs()
        if not stubs:
            return False
        victim = stubs[self._rng.integers(len(stubs))]
        self._say(f"{len(self._record.ended)} requests: kill the model's process{', one of two' * (len(stubs) > 1)}")
        self._replaced = victim if len(stubs) > 1 else None
        self._killed = time.monotonic()
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:  # it ended by itself
            self._killed = 0.0
            return False
        self._record.kills += 1
        return True

    def _stubs(self) -> list[Stub]:
        return [stub for stub in self._server.stubs() if stub.model == MODEL]

    def _reload(self) -> None:
        self._say(f"{len(self._record.ended)} requests: reload the model")
        outages = len(self._record.outages)
        os.utime(self._server.repository / MODEL / VERSION / "model.py")  # Triton loads what has changed
        try:
            self._server.control.load()
        except ServiceError as error:
            if len(self._record.outages) == outages:
                self._record.faults.append(f"a reload failed: {one_line(error)}")
        else:
            self._record.reloads += 1

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            stubs = self._stubs()
            if len(stubs) != 1 or self._killed:
                continue
            with contextlib.suppress(OSError):  # a process may end meanwhile
                server, model = resident(self._server.process.pid), resident(stubs[0].pid)
                self._record.memory.append(MemorySample(len(self._record.ended), server, model))


def moments(rng: np.random.Generator, every: int, requests: int) -> list[int]:
    """Returns after how many requests to act: `every` on average, at random, before the last request."""
    found: list[int] = []
    last = 0.0
    while every:
        last += every * rng.uniform(0.5, 1.5)
        if last >= requests:
            break
        found.append(int(last))
    return found


def resident(process: int) -> float:
    """Returns the resident memory of a process in MB.

    Raises:
        OSError: there is no such process.
    """
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
