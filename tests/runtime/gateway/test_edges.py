"""What one client does at the edge of what is allowed costs nobody else anything."""

from __future__ import annotations

import base64
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from PIL import Image

from model_repository.gateway_commands import _listen
from runtime.gateway.app import GatewaySettings
from runtime.gateway.keys import ApiKey, KeyRing
from runtime.serving.service import LocalService
from tests.runtime.gateway.conftest import Running, gateway_process, local, running
from tests.runtime.gateway.test_streams import Late

IMAGES, CHAT = "/v1/images/generations", "/v1/chat/completions"


def asked(door: Running, content: object, **fields: object) -> httpx2.Response:
    message = {"role": "user", "content": content}
    return httpx2.post(f"{door.url}{CHAT}", json={"messages": [message], "max_tokens": 2, **fields}, timeout=60)


def image_part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize("count", [300, 100_000])
def test_a_conversation_too_long_to_be_made_tokens_is_refused_before(door: Running, count: int) -> None:
    """300 long parts once held up every other request for eight seconds."""
    text = "a" * 32_000 if count == 300 else ""
    answer = asked(door, [{"type": "text", "text": text}] * count)
    assert answer.status_code == 422
    messages = [{"role": "user", "content": "a" * 32_000}] * 5
    answer = httpx2.post(f"{door.url}{CHAT}", json={"messages": messages})
    assert answer.status_code == 422
    assert "the messages have 160000 characters, the limit is 128000" in answer.json()["error"]["message"]


def test_exif_data_that_a_camera_got_wrong_turn_an_image_all_the_same(door: Running) -> None:
    """Its width is a text; Pillow cannot write that again."""
    tags = struct.pack("<HHII", 274, 3, 1, 6) + struct.pack("<HHI", 256, 2, 2) + b"a\0\0\0"
    buffer = io.BytesIO()
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    Image.new("RGB", (16, 16), "red").save(buffer, "JPEG", exif=exif)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    assert asked(door, [{"type": "text", "text": "what?"}, image_part(uri)]).status_code == 200


@contextmanager
def host_of_images(seconds_a_byte: float) -> Iterator[tuple[str, list[int]]]:
    """A host that sends an image byte by byte; yields its URL, and a list with an item for each request."""
    requests: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    requests.append(len(connection.recv(4096)))
                    try:
                        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                        for _ in range(1000):
                            connection.sendall(b"x")
                            time.sleep(seconds_a_byte)
                    except OSError:
                        continue

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/image.png", requests
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(60)


def test_images_are_counted_before_one_is_fetched_and_all_of_one_has_a_time(
    service: LocalService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.gateway.fetching.FETCH_SECONDS", 0.5)
    settings = GatewaySettings(allowed_image_hosts=frozenset({"127.0.0.1"}))
    with running(service, settings) as door, host_of_images(seconds_a_byte=0.01) as (url, requests):
        answer = asked(door, [image_part(url)] * 50)
        assert (answer.status_code, requests) == (400, [])
        answer = asked(door, [image_part(url)])
        assert answer.status_code == 400
        assert "took longer than 0.5 s" in answer.json()["error"]["message"]
        assert len(requests) == 1


def test_new_requests_are_refused_until_the_last_one_has_finished(bundle: Path) -> None:
    with local(bundle) as service:
        late = Late(service)
        late.seconds = 1.5
        with running(late) as door, ThreadPoolExecutor(1) as others:  # type: ignore[arg-type]
            drawing = others.submit(
                httpx2.post, f"{door.url}{IMAGES}", json={"prompt": "a", "num_inference_steps": 1}, timeout=60
            )
            while not service.scheduler.pending:
                assert not drawing.done()
                time.sleep(0.01)
            door.gateway.draining = door.server.should_exit = True
            statuses = []
            while not drawing.done():
                try:
                    statuses.append(httpx2.post(f"{door.url}{IMAGES}", json={"prompt": "a"}).status_code)
                except httpx2.TransportError:
                    break
                time.sleep(0.1)
            assert drawing.result().status_code == 200
    assert len(statuses) > 5
    assert set(statuses) == {503}


def test_a_stream_that_is_left_counts_as_one(door: Running) -> None:
    def counted(status: int) -> float:
        pattern = rf'gateway_requests_total{{route="{IMAGES}",status="{status}"}} ([\d.]+)'
        found = re.search(pattern, httpx2.get(f"{door.url}/metrics").text)
        return float(found[1]) if found else 0

    before, answered = counted(499), counted(200)
    body = {"prompt": "a", "num_inference_steps": 200, "stream": True, "partial_images": 3}
    with httpx2.stream("POST", f"{door.url}{IMAGES}", json=body, timeout=30) as answer:
        next(answer.iter_lines())
    give_up = time.monotonic() + 20
    while counted(499) == before and time.monotonic() < give_up:
        time.sleep(0.05)
    assert (counted(499), counted(200)) == (before + 1, answered)


def test_equal_requests_at_once_are_drawn_once(door: Running) -> None:
    def ask(_: int) -> httpx2.Response:
        body = {"prompt": "at once", "num_inference_steps": 60}
        return httpx2.post(f"{door.url}{IMAGES}", json=body, headers={"Idempotency-Key": "k"}, timeout=60)

    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(ask, range(3)))
    assert sorted(answer.headers["x-result-cache"] for answer in answers) == ["hit", "hit", "miss"]
    assert len({answer.json()["data"][0]["seed"] for answer in answers}) == 1


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (IMAGES, {"prompt": "a", "n": 17}, "n"),
        (IMAGES, {"prompt": "a", "size": "1x1"}, "size"),
        (IMAGES, {"prompt": "a", "num_inference_steps": 10**6}, "num_inference_steps"),
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "max_tokens": 10**6}, "max_tokens"),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{**image_part("data:"), "image_url": {"url": "", "detail": 1}}]}
                ]
            },
            "messages.0.content.0.image_url.detail",
        ),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ],
)
def test_errors_name_the_field_that_was_sent(door: Running, path: str, fields: dict[str, object], param: str) -> None:
    error = httpx2.post(f"{door.url}{path}", json=fields).json()["error"]
    assert error["param"] == param
    assert error["message"].startswith(param)


