"""What becomes of images of every kind: decoded, upright, opaque, cropped; or bad, with the reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latte.data.images import BadRowError, ImagePolicy, aspect_buckets, crop_box, render, upright_size
from runtime.errors import InputError
from tests.latte.data.worlds import image_bytes

POLICY = ImagePolicy(32, 32, 8)


def encoded(image: Image.Image, file_format: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def quarters() -> Image.Image:
    """An image of 64x32: red, green over blue, white."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32], pixels[:16, 32:], pixels[16:, :32], pixels[16:, 32:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255
    return Image.fromarray(pixels)


def exif(orientation: int) -> Image.Exif:
    data = Image.Exif()
    data[0x0112] = orientation
    return data


@pytest.mark.parametrize("file_format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_honoured(orientation: int, file_format: str) -> None:
    turned = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
              7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
    image = quarters()
    stored = image.transpose(Image.Transpose[turned[orientation]]) if orientation in turned else image
    data = encoded(stored, file_format, exif=exif(orientation), **({"quality": 95} if file_format == "jpeg" else {}))
    assert upright_size(data) == (64, 32)
    pixels = render(data, ImagePolicy(32, 64, 8), (32, 64)).astype(int)
    assert np.abs(pixels[8::16, 16::32] - np.asarray(image)[8::16, 16::32].astype(int)).max() < 12


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("RGBA", (32, 32), (200, 0, 0, 0)), (10, 20, 30)),
        (Image.new("RGBA", (32, 32), (200, 0, 0, 128)), (105, 10, 15)),
        (Image.new("LA", (32, 32), (200, 0)), (10, 20, 30)),
        (Image.new("L", (32, 32), 77), (77, 77, 77)),
        (Image.new("1", (32, 32), 1), (255, 255, 255)),
        (Image.new("RGB", (32, 32), (1, 2, 3)).quantize(4), (1, 2, 3)),
        (Image.fromarray(np.full((32, 32), 0x4D21, np.uint16)), (0x4D, 0x4D, 0x4D)),
    ],
)
def test_every_mode_of_png_becomes_rgb(image: Image.Image, expected: tuple[int, int, int]) -> None:
    policy = ImagePolicy(32, 32, 8, background=(10, 20, 30))
    pixels = render(encoded(image), policy, (32, 32))
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1


def test_cmyk_and_16_bit_rgb_become_rgb() -> None:
    data = encoded(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "jpeg")
    assert render(data, POLICY, (32, 32)).mean(axis=(0, 1)) == pytest.approx([254, 0, 0], abs=2)
    big = encoded(Image.fromarray(np.full((32, 32), 0x4D21, ">u2").astype(np.uint16)), "tiff")
    assert (render(big, POLICY, (32, 32)) == 0x4D).all()


def test_a_transparent_palette_is_laid_over_the_background() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 200, 0, 0])
    data = encoded(image, transparency=1)
    assert (render(data, POLICY, (32, 32)) == 255).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has a few rows."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"this is text", "it is not an image: its format is unknown"),
        (b"", "it is not an image"),
        (encoded(Image.effect_noise((64, 64), 50), "jpeg")[:1500], "it cannot be decoded: "),
        (encoded(Image.effect_noise((64, 64), 50))[:900], "it cannot be decoded: "),
        (image_bytes(3, (64, 8)), r"it has 64x8 pixels, too few for 32x32: it would be enlarged 4.0 times"),
        (png_header(9000, 8000), "it has 9000x8000 pixels, the limit is 64000000 in all"),
        (png_header(50_000, 50_000), "it has more than the limit of 64000000 pixels"),
        (encoded(Image.new("F", (32, 32)), "tiff"), "its pixels are floats of unknown range"),
    ],
)  # fmt: skip
def test_a_bad_image_has_a_reason(data: bytes, expected: str) -> None:
    with pytest.raises(BadRowError, match=expected):
        render(data, POLICY, (32, 32))


@pytest.mark.parametrize("size", [(640, 480), (481, 1000), (64, 64), (33, 47)])
def test_a_crop_is_the_largest_box_of_its_aspect(size: tuple[int, int]) -> None:
    for target in ((32, 32), (32, 64), (64, 32)):
        left, top, right, bottom = crop_box(*size, target)
        assert (right - left == size[0]) or (bottom - top == size[1])
        assert abs((right - left) / (bottom - top) * target[0] / target[1] - 1) < 2 / min(size)
        assert abs(left - (size[0] - right)) <= 1
        assert abs(top - (size[1] - bottom)) <= 1
        assert crop_box(*size, target, 0.0)[:2] == (0, 0)
        assert crop_box(*size, target, 1.0)[2:] == size


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_to_nearly_the_same_pixels() -> None:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 255, (8, 10, 3), np.uint8))
    data = encoded(small.resize((1000, 800), Image.Resampling.BICUBIC), "jpeg", quality=95)
    drafted = render(data, POLICY, (32, 32)).astype(int)
    whole = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.LANCZOS, box=(100, 0, 900, 800))
    assert np.abs(drafted - np.asarray(whole).astype(int)).mean() < 1.5


def test_buckets_have_about_the_same_area() -> None:
    sizes = aspect_buckets(256, 256, 32)
    assert (256, 256) in sizes
    assert set(sizes) == {(width, height) for height, width in sizes}
    for height, width in sizes:
        assert not height % 32
        assert not width % 32
        assert 0.5 <= height / width <= 2
        assert height * width == pytest.approx(256 * 256, rel=0.15)
    policy = ImagePolicy(256, 256, 32, crop="buckets")
    assert policy.sizes[policy.bucket_of(1000, 1000)] == (256, 256)
    assert policy.sizes[policy.bucket_of(5000, 100)] == max(sizes, key=lambda size: size[1] / size[0])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: ImagePolicy(30, 32, 8), "must be positive multiples of 8 for this autoencoder, got 30x32"),
        (lambda: ImagePolicy(32, 32, 8, crop="left"), "crop must be center, random or buckets, got 'left'"),  # type: ignore[arg-type]
        (lambda: ImagePolicy(32, 32, 8, max_aspect=0.5), "must be at least 1"),
    ],
)  # fmt: skip
def test_a_policy_checks_itself(make: Callable[[], ImagePolicy], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        make()
