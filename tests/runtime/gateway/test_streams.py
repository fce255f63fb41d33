"""Streams that wait: comments keep them open, errors come as events, and the service is asked once for all of them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from runtime.errors import InputError, ServiceError
from runtime.gateway.streams import COMMENT, Pulse
from runtime.serving.requests import AnyRequest, Event, Handle, Listener
from runtime.serving.service import LocalService
from tests.runtime.gateway.conftest import Running, local, running

DRAWING = {"prompt": "a red star", "seed": 3, "num_inference_steps": 4, "stream": True, "response_format": "b64_json"}


class Late:
    """A service whose events come late; everything else is the real one's."""

    def __init__(self, service: LocalService) -> None:
        self._service = service
        self.model, self.limits = service.model, service.limits
        self.seconds = 1.0
        self.fails = False

    def submit(self, request: AnyRequest, listener: Listener) -> Handle:
        def late(handle: Handle, event: Event) -> None:
            if event.kind == "image":
                time.sleep(self.seconds)
                event = Event("failed", error=InputError("the star fell")) if self.fails else event
            listener(handle, event)

        return self._service.submit(request, late)

    def check(self) -> None:
        self._service.check()

    def drain(self, timeout: float) -> bool:
        return self._service.drain(timeout)

    def close(self) -> None:
        self._service.close()


@pytest.fixture(scope="module")
def late(bundle: Path) -> Iterator[Late]:
    with local(bundle) as service:
        yield Late(service)


@pytest.fixture
def door(late: Late, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr("runtime.gateway.streams.COMMENT_SECONDS", 0.3)
    late.seconds, late.fails = 1.0, False
    with running(late) as started:  # type: ignore[arg-type]
        yield started


def test_a_stream_that_waits_sends_comments(door: Running) -> None:
    with httpx2.stream("POST", f"{door.url}/v1/images/generations", json=DRAWING, timeout=60) as response:
        assert response.status_code == 200
        text = "".join(response.iter_text())
    assert text.startswith(COMMENT.decode() * 2)
    assert text.count("event: image_generation.completed") == 1
    extra = {"seed": 3, "num_inference_steps": 4}
    with door.client().images.generate(prompt="a red star", stream=True, extra_body=extra) as events:
        assert [event.type for event in events] == ["image_generation.completed"]


def test_what_fails_late_is_an_event(door: Running, late: Late) -> None:
    late.fails = True
    with httpx2.stream("POST", f"{door.url}/v1/images/generations", json=DRAWING, timeout=60) as response:
        assert response.status_code == 200
        *_, name, data, _, _ = "".join(response.iter_text()).split("\n")
    assert name == "event: error"
    assert "the star fell" in data
    late.seconds = 0.0
    response = httpx2.post(f"{door.url}/v1/images/generations", json=DRAWING, timeout=60)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the star fell"


def test_the_service_is_asked_once_for_all_streams() -> None:
    asked = []

    class Broken:
        def check(self) -> None:
            asked.append(time.monotonic())
            time.sleep(0.05)
            raise ServiceError("it does not answer")

    async def ask() -> list[BaseException | None]:
        pulse = Pulse(Broken())  # type: ignore[arg-type]
        return list(await asyncio.gather(*(pulse.check() for _ in range(50)), return_exceptions=True))

    found = asyncio.run(ask())
    assert len(asked) == 1
    assert [str(error) for error in found] == ["it does not answer"] * 50


def test_the_documentation_comes_from_here(door: Running) -> None:
    page = httpx2.get(f"{door.url}/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(sources) >= 3
    for source in sources:
        assert source.startswith("/static-offline-docs/"), source
        assert httpx2.get(door.url + source).status_code == 200
