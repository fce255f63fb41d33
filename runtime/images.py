"""Pictures to patches: opening files safely, then what Qwen2-VL's image processor does, in Pillow and NumPy.

transformers has such a processor, free of torch, and the tests hold this one to it. It is not used
here because importing it imports a web client: that takes 1.5 s, and fails in a Triton stub whose
Python brings another `ssl`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BundleError, InputError, one_line
from runtime.manifest import Manifest, check_file

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
"""What may stand for a picture: a file, a PIL image, or `[H, W, 3]` uint8."""
MAX_PIXELS = 64_000_000
"""A larger picture is refused before it is decoded: it is most often a decompression bomb."""
MIN_SIDE = 4
"""Pixels. Less is no picture but a placeholder."""
MAX_ASPECT_RATIO = 200
"""Of the longer to the shorter side, as Qwen2-VL's processor has it."""
PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImagePatches:
    """Images as the engine `vision_encoder` takes them, T tokens of all images one after another."""

    pixel_values: np.ndarray
    """`[T, merged, features]` float32, the patches that merge into one token side by side."""
    position_ids: np.ndarray
    """(row, column) of each patch, `[T, merged, 2]` int64."""
    image_ids: np.ndarray
    """The image that each token is of, `[T]` int64."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of tokens of each image."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each image."""
        return tuple(rows * columns for rows, columns in self.grids)

    def of_images(self, images: slice) -> ImagePatches:
        """Some of the images."""
        ends = np.cumsum((0, *self.tokens))
        first, last, _ = images.indices(len(self.grids))
        tokens = slice(int(ends[first]), int(ends[last]))
        return ImagePatches(
            self.pixel_values[tokens], self.position_ids[tokens], self.image_ids[tokens], self.grids[images]
        )


class _Size(BaseModel):
    model_config = ConfigDict(frozen=True)

    shortest_edge: int = Field(ge=1, description="smallest area in pixels, in spite of its name")
    longest_edge: int = Field(ge=1, description="largest area in pixels")


class ProcessorConfig(BaseModel):
    """`preprocessor_config.json` of a Qwen2-VL, as far as this processor goes; other settings are refused."""

    model_config = ConfigDict(frozen=True)

    size: _Size
    patch_size: int = Field(ge=1)
    temporal_patch_size: int = Field(ge=1)
    merge_size: int = Field(ge=1)
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    rescale_factor: float = 1 / 255
    resample: int = int(Image.Resampling.BICUBIC)
    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True


