"""Rows from files, and what is said of those that cannot be run."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from runtime.batch.reading import RowOptions, hash_of, read_rows
from runtime.batch.rows import Row, seed_of
from runtime.errors import InputError
from tests.runtime.batch.files import write

MESSAGE = {"role": "user", "content": "hello"}


def rows_of(path: Path, **options: Any) -> list[Row]:
    return list(read_rows(path, RowOptions(**options)))


def test_a_text_file_has_a_prompt_in_each_line_and_ids_follow_from_the_content(tmp_path: Path) -> None:
    first = rows_of(write(tmp_path / "a.txt", "a red star", "", "a ring", "a red star"))
    assert [row.values["prompt"] for row in first] == ["a red star", "a ring", "a red star"]
    assert [row.place for row in first] == ["line 1", "line 3", "line 4"]
    assert len({row.id for row in first}) == 3  # who asks twice wants two images
    again = rows_of(write(tmp_path / "b.txt", "a ring", "a cross", "a red star"))
    assert {first[0].id, first[1].id} < {row.id for row in again}  # whatever stands around
    assert len({seed_of(row.id) for row in first}) == 3


def test_the_same_rows_come_from_json_csv_and_parquet(tmp_path: Path) -> None:
    rows = [
        {"id": "007", "prompt": "007", "num_inference_steps": 4, "seed": 3},
        {"id": "b", "prompt": "a ring", "num_inference_steps": None, "seed": None},
    ]
    write(tmp_path / "rows.jsonl", *rows)
    write(tmp_path / "rows.csv", "id,prompt,num_inference_steps,seed", "007,007,4,3", "b,a ring,,")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    found = [rows_of(tmp_path / f"rows.{kind}", defaults={"shift": 2.0}) for kind in ("jsonl", "csv", "parquet")]
    for read in found:
        assert [(row.id, row.error, row.kind) for row in read] == [("007", "", "draw"), ("b", "", "draw")]
        assert read[0].values["prompt"] == "007"
        assert int(read[0].values["num_inference_steps"]) == 4
        assert read[1].values == {"prompt": "a ring", "shift": 2.0}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ({"id": "a"}, "neither a prompt"),
        ({"prompt": "a", "num_infrence_steps": 3}, "unknown column 'num_infrence_steps'"),
        ({"prompt": "a", "question": "b"}, "a row that draws has no question"),
        ({"prompt": "a", "num_images_per_prompt": 0}, "num_images_per_prompt: Input should be greater"),
        ({"prompt": "a", "guidance_scale": "much"}, "guidance_scale: Input should be a valid number"),
        ({"question": 3, "image": "a.png"}, "question: "),
        ({"question": "a", "max_new_tokens": 0}, "max_new_tokens: "),
        ({"id": [], "prompt": "a"}, "an id must be text"),
        ('{"prompt": "\\ud800"}', "prompt is not valid Unicode"),
        ('{"id": "\\ud800", "prompt": "a"}', "id is not valid Unicode"),
        ('{"prompt": "a", "\\ud800": 1}', "\\ud800 is not valid Unicode"),
        ('{"custom_id": "\\ud800", "url": "/v1/chat/completions", "body": {}}', "custom_id is not valid Unicode"),
        ({"id": 1.5, "prompt": "a"}, "an id must be text or a whole number, got 1.5"),
        ({"custom_id": "a", "method": "GET", "url": "/v1/images/generations", "body": {"prompt": "a"}}, "POST"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {}}, "url must be"),
        ({"custom_id": "a", "method": "POST", "url": "/v1/images/generations", "body": {"promt": "a"}}, "prompt: "),
        ({"custom_id": "a", "url": "/v1/images/generations"}, "needs a url and a body"),
        ({"url": "/v1/images/generations", "body": {"prompt": "a"}}, "no custom_id"),
        (
            {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [], "modalities": 5}},
            "messages: List should have at least 1 item",
        ),
        (
            {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [MESSAGE], "modalities": True}},
            "modalities: Input should be a valid list",
        ),
    ],
)
def test_a_bad_line_is_a_row_with_an_error_and_the_rest_goes_on(tmp_path: Path, line: object, message: str) -> None:
    first, bad, last = rows_of(write(tmp_path / "rows.jsonl", {"prompt": "a ring"}, line, {"prompt": "a star"}))
    assert (first.error, last.error) == ("", "")
    assert message in bad.error
    assert "\n" not in bad.error
    assert bad.place == "line 2"


def test_csv_of_the_wrong_width_or_encoding_is_told_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,seed\n"a\nred star",3\na ring\n\xff,4\na cross,5\n')
    rows = rows_of(path)
    assert [row.place for row in rows] == ["line 2", "line 4", "line 5", "line 6"]
    assert rows[0].values["prompt"] == "a\nred star"
    assert "1 cells, the header has 2" in rows[1].error
    assert "UTF-8" in rows[2].error
    assert not rows[3].error


def test_a_quote_that_is_never_closed_is_refused_instead_of_swallowing_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "id,prompt", "z,a ring", 'a,"a red star', "b,a ring", "c,a cross")
    with pytest.raises(InputError, match=r"rows\.csv: a quote that opens in the row of line 3 .* line 5; close it"):
        rows_of(path)


def test_a_stray_quote_is_a_bad_line_that_says_how_many_it_took(tmp_path: Path) -> None:
    rows = rows_of(write(tmp_path / "rows.csv", "id,prompt", 'a,"a red star', 'b,"a ring"', "c,a cross", 'd,"a"b'))
    assert [(row.place, bool(row.error)) for row in rows] == [
        ("lines 2 to 3", True),
        ("line 4", False),
        ("line 5", True),
    ]
    assert "stray quote" in rows[0].error
    (row,) = rows_of(write(tmp_path / "two.csv", "id,prompt,seed", 'a,"a red star', 'b"'))
    assert (row.place, row.error) == ("lines 2 to 3", "the row has 2 cells, the header has 3")


def test_a_cell_that_is_too_long_is_its_own_error_and_in_the_header_the_files(tmp_path: Path) -> None:
    long = "a" * 140_000
    rows = rows_of(write(tmp_path / "rows.csv", "prompt", long, "a ring"))
    assert [bool(row.error) for row in rows] == [True, False]
    with pytest.raises(InputError, match=r"names of the columns is not CSV: field larger than field limit") as error:
        rows_of(write(tmp_path / "header.csv", f"prompt,{long}", "a ring,b"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
@pytest.mark.parametrize("name", ["prompts.txt", "rows.csv", "rows.jsonl"])
def test_a_file_in_utf_16_is_refused(tmp_path: Path, name: str, encoding: str) -> None:
    (tmp_path / name).write_text("prompt\na red star\n", encoding=encoding)
    with pytest.raises(InputError, match=r"is not UTF-8, but probably UTF-16; save it as UTF-8"):
        rows_of(tmp_path / name)


def test_json_that_is_nested_too_deeply_is_a_bad_line(tmp_path: Path) -> None:
    for depth in (101, 985, 991, 995, 1000, 200_000):  # near Python's limit the place of the failure changes
        nested = "[" * depth + "]" * depth
        lines = (f'{{"prompt": "a", "x": {nested}}}', f'{{"id": {nested}, "prompt": "a"}}', '{"prompt": "a ring"}')
        rows = rows_of(write(tmp_path / "rows.jsonl", *lines), keep=("x",))
        assert [bool(row.error) for row in rows] == [True, True, False]


def test_an_unknown_column_of_a_table_is_refused_unless_it_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "prompt,label", "a ring,7")
    with pytest.raises(InputError, match=r"rows.csv: unknown column 'label'.*--keep label.*--columns"):
        rows_of(path)
    (row,) = rows_of(path, keep=("label",))
    assert (row.values, row.kept) == ({"prompt": "a ring"}, {"label": "7"})
    (row,) = rows_of(path, columns=("prompt",))
    assert (row.values, row.kept) == ({"prompt": "a ring"}, {})
    with pytest.raises(InputError, match=r"rows.csv has no column 'text'; its columns are prompt, label"):
        rows_of(path, columns=("text",))


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"id": "a", "prompt": "a ring"}, {"id": "a", "prompt": "a star"})
    with pytest.raises(InputError, match=r"the id 'a' is there twice, in line 1 and line 2.*--columns"):
        rows_of(path)


def test_an_id_that_is_made_and_given_is_refused_in_any_order(tmp_path: Path) -> None:
    (first, second) = rows_of(write(tmp_path / "a.jsonl", {"prompt": "a ring"}, {"prompt": "a ring"}))
    assert first.id != second.id
    for made in (first.id, second.id):
        unnamed = [{"prompt": "a ring"}] * 2
        for rows in ([{"id": made, "prompt": "a star"}, *unnamed], [*unnamed, {"id": made, "prompt": "a star"}]):
            with pytest.raises(InputError, match=rf"the id '{made}' of line [13] .*give that row an id too"):
                rows_of(write(tmp_path / "b.jsonl", *rows))
    third = second.id.replace("-2", "-3")
    assert rows_of(write(tmp_path / "c.jsonl", *unnamed, {"id": third, "prompt": "a star"}))[2].id == third


def test_a_folder_of_images_is_captioned(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("z.png", "b/a.jpg", ".hidden.png", "metadata.jsonl"):
        if name.endswith("jsonl"):
            (tmp_path / name).touch()
        else:
            Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = rows_of(tmp_path, question="what is it?", defaults={"max_new_tokens": 3, "shift": 2.0})
    assert [row.id for row in rows] == ["b/a.jpg", "z.png"]
    assert rows[1].values == {
        "image": str(tmp_path / "z.png"),
        "question": "what is it?",
        "max_new_tokens": 3,
    }


def test_a_broken_link_is_a_row_and_a_loop_repeats_no_image(tmp_path: Path) -> None:
    photos, other = tmp_path / "photos", tmp_path / "other"
    for folder in (photos, other):
        folder.mkdir()
        Image.new("RGB", (8, 8)).save(folder / "a.png")
    (photos / "again").symlink_to(".")
    (photos / "b.png").symlink_to("nothing.png")
    (photos / "c.png").symlink_to("c.png")
    (photos / "linked").symlink_to("../other")
    (photos / "x.png").mkdir()
    (other / "back").symlink_to("../photos")
    rows = rows_of(photos)
    assert [(row.id, row.error) for row in rows] == [("a.png", ""), ("b.png", ""), ("c.png", ""), ("linked/a.png", "")]
    assert hash_of(photos) == hash_of(photos)


def test_hidden_files_and_folders_named_like_tables_are_not_read(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "a ring"})
    (tmp_path / "._b.jsonl").write_bytes(b"\0\xff")
    (tmp_path / "._b.png").touch()
    (tmp_path / "a.jsonl").mkdir()
    (tmp_path / "c.png").mkdir()
    assert [row.values["prompt"] for row in rows_of(tmp_path)] == ["a ring"]


def test_a_folder_of_tables_is_read_in_order(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", {"prompt": "a star"})
    write(tmp_path / "a.jsonl", {"prompt": "a ring"})
    assert [row.place for row in rows_of(tmp_path)] == ["a.jsonl, line 1", "b.jsonl, line 1"]
    write(tmp_path / "c.csv", "prompt")
    with pytest.raises(InputError, match="several kinds"):
        rows_of(tmp_path)


def test_unicode_that_is_broken_fails_its_own_row(tmp_path: Path) -> None:
    lines = ('{"prompt": "a", "label": "\\udc00"}', '{"prompt": "a", "label": {"x": "y"}}')
    bad, good = rows_of(write(tmp_path / "rows.jsonl", *lines), keep=("label",))
    assert (bad.error, good.error) == ("label is not valid Unicode; write it in UTF-8", "")
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (8, 8)).save(photos / "a.png")
    os.rename(photos / "a.png", os.fsencode(photos) + b"/caf\xe9.png")
    (row,) = rows_of(photos)
    assert (row.place, row.error) == (r"caf\xe9.png", "id is not valid Unicode; write it in UTF-8")
    os.rename(tmp_path / "rows.jsonl", os.fsencode(photos) + b"/caf\xe9.jsonl")
    os.remove(os.fsencode(photos) + b"/caf\xe9.png")
    assert [row.place for row in rows_of(photos, columns=("prompt",))] == [
        r"caf\xe9.jsonl, line 1",
        r"caf\xe9.jsonl, line 2",
    ]
    assert hash_of(photos)


def test_parquet_values_that_python_cannot_hold_fail_their_own_rows(tmp_path: Path) -> None:
    prompts = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(struct.pack("4i", 0, 1, 2, 3)), pa.py_buffer(b"a\xffb")]
    )
    times = pa.array([0, 0, 2**60], pa.timestamp("us"))
    pq.write_table(pa.table({"id": ["1", "2", "3"], "prompt": prompts, "made": times}), tmp_path / "rows.parquet")
    first, second, third = rows_of(tmp_path / "rows.parquet", keep=("made",))
    assert (first.error, first.values) == ("", {"prompt": "a"})
    assert (second.place, third.place) == ("row 2", "row 3")
    assert "prompt cannot be read: 'utf-8' codec" in second.error
    assert "made cannot be read: " in third.error


def test_bytes_are_not_kept(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "label": [b"abc"]}), tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="--keep label: text can be kept, and the column has bytes; leave it out"):
        rows_of(tmp_path / "rows.parquet", keep=("label",))
    assert not rows_of(tmp_path / "rows.parquet", columns=("prompt",))[0].error


def test_an_id_that_is_a_whole_float_is_a_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1.0, None, 3.0], "prompt": ["a", "b", "c"]}), tmp_path / "rows.parquet")
    rows = rows_of(tmp_path / "rows.parquet")
    assert ([row.error for row in rows], rows[0].id, rows[2].id) == ([""] * 3, "1", "3")


def test_a_truncated_parquet_and_another_file_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a ring"}] * 1000), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"rows.parquet is not a complete Parquet file") as error:
        rows_of(path)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="must end in"):
        rows_of(write(tmp_path / "rows.xlsx"))
    with pytest.raises(InputError, match="there is no"):
        rows_of(tmp_path / "none.jsonl")
