"""Inputs and outputs in an S3-compatible store, moto's on loopback, and images of rows at URLs."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from runtime.batch.job import Job, run_job
from runtime.batch.places import place_of
from runtime.batch.reading import RowOptions, read_rows
from runtime.batch.shard import ShardOptions
from tests.runtime.batch.files import FEW_STEPS, RunCommand, files_in, write

BUCKET = "s3://bucket"


def post(url: str, text: str = "") -> None:
    request = urllib.request.Request(url, text.encode(), {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()


@dataclass(frozen=True)
class Store:
    """A store with a bucket."""

    url: str
    client: Any

    def put(self, name: str, content: bytes) -> str:
        self.client.put_object(Bucket="bucket", Key=name, Body=content)
        return f"{BUCKET}/{name}"

    def files(self, folder: str) -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=f"{folder}/")
        names = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        read = self.client.get_object
        found = {}
        for name in names:
            with suppress(self.client.exceptions.NoSuchKey):  # it was temporary
                found[name.removeprefix(f"{folder}/")] = read(Bucket="bucket", Key=name)["Body"].read()
        return found

    def allow(self, requests: int) -> None:
        """Lets so many requests pass; all later ones are denied, since nobody has rights."""
        post(f"{self.url}/moto-api/reset-auth", str(requests))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(server: str) -> Iterator[Store]:
    client = boto3.client("s3")
    post(f"{server}/moto-api/reset")
    client.create_bucket(Bucket="bucket")
    yield Store(server, client)
    Store(server, client).allow(2**31)
    client.close()


@pytest.fixture
def image() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    return buffer.getvalue()


def lines(*rows: object) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def test_all_kinds_of_rows_are_read_from_a_store(store: Store, image: bytes) -> None:
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"id": "a", "prompt": "a ring"}]), table)
    urls = [
        store.put("rows.parquet", table.getvalue()),
        store.put("rows.csv", b"id,prompt\na,a ring\n"),
        store.put("rows.jsonl", lines({"id": "a", "prompt": "a ring"})),
        store.put("folder/rows.jsonl", lines({"id": "a", "prompt": "a ring"})).rpartition("/")[0],
    ]
    for url in urls:
        assert [(row.id, row.values) for row in read_rows(place_of(url), RowOptions())] == [("a", {"prompt": "a ring"})]
    for name in ("photos/b.png", "photos/a/z.png", "photos/.hidden.png"):
        store.put(name, image)
    photos = list(read_rows(place_of(f"{BUCKET}/photos"), RowOptions()))
    assert [(row.id, row.values["image"]) for row in photos] == [
        ("a/z.png", f"{BUCKET}/photos/a/z.png"),
        ("b.png", f"{BUCKET}/photos/b.png"),
    ]


@pytest.mark.parametrize("kind", ["parquet", "png", "webdataset", "openai"])
def test_a_job_writes_to_a_store_what_it_writes_to_a_folder(
    bundle: Path, store: Store, image: bytes, tmp_path: Path, kind: Any
) -> None:
    rows = [{"id": f"{i}", "prompt": "a ring", "num_inference_steps": 1 + i} for i in range(3)]
    asked = [{"id": "q", "question": "what?", "image": "image.png", "max_new_tokens": 2}, {"id": "bad"}]
    source = tmp_path / "rows.jsonl"
    source.write_bytes(lines(*rows, *asked))
    (tmp_path / "image.png").write_bytes(image)
    store.put("image.png", image)
    url = store.put("rows.jsonl", source.read_bytes())
    local = run_job(Job(source, tmp_path / "out", bundle, kind, 2))
    assert run_job(Job(place_of(url), place_of(f"{BUCKET}/out"), bundle, kind, 2)) == local
    assert local.failed == 1
    expected, found = files_in(tmp_path / "out"), store.files("out")
    for files in (expected, found):
        del files["job.json"]  # the input has another checksum there
    if kind == "png":
        assert found.pop("part-00002/metadata.jsonl") == b""  # the last file of each part
    assert found == expected


def test_a_job_on_a_store_that_is_killed_goes_on(bundle: Path, store: Store, tmp_path: Path) -> None:
    source = write(tmp_path / "prompts.txt", *(f"a ring {i}" for i in range(8)))
    job = Job(source, place_of(f"{BUCKET}/killed"), bundle, "webdataset", 1)
    options = ["--format", "webdataset", "--rows-per-shard", "1"]
    command = [sys.executable, "-m", "runtime.cli", "run-batch", str(source), f"{BUCKET}/killed", str(bundle), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and "part-00000.tar" not in store.files("killed"):
        time.sleep(0.01)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(store.files("killed")) < 9
    run_job(job)
    run_job(Job(source, tmp_path / "whole", bundle, "webdataset", 1))
    assert store.files("killed") == files_in(tmp_path / "whole")


def test_a_store_that_refuses_a_write_is_one_line_and_finished_shards_stay(
    bundle: Path, store: Store, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write(tmp_path / "prompts.txt", *["a ring"] * 6)
    arguments = ("run-batch", source, f"{BUCKET}/out", bundle, *FEW_STEPS, "--rows-per-shard", 1)
    before: dict[str, bytes] = {}
    for requests in range(20, 200, 10):  # how many a shard takes depends on who is faster
        store.allow(requests)
        code, _, said = run_command(*arguments)
        assert (code, len(said.strip().splitlines())) == (2, 1), said
        store.allow(2**31)
        before = store.files("out")
        if len(before) > 1:
            break
    assert "; finished shards stay: repair that" in said
    assert 1 < len(before) < 7
    assert run_command(*arguments)[0] == 0
    after = store.files("out")
    assert len([name for name in after if name.startswith("part-")]) == 6
    assert before.items() <= after.items()


def test_what_cannot_be_reached_or_written_is_one_line(
    bundle: Path, store: Store, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write(tmp_path / "prompts.txt", "a ring")
    code, _, said = run_command("run-batch", source, "s3://other/out", bundle)
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert "cannot write to s3://other/out" in said
    code, _, said = run_command("run-batch", f"{BUCKET}/none.txt", tmp_path / "out", bundle)
    assert (code, said) == (2, f"error: there is no {BUCKET}/none.txt; name a file or a folder with rows\n")
    code, _, said = run_command("run-batch", "nothing://a/b.txt", tmp_path / "out", bundle)
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert "nothing://a/b.txt is not a URL that can be used" in said
    store.put("full/other", b"")
    code, _, said = run_command("run-batch", source, f"{BUCKET}/full", bundle)
    assert code == 2
    assert "is not empty and has no progress of a job" in said


def test_a_file_url_is_a_path(bundle: Path, image: bytes, tmp_path: Path, run_command: RunCommand) -> None:
    folder = tmp_path / "my files"
    folder.mkdir()
    (folder / "image.png").write_bytes(image)
    images = [folder.as_uri() + "/image.png", f"file://{folder}/none.png"]
    source = write(folder / "rows.jsonl", *({"id": str(i), "image": url} for i, url in enumerate(images)))
    arguments = (bundle, "--max-new-tokens", 2)
    out = folder / "new" / "out"
    code, said, _ = run_command("run-batch", source.as_uri(), f"file://localhost{out}", *arguments)
    assert (code, "1 failed" in said) == (3, True)
    assert run_command("run-batch", source, folder / "as a path", *arguments)[0] == 3
    assert files_in(out) == files_in(folder / "as a path")
    (out / "part-00000.parquet").rename(out / ".part-00000.parquet.tmp")  # as a killed run leaves it
    assert run_command("run-batch", source.as_uri(), out.as_uri(), *arguments)[0] == 3
    assert files_in(out) == files_in(folder / "as a path")
    for url in ("file://other/out", "file:///a%00b"):
        code, _, said = run_command("run-batch", source, url, *arguments)
        assert code == 2
        assert said == f"error: {url} must name a file of this machine by its whole path: file:///PATH\n"


@pytest.fixture
def web(image: bytes, tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "web"
    folder.mkdir()
    (folder / "image.png").write_bytes(image)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_are_fetched_from_hosts_that_are_named(
    bundle: Path, store: Store, web: str, image: bytes, tmp_path: Path, run_command: RunCommand
) -> None:
    at_store = store.put("image.png", image)
    images = [f"{web}/image.png", f"{web}/none.png", at_store, f"{BUCKET}/none.png"]
    source = write(tmp_path / "rows.jsonl", *({"id": str(i), "image": name} for i, name in enumerate(images)))
    arguments = ("run-batch", source, tmp_path / "out", bundle, "--max-new-tokens", 2)
    assert run_command(*arguments)[0] == 3
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors" / "part-00000.jsonl").read_text().splitlines()]
    refused = "images are fetched from no host; name its host with --allow-image-host, or give a file"
    assert [(line["id"], line["error"]) for line in errors] == [
        ("0", refused),
        ("1", refused),
        ("3", f"no image at {BUCKET}/none.png"),
    ]
    shutil.rmtree(tmp_path / "out")
    assert run_command(*arguments, "--allow-image-host", "127.0.0.1")[0] == 3
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors" / "part-00000.jsonl").read_text().splitlines()]
    assert (errors[0]["id"], errors[0]["error"]) == ("1", "127.0.0.1 answered 404 for an image")
    assert [row["id"] for row in pq.read_table(tmp_path / "out" / "part-00000.parquet").to_pylist()] == ["0", "2"]


def test_openais_lines_fetch_from_hosts_that_are_named(web: str, bundle: Path, tmp_path: Path) -> None:
    content = [{"type": "image_url", "image_url": {"url": f"{web}/image.png"}}]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    source = write(tmp_path / "r.jsonl", {"custom_id": "a", "url": "/v1/chat/completions", "body": body})
    assert run_job(Job(source, tmp_path / "out", bundle, "openai")).failed == 1
    allowed = ShardOptions(allowed_image_hosts=("127.0.0.1",))
    assert run_job(Job(source, tmp_path / "again", bundle, "openai", shard=allowed)).failed == 0
