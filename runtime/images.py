"""Images: opened safely from files, arrays and PIL; written as PNGs that say how they were made; shown as sheets."""

from __future__ import annotations

import io
import os
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from runtime.errors import InputError, one_line

ImageInput = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
"""An image as a caller may give it: a file, the content of one, a PIL image, or `[H, W, 3]` uint8."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
"""Formats of files whose content is given, as it is by the clients of a service."""
MAX_FILE_BYTES = 20_000_000
"""Limit of such a file."""
MAX_PIXELS = 64_000_000
"""Limit of an image, and of all images of a question together; most larger files are decompression bombs."""
MAX_IMAGES = 8
"""Number of images of a question."""
MIN_SIDE = 4
"""In pixels. Anything smaller is a placeholder."""
MAX_ASPECT_RATIO = 200
"""Longer side to shorter side; the limit of Qwen2-VL's own processor."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
"""Those that the pixels depend on."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF."""
_MARGIN = 8
_LINE = 14
_TILE = 160
"""Smallest side of an image on a sheet, in pixels."""


def check_images(images: Sequence[ImageInput]) -> list[tuple[int, int]]:
    """Checks the images of one question by their headers, before any is decoded.

    Returns:
        width and height of each in its file; EXIF data, which may be at the end of a file, can still swap the two.

    Raises:
        InputError: there are too many, one is not an image, or sizes are beyond the limits.
    """
    check_number(len(images))
    sizes = []
    for image in images:
        with _opened(image) as (opened, name):
            _check_size(name, *opened.size)
            sizes.append(opened.size)
    pixels = sum(width * height for width, height in sizes)
    if pixels > MAX_PIXELS:
        raise InputError(
            f"the {len(images)} images of a question have {pixels} pixels, the limit is {MAX_PIXELS} in all; "
            "make them smaller"
        )
    return sizes


def check_number(images: int) -> None:
    """Raises `InputError` for more images than a question may be about."""
    if images > MAX_IMAGES:
        raise InputError(f"a question may be about {MAX_IMAGES} images, got {images}; ask about fewer at a time")


def check_file_size(size: int, most: int = MAX_FILE_BYTES) -> None:
    """Raises `InputError` for a file of more bytes than it may have.

    Args:
        most: the limit in the file's encoding, if it is encoded.
    """
    if size > most:
        raise InputError(f"an image has {size} bytes, the limit is {MAX_FILE_BYTES}; make it smaller")


def bytes_of(image: ImageInput) -> int:
    """Returns about how many bytes an image has in memory while it waits; a path has none."""
    if isinstance(image, bytes):
        return len(image)
    if isinstance(image, np.ndarray):
        return image.nbytes
    return 3 * image.width * image.height if isinstance(image, Image.Image) else 0


def open_image(image: ImageInput) -> Image.Image:
    """Returns an RGB image, turned as its EXIF data say.

    Raises:
        InputError: it is not an image, is broken, or has an unusable size.
    """
    with _opened(image) as (opened, name):
        _check_size(name, *opened.size)
        try:
            opened.load()
            # Both would copy an image that needs no change, and a photo has hundreds of megabytes. PIL's own function
            # also writes the EXIF data anew, which fails for values that cameras get wrong.
            turn = _TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
            turned = opened if turn is None else opened.transpose(turn)
            return turned if turned.mode == "RGB" else turned.convert("RGB")
        except (OSError, SyntaxError, ValueError, TypeError, struct.error) as error:
            raise InputError(f"{name} cannot be decoded: {one_line(error)}; give a complete image file") from error


@contextmanager
def _opened(image: ImageInput) -> Iterator[tuple[Image.Image, str]]:
    """Opens an image without decoding it; yields it and its name for messages. Closes it only if it is a file."""
    if isinstance(image, (str, os.PathLike)):
        with _open_file(Path(image)) as file:
            yield file, str(image)
    elif isinstance(image, bytes):
        check_file_size(len(image))
        with _open_content(image) as file:
            yield file, "the image"
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"an image array must be [H, W, 3] uint8, got {image.dtype} {list(image.shape)}")
        yield Image.fromarray(image), "the image"
    elif isinstance(image, Image.Image):
        yield image, "the image"
    else:
        raise InputError(f"an image must be a path, a PIL image or an array, got {type(image).__name__}")


def _open_file(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses earlier
        try:
            return Image.open(path)
        except FileNotFoundError as error:
            raise InputError(f"no image at {path}") from error
        except UnidentifiedImageError as error:
            raise InputError(f"{path} is not an image that Pillow can read; give a PNG or JPEG file") from error
        except Image.DecompressionBombError as error:
            raise InputError(f"{path} has more than {MAX_PIXELS} pixels; make it smaller") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from error


def _open_content(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses earlier
        try:
            return Image.open(io.BytesIO(_without_texts(content)), formats=FORMATS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"an image must be a {', '.join(FORMATS)} file; this one cannot be opened") from error


def _without_texts(content: bytes) -> bytes:
    """Returns a PNG without its texts and profiles, which Pillow would inflate to 64 MB for a file of 64 kB."""
    if not content.startswith(_PNG_SIGNATURE):
        return content
    view, kept, place = memoryview(content), [memoryview(_PNG_SIGNATURE)], len(_PNG_SIGNATURE)
    while place < len(view):
        end = place + 12 + int.from_bytes(view[place : place + 4])  # length, name and checksum have 4 bytes each
        if view[place + 4 : place + 8] in _PNG_CHUNKS:
            kept.append(view[place:end])
        place = end
    return b"".join(kept)


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width}x{height} pixels, the limit is {MAX_PIXELS} in all; make it smaller")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} has {width}x{height} pixels, each side needs at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{name} has {width}x{height} pixels, one side may be at most {MAX_ASPECT_RATIO} times the other; crop it"
        )


def drawing_metadata(
    prompt: str,
    *,
    negative_prompt: str,
    seed: int | None,
    num_inference_steps: int,
    guidance_scale: float,
    shift: float,
    bundle_hash: str,
    guidance_interval: tuple[float, float] | None = None,
) -> dict[str, str]:
    """Returns what a PNG says of how it was drawn."""
    interval = {} if guidance_interval is None else {"guidance_interval": "{:g} {:g}".format(*guidance_interval)}
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "seed": str(seed),
        "num_inference_steps": str(num_inference_steps),
        "guidance_scale": str(guidance_scale),
        "shift": str(shift),
        **interval,
        "bundle": bundle_hash,
        "Software": "latte-flow",
    }


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a PNG with text metadata, under a temporary name first.

    Raises:
        InputError: the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(png_bytes(image, metadata))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another output folder") from error


def png_bytes(image: Image.Image, metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a PNG file, with text metadata."""
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Returns one image that shows images in a grid, small ones enlarged without blur, each with its label below."""
    columns = columns or min(len(images), 4)
    tile = max(_TILE, *(side for image in images for side in image.size))
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(11)
    wrapped = [_wrap(label, font, tile) for label in labels]
    text_height = _LINE * max((len(lines) for lines in wrapped), default=0)
    cell = (tile + _MARGIN, tile + text_height + _MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = _MARGIN + i % columns * cell[0], _MARGIN + i // columns * cell[1]
        scale = tile / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=(200, 200, 200))
        for line, text in enumerate(lines):
            pen.text((left, top + tile + 2 + line * _LINE), text, fill="black", font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
