"""`run-batch` on the tiny bundle: formats, failures, and jobs that are interrupted."""

from __future__ import annotations

import base64
import datetime
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from runtime.batch.job import Job, run_job
from runtime.batch.reading import RowOptions, read_rows
from runtime.batch.rows import seed_of
from runtime.batch.shard import ShardOptions, run_shard
from runtime.errors import EngineError, InputError
from runtime.pipeline import LatteFlowPipeline
from runtime.serving.jobs import ImageJob
from runtime.serving.stations import PipelineStations
from tests.runtime.batch.files import FEW_STEPS, RunCommand, files_in, write


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Rows of several lengths, steps and scales, one that fails, and a question."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "image.png")
    rows: list[object] = [
        {"id": f"row {i}", "prompt": "a red star" + " and a ring" * (i % 3), "num_inference_steps": 1 + i % 3}
        | ({"guidance_scale": 1.0} if i % 4 == 0 else {})
        | ({"negative_prompt": "a blue cross"} if i % 5 == 0 else {})
        for i in range(9)
    ]
    rows[4] = "{"
    rows.append({"id": "asked", "question": "what is it?", "image": "image.png", "max_new_tokens": 3})
    return write(tmp_path / "rows.jsonl", *rows)


def table_of(folder: Path) -> list[dict[str, object]]:
    return [row for path in sorted(folder.glob("part-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_parquet_has_the_images_and_what_they_were_made_from(
    bundle: Path, pipe: LatteFlowPipeline, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write(
        tmp_path / "rows.csv", "id,prompt,seed,label,num_images_per_prompt", "a,a ring,5,x,", "b,a star,,y,2"
    )
    out = tmp_path / "out"
    code, said, _ = run_command("run-batch", source, out, bundle, *FEW_STEPS, "--keep", "label", "--shift", 2)
    assert (code, said) == (0, f"2 rows in {out}\n")
    rows = table_of(out)
    assert [(row["id"], row["index"], row["seed"], row["label"]) for row in rows] == [
        ("a", 0, 5, "x"),
        ("b", 0, seed_of("b"), "y"),
        ("b", 1, seed_of("b") + 1, "y"),
    ]
    assert (rows[0]["prompt"], rows[0]["num_inference_steps"], rows[0]["shift"]) == ("a ring", 2, 2.0)
    with Image.open(io.BytesIO(rows[0]["image"]["bytes"])) as file:
        pixels, text = np.asarray(file).astype(int), file.text
    assert (text["prompt"], text["seed"], text["shift"]) == ("a ring", "5", "2.0")
    expected = pipe("a ring", seed=5, num_inference_steps=2, shift=2.0, output_type="np").images[0]
    assert np.abs(pixels - expected.astype(int)).max() <= 1
    loaded = datasets.load_dataset("parquet", data_files=str(out / "*.parquet"), split="train")
    assert loaded[2]["image"].size == pixels.shape[1::-1]  # decoded: the file says which column has images


@pytest.mark.parametrize(
    ("row", "name", "kind"),
    [
        ({"question": "what?", "max_new_tokens": 2}, "answer", "parquet"),
        ({"prompt": "a ring"}, "file_name", "png"),
        ({"prompt": "a ring", "num_images_per_prompt": 2}, "index", "webdataset"),
        ({"prompt": "a ring"}, "image", "parquet"),
        ({"prompt": "a ring"}, "stop", "parquet"),
        ({"prompt": "a ring"}, "label", "openai"),
    ],
)
def test_a_kept_column_with_a_name_of_the_results_is_refused(
    bundle: Path, tmp_path: Path, run_command: RunCommand, row: dict[str, object], name: str, kind: str
) -> None:
    source = write(tmp_path / "rows.jsonl", {"id": "a", **row}, {"id": "b", **row, name: "mine"})
    arguments = ("run-batch", source, tmp_path / "out", bundle, "--format", kind, "--limit")
    code, _, said = run_command(*arguments, 1, "--keep", name)
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert f"--keep {name}: " in said
    assert not list((tmp_path / "out").glob("part-*"))
    assert run_command(*arguments, 1)[0] == 0  # the refusal left nothing behind


def test_a_column_of_other_results_may_be_kept(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    source = write(tmp_path / "rows.jsonl", {"id": "a", "question": "what?", "max_new_tokens": 2, "index": "mine"})
    assert run_command("run-batch", source, tmp_path / "out", bundle, "--keep", "index")[0] == 0
    assert [row["index"] for row in table_of(tmp_path / "out")] == ["mine"]


def test_options_fill_openais_lines_as_they_fill_plain_rows(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    message = {"messages": [{"role": "user", "content": "a star"}]}
    draws = {"modalities": ["image"]}
    bodies = {
        "drawn": ("images/generations", {"prompt": "a star"}),
        "null": ("images/generations", {"prompt": "a star", "num_inference_steps": None}),
        "own": ("images/generations", {"prompt": "a star", "num_inference_steps": 3, "shift": 1.5}),
        "quality": ("images/generations", {"prompt": "a star", "quality": "low"}),
        "chat": ("chat/completions", message | draws),
        "nested": ("chat/completions", message | {"extra_body": {**draws, "num_inference_steps": 3}}),
        "asked": ("chat/completions", message),
        "own asked": ("chat/completions", message | {"max_completion_tokens": 4}),
    }
    lines = [{"custom_id": name, "url": f"/v1/{url}", "body": body} for name, (url, body) in bodies.items()]
    source = write(tmp_path / "rows.jsonl", *lines, {"id": "plain", "prompt": "a star"})
    options = (*FEW_STEPS, "--shift", 2, "--max-new-tokens", 1, "--negative-prompt", "a ring")
    assert run_command("run-batch", source, tmp_path / "out", bundle, *options)[0] == 0
    rows = {row["id"]: row for row in table_of(tmp_path / "out")}
    drawn = ("drawn", "null", "chat", "plain", "own", "nested", "quality")
    said = [(rows[name]["num_inference_steps"], rows[name]["shift"], rows[name]["negative_prompt"]) for name in drawn]
    assert said == [(2, 2.0, "a ring")] * 4 + [(3, 1.5, "a ring"), (3, 2.0, "a ring"), (10, 2.0, "a ring")]
    assert (rows["asked"]["max_new_tokens"], rows["own asked"]["max_new_tokens"]) == (1, 4)


@pytest.mark.parametrize("nested", [False, True])
def test_an_image_drawn_in_a_chat_is_in_parquet(bundle: Path, tmp_path: Path, nested: bool) -> None:
    options = {"modalities": ["image"], "num_inference_steps": 2}
    body = {"messages": [{"role": "user", "content": "a star"}], **({"extra_body": options} if nested else options)}
    source = write(tmp_path / "rows.jsonl", {"custom_id": "a", "url": "/v1/chat/completions", "body": body})
    assert run_job(Job(source, tmp_path / "out", bundle)).failed == 0
    (row,) = table_of(tmp_path / "out")
    assert (row["prompt"], row["num_inference_steps"]) == ("a star", 2)
    assert Image.open(io.BytesIO(row["image"]["bytes"])).format == "PNG"


def test_what_was_drawn_is_captioned(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    source = write(tmp_path / "rows.jsonl", {"id": "a", "prompt": "a ring"}, {"id": "b", "prompt": "a star"})
    drawn, captions = tmp_path / "drawn", tmp_path / "captions"
    assert run_command("run-batch", source, drawn, bundle, *FEW_STEPS, "--rows-per-shard", 1)[0] == 0
    columns = ("--columns", "id", "--columns", "image", "--max-new-tokens", 2)
    assert run_command("run-batch", drawn, captions, bundle, *columns)[0] == 0
    rows = table_of(captions)
    assert [(row["id"], row["question"], row["output_tokens"]) for row in rows] == [
        ("a", "describe the image", 2),
        ("b", "describe the image", 2),
    ]


def test_several_images_of_a_row_are_captioned_without_their_id(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write(tmp_path / "rows.jsonl", {"id": "a", "prompt": "a ring", "num_images_per_prompt": 2})
    drawn, captions = tmp_path / "drawn", tmp_path / "captions"
    assert run_command("run-batch", source, drawn, bundle, *FEW_STEPS)[0] == 0
    columns = ("--columns", "image", "--max-new-tokens", 2)
    code, _, said = run_command("run-batch", drawn, captions, bundle, "--columns", "id", *columns)
    assert code == 2
    assert "name all columns but the id with --columns" in said
    assert run_command("run-batch", drawn, captions, bundle, *columns)[0] == 0
    assert len({row["id"] for row in table_of(captions)}) == 2


def test_pngs_have_metadata_and_names_that_cannot_meet(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    rows = [{"id": name, "prompt": "a ring"} for name in ("a/b", "a:b", "plain", "../up")]
    source = write(tmp_path / "rows.jsonl", *rows, {"id": "q", "question": "what?", "max_new_tokens": 2})
    out = tmp_path / "out"
    code, _, said = run_command("run-batch", source, out, bundle, *FEW_STEPS, "--format", "png")
    assert code == 0, said
    lines = [json.loads(line) for line in (out / "part-00000" / "metadata.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a/b", "a:b", "plain", "../up"]
    assert lines[2]["file_name"] == "plain.png"
    assert len({line["file_name"] for line in lines}) == 4
    assert all((out / "part-00000" / line["file_name"]).is_file() for line in lines)
    (answer,) = (out / "part-00000" / "answers.jsonl").read_text().splitlines()
    assert set(json.loads(answer)) >= {"id", "question", "answer", "finish_reason"}
    loaded = datasets.load_dataset("imagefolder", data_dir=str(out / "part-00000"), split="train")
    assert loaded[0]["prompt"] == "a ring"


@pytest.mark.parametrize("kind", ["png", "webdataset"])
def test_every_id_has_a_file_name_of_its_own_that_fits(bundle: Path, tmp_path: Path, kind: str) -> None:
    long = [f"{'a' * size}{end}" for size in (79, 95, 511) for end in "bc"]
    job = Job(write(tmp_path / "0.jsonl", {"id": "a b", "prompt": "a ring"}), tmp_path / "0", bundle, "png")
    run_job(job)
    (taken,) = (path.stem for path in (tmp_path / "0").rglob("*.png"))
    ids = list(dict.fromkeys(["a b", "a_b-c8687a08", taken, "a_b", *long, "é" * 512]))
    rows = [
        {"id": name, "prompt": "a ring", "num_images_per_prompt": 1 + (i % 2), "num_inference_steps": 2}
        for i, name in enumerate(ids)
    ]
    assert run_job(Job(write(tmp_path / "rows.jsonl", *rows), tmp_path / "out", bundle, kind)).failed == 0
    if kind == "png":
        part = tmp_path / "out" / "part-00000"
        files = [path.name for path in part.glob("*.png")]
        said = [json.loads(line)["id"] for line in (part / "metadata.jsonl").read_text().splitlines()]
    else:
        with tarfile.open(tmp_path / "out" / "part-00000.tar") as tar:
            files = [name for name in tar.getnames() if name.endswith(".png")]
            said = [json.load(tar.extractfile(name))["id"] for name in tar.getnames() if name.endswith(".json")]
    assert len(files) == len(set(files)) == sum(row["num_images_per_prompt"] for row in rows)
    assert max(map(len, files)) <= 100
    assert set(said) == set(ids)


def test_webdataset_has_an_image_and_a_json_for_each_key(bundle: Path, tmp_path: Path, run_command: RunCommand) -> None:
    source = write(tmp_path / "prompts.txt", "a ring", "a star", "a cross")
    out = tmp_path / "out"
    options = ("--format", "webdataset", "--limit", 2, "--json")
    code, said, _ = run_command("run-batch", source, out, bundle, *FEW_STEPS, *options)
    assert (code, json.loads(said)) == (0, {"output": str(out), "rows": 2, "failed": 0})
    with tarfile.open(out / "part-00000.tar") as tar:
        names = tar.getnames()
        first = json.load(tar.extractfile(names[1]))
    assert [name.partition(".")[2] for name in names] == ["png", "json"] * 2
    assert names[0].startswith(first["id"])
    loaded = datasets.load_dataset("webdataset", data_files=str(out / "*.tar"), split="train")
    assert loaded[1]["json"]["prompt"] == "a star"


def test_openais_lines_become_openais_lines(bundle: Path, image: Path, tmp_path: Path, run_command: RunCommand) -> None:
    content = [{"type": "image_url", "image_url": {"url": data_uri(image)}}, {"type": "text", "text": "what is it?"}]
    asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 3}
    few = {"num_inference_steps": 2}
    chat = {"messages": [{"role": "user", "content": "a star"}], "modalities": ["image", "text"], **few}
    source = write(
        tmp_path / "requests.jsonl",
        *(
            {"custom_id": name, "method": "POST", "url": f"/v1/{url}", "body": body}
            for name, url, body in (
                ("drawn", "images/generations", {"prompt": "a ring", "n": 2, "seed": 3, **few}),
                ("jpeg", "images/generations", {"prompt": "a ring", "output_format": "jpeg", **few}),
                ("asked", "chat/completions", asked),
                ("in chat", "chat/completions", chat),
                ("size", "images/generations", {"prompt": "a ring", "size": "8x8"}),
                ("other", "chat/completions", {**asked, "model": "gpt-5"}),
            )
        ),
        "{",
    )
    out = tmp_path / "out"
    code, _, said = run_command("run-batch", source, out, bundle, "--format", "openai")
    assert code == 3
    assert "line 7: not JSON" in said
    lines = [json.loads(line) for line in (out / "part-00000.jsonl").read_text().splitlines()]
    assert all(set(line) == {"id", "custom_id", "response", "error"} for line in lines)
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert [item["seed"] for item in bodies["drawn"]["data"]] == [3, 4]
    with Image.open(io.BytesIO(base64.b64decode(bodies["jpeg"]["data"][0]["b64_json"]))) as file:
        assert file.format == "JPEG"
    assert bodies["asked"]["choices"][0]["finish_reason"] == "length"
    assert bodies["in chat"]["choices"][0]["message"]["images"]
    errors = [json.loads(line) for line in (out / "errors" / "part-00000.jsonl").read_text().splitlines()]
    by_id = {line["custom_id"]: line for line in errors}
    assert by_id["size"]["response"]["status_code"] == 400
    assert "size must be" in by_id["size"]["response"]["body"]["error"]["message"]
    assert "the model 'gpt-5' is not here" in by_id["other"]["response"]["body"]["error"]["message"]
    assert "line 7" in by_id[None]["error"]["message"]


def test_an_image_that_cannot_be_opened_fails_its_own_row(
    bundle: Path, image: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        shutil.copy(image, folder / name)
    (folder / "b.png").write_bytes(image.read_bytes()[:40])
    (folder / "d.png").symlink_to("nothing.png")
    out = tmp_path / "out"
    code, said, _ = run_command("run-batch", folder, out, bundle, "--max-new-tokens", 2)
    assert (code, said) == (3, f"4 rows in {out}, 2 failed: see {out / 'errors'}\n")
    assert [row["id"] for row in table_of(out)] == ["a.png", "c.png"]
    assert {row["question"] for row in table_of(out)} == {"describe the image"}
    errors = [json.loads(line) for line in (out / "errors" / "part-00000.jsonl").read_text().splitlines()]
    assert [error["id"] for error in errors] == ["b.png", "d.png"]
    assert "b.png" in errors[0]["error"]
    assert errors[1]["error"] == f"no image at {folder / 'd.png'}"


def test_numbers_beyond_the_limits_fail_their_own_rows(bundle: Path, tmp_path: Path) -> None:
    few = {"num_inference_steps": 2}
    rows = [
        {"prompt": "a ring", "num_inference_steps": 10_001},
        {"prompt": "a ring", "num_images_per_prompt": 1_001, **few},
        {"prompt": "a ring", "seed": 2**63, **few},
        {"prompt": "a ring", "seed": 2**63 - 1, **few},
        {"question": "what?", "seed": 2**63, "max_new_tokens": 2},
        {"question": "what?", "seed": 2**63 - 1, "max_new_tokens": 2},
    ]
    source = write(tmp_path / "rows.jsonl", *({"id": str(i), **row} for i, row in enumerate(rows)))
    assert run_job(Job(source, tmp_path / "out", bundle)).failed == 4
    assert [(row["id"], row["seed"]) for row in table_of(tmp_path / "out")] == [("3", 2**63 - 1), ("5", 2**63 - 1)]
    lines = (tmp_path / "out" / "errors" / "part-00000.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] for line in lines] == [
        "num_inference_steps must be from 1 to 10000, got 10001",
        "num_images must be from 1 to 1000, got 1001",
        *["a seed must be from 0 to 9223372036854775807, got 9223372036854775808"] * 2,
    ]


def test_an_image_may_be_a_data_uri(bundle: Path, image: Path, tmp_path: Path) -> None:
    uris = [data_uri(image), "data:image/png;base64,no", "data:image/png,"]
    rows = [{"id": str(i), "image": uri, "max_new_tokens": 2} for i, uri in enumerate(uris)]
    rows += [{"id": "file", "image": "image.png", "max_new_tokens": 2}, {**rows[0], "id": "3", "image": uris[:1] * 2}]
    rows[4]["images"] = rows[4].pop("image")
    assert run_job(Job(write(tmp_path / "rows.jsonl", *rows), tmp_path / "out", bundle)).failed == 2
    found = {row["id"]: (row["answer"], row["input_tokens"]) for row in table_of(tmp_path / "out")}
    assert set(found) == {"0", "file", "3"}
    assert found["0"][1] == found["file"][1] < found["3"][1]
    lines = (tmp_path / "out" / "errors" / "part-00000.jsonl").read_text().splitlines()
    assert "not base64" in json.loads(lines[0])["error"]
    assert "data URI such as" in json.loads(lines[1])["error"]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_kept_values_are_text_in_parquet_and_json_elsewhere(bundle: Path, tmp_path: Path, kind: str) -> None:
    made = datetime.datetime(2024, 1, 2, 3)
    row = {"id": "a", "prompt": "a ring", "num_inference_steps": 2, "label": "x", "number": 7, "made": made, "l": [1]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    keep = ("label", "number", "made", "l")
    assert (
        run_job(Job(tmp_path / "rows.parquet", tmp_path / "out", bundle, kind, rows=RowOptions(keep=keep))).failed == 0
    )
    if kind == "parquet":
        (found,) = table_of(tmp_path / "out")
    else:
        with tarfile.open(tmp_path / "out" / "part-00000.tar") as tar:
            found = json.load(tar.extractfile("a.json"))
    expected = ("x", "7", "2024-01-02T03:00:00", "[1]") if kind == "parquet" else ("x", 7, "2024-01-02T03:00:00", [1])
    assert tuple(found[name] for name in keep) == expected


@pytest.mark.parametrize("kind", ["parquet", "png", "openai"])
def test_a_job_that_is_killed_goes_on_and_ends_byte_for_byte(
    bundle: Path, prompts: Path, tmp_path: Path, kind: str
) -> None:
    def command(out: Path) -> list[str]:
        words = ["run-batch", prompts, out, bundle, "--format", kind, "--rows-per-shard", 2]
        return [sys.executable, "-m", "runtime.cli", *map(str, words)]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_job(Job(prompts, whole, bundle, kind, 2)).failed == 1
    kills = 0
    for finished in (0, 1, 3):
        process = subprocess.Popen(command(killed), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(killed.glob("part-*"))) <= finished:
            time.sleep(0.002)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = set(files_in(killed))
        assert not [name for name in seen if name.startswith("part-") and name not in files_in(whole)]
    assert kills
    (killed / ".part-00004.tmp").write_text("what a run left")
    assert subprocess.run(command(killed), check=False, capture_output=True).returncode == 3
    assert files_in(killed) == files_in(whole)


def test_a_shard_does_not_depend_on_what_ran_before_it(bundle: Path, prompts: Path) -> None:
    rows = pickle.loads(pickle.dumps(list(read_rows(prompts, RowOptions()))))  # as a worker elsewhere gets them
    with LatteFlowPipeline.from_pretrained(bundle) as fresh:
        expected = run_shard(fresh, rows[5:], ShardOptions())
    with LatteFlowPipeline.from_pretrained(bundle) as used:
        run_shard(used, rows, ShardOptions(batch_size=3))
        found = run_shard(used, rows[5:], ShardOptions())
    found = pickle.loads(pickle.dumps(found))
    assert [result.files for result in found] == [result.files for result in expected]
    assert [result.text for result in found] == [result.text for result in expected]


def test_another_job_does_not_go_on_in_its_place(bundle_copy: Path, tmp_path: Path, run_command: RunCommand) -> None:
    source = write(tmp_path / "prompts.txt", "a ring")
    out = tmp_path / "out"
    command = ("run-batch", source, out, bundle_copy, *FEW_STEPS)
    assert run_command(*command)[0] == 0
    before = files_in(out)
    assert run_command(*command)[0] == 0  # nothing is left to do
    code, _, said = run_command(*command, "--shift", 2)
    assert code == 2
    assert f"{out} has the progress of another job: other options" in said
    with (bundle_copy / "manifest.json").open("a") as file:
        file.write("\n")
    write(source, "a star")
    code, _, said = run_command(*command)
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert "other bundle, input;" in said
    assert files_in(out) == before


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_one_line(bundle: Path, tmp_path: Path, run_command: RunCommand, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    code, _, said = run_command("run-batch", tmp_path / "rows.jsonl", tmp_path / "out", bundle)
    assert (code, said) == (2, f"error: {tmp_path / 'rows.jsonl'} has no rows\n")


def test_a_folder_that_cannot_be_written_or_is_of_somebody_else_is_one_line(
    bundle: Path, tmp_path: Path, run_command: RunCommand
) -> None:
    source = write(tmp_path / "prompts.txt", "a ring")
    code, _, said = run_command("run-batch", source, source / "out", bundle)
    assert (code, len(said.strip().splitlines())) == (2, 1)
    assert "cannot write to" in said
    code, _, said = run_command("run-batch", source, tmp_path, bundle)
    assert code == 2
    assert "is not empty and has no progress of a job" in said


WITH_FULL_DISK = 'mount -t tmpfs -o size="$1" none "$2" && shift 2 && "$@"; code=$?; ls -a "$0"; exit $code'


def test_a_full_disk_is_one_line_and_finished_shards_stay(bundle: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    source = write(tmp_path / "prompts.txt", *["a ring"] * 12)
    job = [sys.executable, "-m", "runtime.cli", "run-batch", source, disk / "out", bundle, *FEW_STEPS]
    words = ["unshare", "-rm", "sh", "-c", WITH_FULL_DISK, disk / "out", "36k", disk, *job, "--rows-per-shard", "1"]
    found = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if "unshare" in found.stderr or "mount" in found.stderr:
        pytest.skip("this user may not mount a file system")
    assert found.returncode == 2, found.stderr
    assert "there is no space left; finished shards stay" in found.stderr
    assert "Traceback" not in found.stderr
    assert "part-00000.parquet" in found.stdout
    assert ".tmp" not in found.stdout


@pytest.mark.parametrize("left", [(".lock", ".job.json.tmp"), (".4711.tmp",), (".job.json.tmp",), ()])
def test_a_job_that_was_killed_before_it_had_a_file_goes_on(bundle: Path, tmp_path: Path, left: Sequence[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text('{"version"')
    source = write(tmp_path / "prompts.txt", "a ring")
    assert run_job(Job(source, out, bundle)).failed == 0
    assert sorted(path.name for path in out.iterdir()) == [".lock", "job.json", "part-00000.parquet"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".profile").touch()
    with pytest.raises(InputError, match="is not empty and has no progress of a job"):
        run_job(Job(source, tmp_path / "mine", bundle))


def test_two_runs_at_once_are_refused(bundle: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run writes to"):
            run_job(Job(write(tmp_path / "prompts.txt", "a ring"), tmp_path / "out", bundle))


def test_engines_that_break_do_not_use_up_the_rows(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise EngineError("the device is lost")

    source = write(tmp_path / "prompts.txt", "a ring", "a star")
    monkeypatch.setattr("runtime.sampler.Sampler.step", broken)
    with pytest.raises(EngineError, match="the engines do not work any more: the device is lost"):
        run_job(Job(source, tmp_path / "out", bundle))
    assert not list((tmp_path / "out").glob("part-*"))
    monkeypatch.undo()
    job = Job(source, tmp_path / "out", bundle)
    assert run_job(job).failed == 0
    assert len(table_of(tmp_path / "out")) == 2


def test_a_row_that_breaks_alone_does_not_stop_the_job(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = PipelineStations.step

    def fails_for_some(stations: PipelineStations, group: int, jobs: Sequence[ImageJob]) -> list[np.ndarray]:
        if any("bad" in job.request.prompt for job in jobs):
            raise EngineError("not this one")
        return step(stations, group, jobs)

    monkeypatch.setattr(PipelineStations, "step", fails_for_some)
    source = write(tmp_path / "prompts.txt", "a ring", "a bad one", "a star", "a bad one")
    assert run_job(Job(source, tmp_path / "out", bundle, rows_per_shard=3)).failed == 2
    assert [row["prompt"] for row in table_of(tmp_path / "out")] == ["a ring", "a star"]


def test_without_pyarrow_everything_but_parquet_works(bundle: Path, tmp_path: Path) -> None:
    from tests.test_imports import HEAVY, run_without

    blocked = HEAVY | {"pyarrow", "fastapi", "httpx2", "latte", "export"}
    source = write(tmp_path / "prompts.txt", "a ring")
    found = run_without(blocked, "run-batch", source, tmp_path / "out", bundle)
    assert (found.returncode, len(found.stderr.strip().splitlines())) == (2, 1)
    assert 'pip install "latte-flow[batch,cpu]"' in found.stderr
    found = run_without(blocked, "run-batch", source, tmp_path / "out", bundle, *FEW_STEPS, "--format", "png")
    assert found.returncode == 0, found.stderr
    assert os.listdir(tmp_path / "out" / "part-00000")