class ImageProcessor:
    """Patches of pictures: resized to whole tokens, normalised, cut."""

    def __init__(self, config: ProcessorConfig) -> None:
        self._config = config
        values = (np.arange(256) * config.rescale_factor).astype(np.float32)
        mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (config.image_mean, config.image_std))
        self._levels = (values - mean) / std
        """What each 8-bit value of each channel becomes, `[3, 256]` float32."""

    @classmethod
    def from_bundle(cls, bundle: Path, manifest: Manifest) -> ImageProcessor:
        """Reads the bundle's `preprocessor_config.json`, once it is known to be unaltered.

        Raises:
            BundleError: it has none, or one of another kind of processor.
        """
        entries = {entry.path: entry for entry in manifest.tokenizer_files}
        if PROCESSOR_FILE not in entries:
            raise BundleError(f"{bundle} holds no {PROCESSOR_FILE}, so it cannot see; export the checkpoint again")
        path = check_file(bundle, entries[PROCESSOR_FILE])
        try:
            return cls(ProcessorConfig.model_validate_json(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BundleError(f"{path} is not of a Qwen2-VL image processor: {where}: {first['msg']}") from error

    def __call__(self, pictures: Sequence[Picture]) -> ImagePatches:
        """Patches of one picture or more.

        Raises:
            InputError: something is no picture, or none of a usable size.
        """
        parts = [self._patches(self._resized(open_picture(picture))) for picture in pictures]
        grids = tuple((rows, columns) for _, rows, columns in parts)
        merge = self._config.merge_size
        return ImagePatches(
            pixel_values=np.concatenate([patches for patches, _, _ in parts]),
            position_ids=np.concatenate([_patch_positions(rows, columns, merge) for rows, columns in grids]),
            image_ids=np.repeat(np.arange(len(grids), dtype=np.int64), [rows * columns for rows, columns in grids]),
            grids=grids,
        )

    def _resized(self, image: Image.Image) -> np.ndarray:
        """`[height, width, 3]` uint8, both sides whole tokens, the area within the processor's limits."""
        width, height = image.size
        side = self._config.patch_size * self._config.merge_size
        size = self._config.size
        rows, columns = round(height / side), round(width / side)
        area = rows * columns * side * side
        if area > size.longest_edge:
            scale = math.sqrt(height * width / size.longest_edge)
            rows, columns = (max(1, math.floor(length / scale / side)) for length in (height, width))
        elif area < size.shortest_edge:
            scale = math.sqrt(size.shortest_edge / (height * width))
            rows, columns = (math.ceil(length * scale / side) for length in (height, width))
        return np.asarray(image.resize((columns * side, rows * side), Image.Resampling(self._config.resample)))

    def _patches(self, pixels: np.ndarray) -> tuple[np.ndarray, int, int]:
        """`[tokens, merged, features]` float32 of one image, and its rows and columns of tokens."""
        patch, merge, frames = self._config.patch_size, self._config.merge_size, self._config.temporal_patch_size
        rows, columns = pixels.shape[0] // (patch * merge), pixels.shape[1] // (patch * merge)
        normalised = self._levels[np.arange(3)[:, None, None], pixels.transpose(2, 0, 1)]
        cut = normalised.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        # A still picture is `temporal_patch_size` equal frames.
        repeated = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], frames, patch, patch))
        return repeated.reshape(rows * columns, merge * merge, -1), rows, columns


def _patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """(row, column) of every patch of a grid of tokens: `[rows·columns, merge², 2]` int64."""
    row, column = np.indices((rows * merge, columns * merge), dtype=np.int64)
    positions = np.stack([row, column], axis=-1).reshape(rows, merge, columns, merge, 2)
    return positions.transpose(0, 2, 1, 3, 4).reshape(rows * columns, merge * merge, 2)


def open_picture(picture: Picture) -> Image.Image:
    """An RGB image, turned as its EXIF data say.

    Raises:
        InputError: it is no picture, is broken, or has no usable size.
    """
    if isinstance(picture, (str, os.PathLike)):
        with _open_file(Path(picture)) as file:
            return _decode(file, str(picture))
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise InputError(f"an image array must be [H, W, 3] uint8, got {picture.dtype} {list(picture.shape)}")
        return _decode(Image.fromarray(picture), "the image")
    if isinstance(picture, Image.Image):
        return _decode(picture, "the image")
    raise InputError(f"an image must be a path, a PIL image or an array, got {type(picture).__name__}")


def _decode(image: Image.Image, name: str) -> Image.Image:
    _check_size(name, *image.size)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{name} cannot be decoded: {one_line(error)}; give a whole image file") from error


def _open_file(path: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_check_size` refuses earlier
        try:
            return Image.open(path)
        except FileNotFoundError as error:
            raise InputError(f"no image at {path}") from error
        except UnidentifiedImageError as error:
            raise InputError(f"{path} is not an image that Pillow knows; give a PNG, JPEG or the like") from error
        except Image.DecompressionBombError as error:
            raise InputError(f"{path} has more than {MAX_PIXELS} pixels; make it smaller") from error
        except (OSError, ValueError, SyntaxError) as error:
            raise InputError(f"{path} cannot be read as an image: {one_line(error)}") from error


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(f"{name} has {width}x{height} pixels, the limit is {MAX_PIXELS} in all; make it smaller")
    if min(width, height) < MIN_SIDE:
        raise InputError(f"{name} has {width}x{height} pixels, each side needs at least {MIN_SIDE}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise InputError(
            f"{name} has {width}x{height} pixels, one side may be at most {MAX_ASPECT_RATIO} times the other; crop it"
        )
