"""Quotas, priorities, limits from a configuration, records and logs."""

from __future__ import annotations

import json
import logging

import pytest

from runtime.errors import InputError, QueueFullError
from runtime.serving.log import JsonFormatter, OneLineFormatter, log_request, set_up_logging
from runtime.serving.requests import Limits
from runtime.serving.scheduler import Scheduler
from runtime.serving.statistics import RequestRecord
from runtime.serving.worker import Worker
from tests.runtime.serving.test_scheduler import ScriptedStations, make, request, run


def test_one_client_cannot_lock_out_the_others() -> None:
    """Sixteen maximal requests of one client used to fill the queue for everyone."""
    scheduler, _ = make(Limits(max_queued_images=64, max_images_per_client=32))
    for _ in range(2):
        scheduler.submit(request(num_images=16, client_id="greedy"))
    with pytest.raises(QueueFullError, match=r"client 'greedy' has 32 of 32 images .*; try again in \d+ s"):
        scheduler.submit(request(client_id="greedy"))
    other = scheduler.submit(request(num_images=16, client_id="other"))
    nobody = scheduler.submit(request(num_images=16))
    run(scheduler)
    assert [len(handle.result(0)) for handle in (other, nobody)] == [16, 16]
    scheduler.submit(request(num_images=16, client_id="greedy"))
    assert {client for _, client in scheduler._quotas._of_client} <= {"greedy"}


def test_clients_without_an_id_are_one_client() -> None:
    """They had no quota, so anybody could fill the queue by leaving the id out."""
    scheduler, _ = make(Limits(max_queued_images=64))
    for _ in range(2):
        scheduler.submit(request(num_images=16))
    with pytest.raises(QueueFullError, match="clients without an id have 32 of 32 images"):
        scheduler.submit(request())
    scheduler.submit(request(num_images=16, client_id="other"))


def test_a_client_has_half_of_the_queue_unless_something_else_was_said() -> None:
    """The default was the whole queue, so one client locked out all others."""
    assert (Limits().max_images_per_client, Limits().max_questions_per_client) == (512, 128)
    small = Limits.from_parameters({"max_queued_images": "64", "max_queued_questions": "1"})
    assert (small.max_images_per_client, small.max_questions_per_client) == (32, 1)
    assert Limits(max_queued_images=20).max_images_per_client == 16  # one request of the largest size
    assert Limits(max_queued_images=20, max_images_per_client=3).max_images_per_client == 3
    with pytest.raises(InputError, match="max_images_per_client must be a whole number"):
        Limits.from_parameters({"max_images_per_client": "-1"})


def test_a_clients_requests_share_one_weight() -> None:
    stations = ScriptedStations(fixed=1e-4, each=1.2e-3)
    scheduler = Scheduler(stations, stations.clock, Limits(max_rows_per_tick=8))
    ends: dict[str, float] = {}
    for i in range(40):
        name = f"many {i}"
        scheduler.submit(request(name, client_id="many"), lambda h, e: ends.__setitem__(h.request.prompt, stations.now))
    scheduler.tick()
    scheduler.submit(request("one", client_id="one"), lambda h, e: ends.__setitem__(h.request.prompt, stations.now))
    run(scheduler)
    earlier = sum(end <= ends["one"] for name, end in ends.items() if name != "one")
    assert earlier < 10


def test_who_may_set_a_priority_is_configured() -> None:
    scheduler, _ = make(Limits(priority_clients="editor,batch"))
    scheduler.submit(request(priority=2, client_id="editor"))
    scheduler.submit(request(client_id="anyone"))
    with pytest.raises(InputError, match="client 'anyone' may not set a priority here"):
        scheduler.submit(request(priority=1, client_id="anyone"))
    with pytest.raises(InputError, match="a client without an id may not set a priority"):
        scheduler.submit(request(priority=-1))
    scheduler, _ = make(Limits(priority_clients=""))
    with pytest.raises(InputError, match="may not set a priority"):
        scheduler.submit(request(priority=1, client_id=""))


