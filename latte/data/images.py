"""From an image file's bytes to pixels of one size: decoding, orientation, transparency, crops and aspect buckets."""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from runtime.errors import InputError, one_line
from runtime.images import MAX_PIXELS

CropName = Literal["center", "random", "buckets"]
Size = tuple[int, int]
"""Height and width in pixels."""
Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in the pixels of the upright image."""
RESAMPLING = Image.Resampling.LANCZOS
DRAFT_SCALE = 2
"""A JPEG is decoded at the smallest scale that still has this many times the pixels needed, in each direction."""


class BadRowError(Exception):
    """A row that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class ImagePolicy:
    """How images become the pixels of a batch.

    Raises:
        InputError: a value is out of range.
    """

    height: int
    width: int
    """The size in pixels; with buckets, the area of every size is about height x width."""
    factor: int
    """Pixels per latent: all sizes are its multiples."""
    crop: CropName = "center"
    """The largest box of the size's aspect ratio, in the centre or at a random place; or in the centre with the aspect
    ratio of the nearest bucket."""
    flip: bool = False
    """Mirror half of the images. Wrong where captions say "left" and "right"."""
    background: tuple[int, int, int] = (255, 255, 255)
    """RGB colour behind transparent pixels."""
    max_enlargement: float = 2.0
    """An image that would have to be enlarged by more is bad."""
    max_aspect: float = 2.0
    """Longer to shorter side of the most oblong bucket."""

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.factor) < 1 or self.height % self.factor or self.width % self.factor:
            raise InputError(
                f"height and width (--resolution) must be positive multiples of {self.factor} for this autoencoder, "
                f"got {self.height}x{self.width}"
            )
        if self.crop not in ("center", "random", "buckets"):
            raise InputError(f"crop must be center, random or buckets, got {self.crop!r}")
        if self.max_enlargement < 1 or self.max_aspect < 1:
            raise InputError(
                f"max_enlargement and max_aspect must be at least 1, got {self.max_enlargement}, {self.max_aspect}"
            )

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All sizes that a batch may have."""
        if self.crop != "buckets":
            return ((self.height, self.width),)
        return aspect_buckets(self.height, self.width, self.factor, self.max_aspect)

    def bucket_of(self, width: int, height: int) -> int:
        """Returns the index of the size whose aspect ratio is nearest to an image's."""
        aspect = math.log(width / height)
        distances = [abs(math.log(w / h) - aspect) for h, w in self.sizes]
        return distances.index(min(distances))


def aspect_buckets(height: int, width: int, factor: int, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """Returns sizes in multiples of `factor` of about the area height x width, for each length of the shorter side.

    The aspect ratios lie between 1 / `max_aspect` and `max_aspect`; height x width itself is always among them.
    """
    sizes = {(height, width)}
    area = height * width / factor**2
    for short in range(1, math.floor(math.sqrt(area)) + 1):
        long = round(area / short)
        if long <= max_aspect * short and short * factor not in (height, width):
            sizes |= {(short * factor, long * factor), (long * factor, short * factor)}
    return tuple(sorted(sizes))


def crop_box(width: int, height: int, size: Size, place: float = 0.5) -> Box:
    """Returns the largest box of a size's aspect ratio.

    Args:
        place: where it is along the longer direction: 0 at the left or top, 0.5 in the centre, 1 at the right or
            bottom.
    """
    box_width = min(width, max(1, round(height * size[1] / size[0])))
    box_height = height if box_width < width else min(height, max(1, round(width * size[0] / size[1])))
    left, top = round((width - box_width) * place), round((height - box_height) * place)
    return (left, top, left + box_width, top + box_height)


def upright_size(data: bytes) -> tuple[int, int]:
    """Returns the width and height of an image, turned as its EXIF data say, from its header.

    Raises:
        BadRowError: it is not an image, or has an unusable size.
    """
    with _opened(data) as image:
        return _upright(image, data)[1]


def render(data: bytes, policy: ImagePolicy, size: Size, place: float = 0.5) -> np.ndarray:
    """Decodes an image and crops it to a size.

    Args:
        place: see `crop_box`.

    Returns:
        `[height, width, 3]` uint8.

    Raises:
        BadRowError: it is not an image, is truncated, has an unusable size, or is too small.
    """
    with _opened(data) as image:
        is_turned, upright = _upright(image, data)
        box = check_enlargement(upright, policy, size, place)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities in files that it reads all the same
            try:
                scale = size[1] / (box[2] - box[0]) * DRAFT_SCALE
                image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
                image.load()
                turned = ImageOps.exif_transpose(image) if is_turned else image
                rgb = to_rgb(turned, policy.background)
            except BadRowError:
                raise
            except Exception as error:  # a broken file makes Pillow's readers raise anything
                raise BadRowError(f"it cannot be decoded: {one_line(error)}") from error
        across, down = rgb.width / upright[0], rgb.height / upright[1]  # less than 1 after a draft
        scaled = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return np.asarray(rgb.resize((size[1], size[0]), RESAMPLING, box=scaled))


def check_enlargement(upright: tuple[int, int], policy: ImagePolicy, size: Size, place: float = 0.5) -> Box:
    """Returns the box of an image, given by width and height, for a size.

    Raises:
        BadRowError: the image is too small.
    """
    box = crop_box(*upright, size, place)
    enlargement = max(size[1] / (box[2] - box[0]), size[0] / (box[3] - box[1]))
    if enlargement > policy.max_enlargement:
        raise BadRowError(
            f"it has {upright[0]}x{upright[1]} pixels, too few for {size[1]}x{size[0]}: it would be enlarged "
            f"{enlargement:.1f} times, the limit is {policy.max_enlargement:g}"
        )
    return box


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Converts an image of any mode to RGB, transparent pixels over a background.

    Raises:
        BadRowError: its values have no known range.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BadRowError(f"its pixels are {'32-bit integers' if image.mode == 'I' else 'floats'} of unknown range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat = Image.new("RGBA", rgba.size, (*background, 255))
        flat.alpha_composite(rgba)
        image = flat
    return image if image.mode == "RGB" else image.convert("RGB")


def _opened(data: bytes) -> Image.Image:
    """Opens an image without decoding it, and checks its size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decompression bombs are refused below; other warnings change nothing
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise BadRowError(f"it has more than the limit of {MAX_PIXELS} pixels") from error
        except Exception as error:  # a broken file makes Pillow's readers raise anything
            raise BadRowError(f"it is not an image: {_reason(error)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadRowError(f"it has {image.width}x{image.height} pixels, the limit is {MAX_PIXELS} in all")
    return image


def _reason(error: Exception) -> str:
    return "its format is unknown" if isinstance(error, Image.UnidentifiedImageError) else one_line(error)


def _upright(image: Image.Image, data: bytes) -> tuple[bool, tuple[int, int]]:
    """Returns whether an image has to be turned, and its width and height then."""
    # Pillow decodes the whole of a PNG to look for its EXIF data.
    if image.format == "PNG" and b"eXIf" not in data:
        return False, image.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # broken EXIF data: the image is taken as it is
            orientation = 1
    if orientation not in range(2, 9):
        return False, image.size
    return True, (image.height, image.width) if orientation >= 5 else image.size
