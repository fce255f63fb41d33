"""Images become the patches that transformers makes of them, and what is no image is said so."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from transformers.image_utils import load_image
from transformers.vision_utils import get_vision_position_ids

from latte.checkpoint import load_image_processor
from runtime.errors import InputError
from runtime.image_processor import ImageProcessor
from runtime.images import MAX_FILE_BYTES, MAX_IMAGES, MAX_PIXELS, check_images, open_image
from runtime.pipeline import LatteFlowPipeline

RunCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def processor(pipe: LatteFlowPipeline) -> ImageProcessor:
    return ImageProcessor.from_bundle(pipe.bundle, pipe.manifest)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA").convert(mode)


SAVED = {
    "a square": (noise(64, 64), {}),
    "a wide one": (noise(300, 40), {}),
    "a tall one": (noise(9, 500), {}),
    "a small one": (noise(5, 4), {}),
    "a large one": (noise(1100, 900), {}),
    "grey": (noise(70, 50, "L"), {}),
    "a palette": (noise(70, 50).convert("P"), {}),
    "black and white": (noise(70, 50, "1"), {}),
    "alpha": (noise(70, 50, "RGBA"), {}),
    "grey with alpha": (noise(70, 50, "LA"), {}),
    "turned by EXIF": (
        noise(90, 40),
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_patches_are_those_of_transformers(
    name: str, tmp_path: Path, processor: ImageProcessor, checkpoint: Path
) -> None:
    image, options = SAVED[name]
    path = tmp_path / "image.png"
    image.save(path, **options)
    expected = load_image_processor(checkpoint)([load_image(str(path))], return_tensors="np")
    patches = processor([path])
    _, rows, columns = expected["image_grid_thw"][0]
    assert patches.grids == ((rows // 2, columns // 2),)
    flat = patches.pixel_values.reshape(expected["pixel_values"].shape)
    assert np.abs(flat - expected["pixel_values"]).max() <= 1e-6
    assert patches.pixel_values.dtype == np.float32


def test_exif_turns_an_image(tmp_path: Path) -> None:
    image, options = SAVED["turned by EXIF"]
    image.save(tmp_path / "turned.png", **options)
    assert open_image(tmp_path / "turned.png").size == (40, 90)


def test_the_content_of_a_file_is_an_image_too(tmp_path: Path) -> None:
    image, options = SAVED["turned by EXIF"]
    image.save(tmp_path / "turned.png", **options)
    noise(40, 30).quantize(16).save(tmp_path / "palette.png", transparency=3)
    for kind in ("JPEG", "WEBP", "GIF"):
        noise(40, 30).save(tmp_path / kind, kind)
    for path in tmp_path.iterdir():
        assert open_image(path.read_bytes()).tobytes() == open_image(path).tobytes(), path.name
    for content in (b"", b"an image", b"\x89PNG\r\n\x1a\n", (tmp_path / "turned.png").read_bytes()[:20]):
        with pytest.raises(InputError, match="this one cannot be opened"):
            check_images([content])
    with pytest.raises(InputError, match="the limit is 20000000"):
        check_images([b"\x89PNG" + bytes(MAX_FILE_BYTES)])


def test_a_small_file_cannot_take_much_memory() -> None:
    """Pillow inflates the texts of a PNG when it opens it: eight files of 64 kB once took 500 MB."""
    png = PngInfo()
    for i in range(60):
        png.add_text(f"text {i}", "a" * 1_000_000, zip=True)
    buffer = io.BytesIO()
    noise(16, 16).save(buffer, "PNG", pnginfo=png)
    files = [buffer.getvalue()] * MAX_IMAGES
    assert len(files[0]) < 100_000
    tracemalloc.start()
    try:
        assert check_images(files) == [(16, 16)] * MAX_IMAGES
        assert open_image(files[0]).size == (16, 16)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_several_images_stand_one_after_another(processor: ImageProcessor) -> None:
    images = [noise(64, 64), noise(128, 64), noise(80, 200)]
    together, alone = processor(images), [processor([image]) for image in images]
    assert together.grids == tuple(one.grids[0] for one in alone)
    assert np.array_equal(together.pixel_values, np.concatenate([one.pixel_values for one in alone]))
    assert np.array_equal(np.unique(together.image_ids, return_counts=True)[1], together.tokens)
    grid = torch.tensor([(1, 2 * rows, 2 * columns) for rows, columns in together.grids])
    assert np.array_equal(together.position_ids.reshape(-1, 2), get_vision_position_ids(grid, 2).numpy())
    last = together.of_images(slice(2, 3))
    assert np.array_equal(last.pixel_values, alone[2].pixel_values)


def test_arrays_and_pil_images_are_images_too(processor: ImageProcessor) -> None:
    image = noise(64, 48)
    assert np.array_equal(processor([image]).pixel_values, processor([np.asarray(image)]).pixel_values)
    with pytest.raises(InputError, match=r"must be \[H, W, 3\] uint8, got float32"):
        processor([np.zeros((64, 64, 3), np.float32)])
    with pytest.raises(InputError, match="got int"):
        processor([7])  # type: ignore[list-item]


def bomb(path: Path, side: int) -> None:
    """A PNG of a few bytes that claims `side` times `side` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)))