def test_small_answers_are_not_held_back() -> None:
    """asyncio turns Nagle's algorithm off only where the socket names TCP; each answer took 40 ms more."""
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_probes_and_lists(door: Running) -> None:
    assert httpx2.head(f"{door.url}/health").status_code == 200
    assert httpx2.get(f"{door.url}/v1/models/").json() == httpx2.get(f"{door.url}/v1/models").json()
    body = {"prompt": "a", "num_inference_steps": 1, "output_compression": 100}
    assert httpx2.post(f"{door.url}{IMAGES}", json=body).status_code == 200


def test_a_page_of_an_allowed_origin_may_ask_with_a_key(service: LocalService) -> None:
    ring = KeyRing([ApiKey(name="a", key="a-key-for-the-page")])
    settings = GatewaySettings(ring, allowed_origins=frozenset({"https://ours.example"}))
    with running(service, settings) as door:
        for origin, is_allowed in (("https://ours.example", True), ("https://other.example", False)):
            headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asked_before = httpx2.options(f"{door.url}{IMAGES}", headers=headers)
            assert (asked_before.headers.get("access-control-allow-origin") == origin) == is_allowed
        key = {"Authorization": "Bearer a-key-for-the-page", "Origin": "https://ours.example"}
        answer = httpx2.get(f"{door.url}/v1/models", headers=key)
        assert answer.headers["access-control-allow-origin"] == "https://ours.example"


def test_the_page_gives_no_file_of_this_machine_away(bundle: Path, tmp_path: Path) -> None:
    """Gradio would copy any file that a request names to where it can be fetched."""
    secret = tmp_path / "secret.txt"
    secret.write_text("nobody may read this")
    with gateway_process(bundle, "--playground") as (url, _), httpx2.Client(base_url=url, timeout=60) as page:
        uploaded = page.post("/gradio_api/upload", files={"files": ("own.png", png())}).json()[0]
        told = {str(path): called_with(page, str(path)) for path in (secret, uploaded)}
        assert page.get(f"/gradio_api/file={secret}").status_code == 403
    assert "secret.txt" not in re.sub(r"[^\n]*(was not uploaded|not in|InvalidPath)[^\n]*", "", told[str(secret)])
    assert "process_completed" in told[uploaded]
    assert '"success":true' in told[uploaded].replace(" ", "")


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(buffer, "PNG")
    return buffer.getvalue()


def called_with(page: httpx2.Client, path: str) -> str:
    """Calls what answers a question with an image; returns the events."""
    config = page.get("/config").json()
    images = {part["id"] for part in config["components"] if part["type"] == "image"}
    texts = {part["id"] for part in config["components"] if part["type"] == "textbox"}
    place = next(
        index
        for index, call in enumerate(config["dependencies"])
        if len(call["inputs"]) == 3 and call["inputs"][0] in images and call["inputs"][1] in texts
    )
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    body = {"data": [file, "what?", 2], "fn_index": place, "session_hash": f"s{len(path)}"}
    page.post("/gradio_api/queue/join", json=body).raise_for_status()
    lines = []
    with page.stream("GET", "/gradio_api/queue/data", params={"session_hash": body["session_hash"]}) as events:
        for line in events.iter_lines():
            lines.append(line)
            if '"process_completed"' in line or "close_stream" in line:
                break
    return "\n".join(lines)