def test_limits_come_from_texts() -> None:
    assert Limits.from_parameters({}) == Limits()
    limits = Limits.from_parameters({"max_steps": "7", "priority_clients": "a", "layout": "in-process"})
    assert (limits.max_steps, limits.priority_clients) == (7, "a")
    for text in ("many", "-1", "1.5", ""):
        with pytest.raises(InputError, match="the limit max_steps must be a whole number"):
            Limits.from_parameters({"max_steps": text})
    with pytest.raises(InputError, match="the limit max_steps must be at least 1, got 0"):
        Limits.from_parameters({"max_steps": "0"})


def test_each_request_leaves_a_record_of_its_end() -> None:
    stations = ScriptedStations()
    records: list[RequestRecord] = []
    scheduler = Scheduler(
        stations, stations.clock, Limits(max_queued_images=3, max_images_per_client=3), on_end=records.append
    )
    scheduler.submit(request("a", num_images=2, request_id="r1", client_id="c"))
    scheduler.submit(request("broken"))
    with pytest.raises(QueueFullError):
        scheduler.submit(request("late"))
    run(scheduler)
    by_outcome = {record.outcome: record for record in records}
    assert set(by_outcome) == {"rejected", "failed", "finished"}
    done = by_outcome["finished"]
    assert (done.kind, done.request_id, done.client_id, done.jobs, done.units) == ("draw", "r1", "c", 2, 16)
    assert done.queue_seconds == 0
    assert done.first_event_seconds is not None
    assert 0 < done.first_event_seconds < done.seconds
    assert by_outcome["failed"].error == "engine expert_0 failed"
    assert by_outcome["rejected"].queue_seconds is None


def test_the_log_has_one_line_for_each_request(caplog: pytest.LogCaptureFixture) -> None:
    record = RequestRecord("ask", "failed", "r\n1", "", 1, 3, 0.123456, 0.01, None, "it\nbroke")
    with caplog.at_level(logging.INFO, "latte_flow"):
        log_request(record)
        try:
            raise ValueError("a\nb")
        except ValueError:
            logging.getLogger("latte_flow").exception("bad")
    told, failure = caplog.records
    line = JsonFormatter().format(told)
    assert "\n" not in line
    values = json.loads(line)
    assert (values["event"], values["kind"], values["outcome"], values["units"]) == ("request", "ask", "failed", 3)
    assert (values["seconds"], values["level"]) == (0.1235, "info")
    assert "client_id" not in values
    for formatter in (JsonFormatter(), OneLineFormatter()):
        assert "\n" not in formatter.format(told)
        assert "\n" not in formatter.format(failure)
    assert ' request_id="r\\n1" ' in OneLineFormatter().format(told)
    with pytest.raises(InputError, match="log_format must be one of text, json, got 'xml'"):
        set_up_logging("xml")


@pytest.mark.parametrize(
    "forged", ["r1 outcome=finished", "r1\nrequest kind=draw", "r1\x1b[2K\rr2", "r1\u2028r2", 'r1" a="']
)
def test_an_id_forges_no_part_of_a_line(forged: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "latte_flow"):
        log_request(RequestRecord("draw", "failed", forged, "client-1", 1, 0, 0.5, None, None))
    line = OneLineFormatter().format(caplog.records[0])
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert f" outcome=failed request_id={json.dumps(forged)} client_id=client-1 jobs=1" in line


def test_a_thread_that_dies_says_so_even_if_its_requests_cannot_be_told() -> None:
    scheduler, _ = make()
    scheduler.abort = scheduler.tick = _raise  # type: ignore[method-assign]
    died: list[BaseException] = []
    worker = Worker(scheduler, died.append)
    scheduler.submit(request())
    worker._thread.join(5)
    assert died


def _raise(*_: object) -> bool:
    raise RuntimeError("broken")