def truncated(path: Path) -> None:
    noise(64, 64).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


BAD_IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "no image at"),
    "not an image": (lambda path: path.write_text("an image"), "is not an image that Pillow can read"),
    "empty": (lambda path: path.touch(), "is not an image that Pillow can read"),
    "a folder": (lambda path: path.mkdir(), "cannot be read as an image"),
    "truncated": (truncated, "cannot be decoded"),
    "1x1": (lambda path: noise(1, 1).save(path, "PNG"), "has 1x1 pixels, each side needs at least 4"),
    "20,000x10": (lambda path: noise(20_000, 10).save(path, "PNG"), "one side may be at most 200 times the other"),
    "a bomb": (lambda path: bomb(path, 9_000), f"the limit is {MAX_PIXELS} in all"),
    "a larger bomb": (lambda path: bomb(path, 100_000), f"more than {MAX_PIXELS} pixels"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_one_clear_line(name: str, tmp_path: Path, bundle: Path, run_command: RunCommand) -> None:
    make, message = BAD_IMAGES[name]
    make(tmp_path / "image.png")
    code, out, error = run_command("ask", bundle, tmp_path / "image.png", "what is it?")
    assert (code, out) == (2, "")
    (line,) = error.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def flat(path: Path, width: int, height: int) -> Path:
    """A small file of a large image."""
    Image.new("1", (width, height)).save(path, "PNG")
    return path


def must_not_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(PngImageFile, "load", load)


def test_images_that_are_too_large_together_are_refused_by_their_headers(
    tmp_path: Path, bundle: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight files of 64 million pixels, 1.6 MB in all, took 2.7 GB and 20 seconds."""
    files = [flat(tmp_path / f"{i}.png", 6000, 5000) for i in range(3)]
    must_not_decode(monkeypatch)
    code, _, error = run_command("ask", bundle, *files, "what is it?")
    assert code == 2
    assert "the 3 images of a question have 90000000 pixels, the limit is 64000000 in all" in error


def test_too_many_images_and_too_many_tokens_are_refused_by_the_headers(
    tmp_path: Path, bundle: Path, run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, pipe: LatteFlowPipeline
) -> None:
    file = flat(tmp_path / "image.png", 640, 640)
    must_not_decode(monkeypatch)
    code, _, error = run_command("ask", bundle, *[file] * 9, "what is it?")
    assert code == 2
    assert "a question may be about 8 images, got 9" in error
    tokens = pipe.chat.image_processor.count_tokens([file])
    images = [file] * min(MAX_IMAGES, 512 // tokens + 1)
    text = "a red circle " * (512 // 3)
    code, _, error = run_command("ask", bundle, *images, text)
    assert code == 2
    assert f"{tokens * len(images)} of them for {len(images)} images; the model's limit is 512" in error


@pytest.mark.parametrize("size", [(30, 20), (90, 40), (640, 480), (5, 900)])
def test_the_header_says_how_many_tokens_there_will_be(
    size: tuple[int, int], tmp_path: Path, processor: ImageProcessor
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(*size).save(tmp_path / "turned.jpg", exif=exif)
    images = [noise(*size), tmp_path / "turned.jpg"]
    assert processor.count_tokens(images) == sum(processor(images).tokens)
