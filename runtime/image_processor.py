"""Images to patches: what Qwen2-VL's image processor does, in Pillow and NumPy.

transformers has such a processor that needs no torch, and the tests compare this one with it. It is not used here
because importing it imports a web client: that takes 1.5 s, and fails in a Triton stub whose Python has another
`ssl`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime.errors import BundleError
from runtime.images import ImageInput, check_images, open_image
from runtime.manifest import Manifest

PROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class ImagePatches:
    """Images in the form that the engine `vision_encoder` takes: T tokens, those of all images in order."""

    pixel_values: np.ndarray
    """`[T, merged, features]` float32: for each token, the patches that are merged into it."""
    position_ids: np.ndarray
    """(row, column) of each patch, `[T, merged, 2]` int64."""
    image_ids: np.ndarray
    """Index of each token's image, `[T]` int64."""
    grids: tuple[tuple[int, int], ...]
    """Rows and columns of tokens of each image."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens of each image."""
        return tuple(rows * columns for rows, columns in self.grids)

    def of_images(self, images: slice) -> ImagePatches:
        """Returns the patches of some of the images."""
        ends = np.cumsum((0, *self.tokens))
        first, last, _ = images.indices(len(self.grids))
        tokens = slice(int(ends[first]), int(ends[last]))
        return ImagePatches(
            self.pixel_values[tokens], self.position_ids[tokens], self.image_ids[tokens], self.grids[images]
        )


class _Size(BaseModel):
    model_config = ConfigDict(frozen=True)

    shortest_edge: int = Field(ge=1, description="smallest area in pixels, despite the name")
    longest_edge: int = Field(ge=1, description="largest area in pixels")


class ProcessorConfig(BaseModel):
    """The settings of a Qwen2-VL `preprocessor_config.json` that this processor supports; others are refused."""

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

    @property
    def most_patches(self) -> int:
        """Number of patches of the largest image."""
        return self.size.longest_edge // self.patch_size**2


def load_processor_config(path: Path) -> ProcessorConfig:
    """Reads a `preprocessor_config.json`.

    Raises:
        BundleError: it is for another kind of processor.
    """
    try:
        return ProcessorConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path} is not for a Qwen2-VL image processor: {where}: {first['msg']}") from error


class ImageProcessor:
    """Turns images into patches: resizes them to whole tokens, normalises them, and cuts them up."""

    def __init__(self, config: ProcessorConfig) -> None:
        self._config = config
        values = (np.arange(256) * config.rescale_factor).astype(np.float32)
        mean, std = (np.array(numbers, np.float32)[:, None] for numbers in (config.image_mean, config.image_std))
        self._levels = (values - mean) / std
        """The normalised value of each 8-bit value of each channel, `[3, 256]` float32."""

    @classmethod
    def from_bundle(cls, bundle: Path, manifest: Manifest) -> ImageProcessor:
        """Reads the bundle's `preprocessor_config.json` after checking that it was not altered.

        Raises:
            BundleError: there is none, or it is for another kind of processor.
        """
        return cls(load_processor_config(manifest.tokenizer_file(bundle, PROCESSOR_FILE)))

    def __call__(self, images: Sequence[ImageInput]) -> ImagePatches:
        """Returns the patches of one or more images.

        Raises:
            InputError: one of them is not an image, or has an unusable size.
        """
        parts = [self._patches(self._resized(open_image(image))) for image in images]
        grids = tuple((rows, columns) for _, rows, columns in parts)
        merge = self._config.merge_size
        return ImagePatches(
            pixel_values=np.concatenate([patches for patches, _, _ in parts]),
            position_ids=np.concatenate([_patch_positions(rows, columns, merge) for rows, columns in grids]),
            image_ids=np.repeat(np.arange(len(grids), dtype=np.int64), [rows * columns for rows, columns in grids]),
            grids=grids,
        )

    def count_tokens(self, images: Sequence[ImageInput]) -> int:
        """Returns the number of tokens of the images of one question, from their headers: none is decoded.

        Raises:
            InputError: there are too many, one is not an image, or sizes are beyond the limits.
        """
        grids = [self._grid(*size) for size in check_images(images)]
        return sum(rows * columns for rows, columns in grids)

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Returns the rows and columns of tokens of an image, whose area is then within the limits."""
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
        return rows, columns

    def _resized(self, image: Image.Image) -> np.ndarray:
        """Returns `[height, width, 3]` uint8; both sides are whole tokens."""
        side = self._config.patch_size * self._config.merge_size
        rows, columns = self._grid(*image.size)
        return np.asarray(image.resize((columns * side, rows * side), Image.Resampling(self._config.resample)))

    def _patches(self, pixels: np.ndarray) -> tuple[np.ndarray, int, int]:
        """Returns `[tokens, merged, features]` float32 of one image, and its rows and columns of tokens."""
        patch, merge, frames = self._config.patch_size, self._config.merge_size, self._config.temporal_patch_size
        rows, columns = pixels.shape[0] // (patch * merge), pixels.shape[1] // (patch * merge)
        normalised = self._levels[np.arange(3)[:, None, None], pixels.transpose(2, 0, 1)]
        cut = normalised.reshape(3, rows, merge, patch, columns, merge, patch).transpose(1, 4, 2, 5, 0, 3, 6)
        # A still image counts as `temporal_patch_size` equal frames.
        repeated = np.broadcast_to(cut[:, :, :, :, :, None], (*cut.shape[:5], frames, patch, patch))
        return repeated.reshape(rows * columns, merge * merge, -1), rows, columns


def _patch_positions(rows: int, columns: int, merge: int) -> np.ndarray:
    """Returns (row, column) of every patch of a grid of tokens: `[rows·columns, merge², 2]` int64."""
    row, column = np.indices((rows * merge, columns * merge), dtype=np.int64)
    positions = np.stack([row, column], axis=-1).reshape(rows, merge, columns, merge, 2)
    return positions.transpose(0, 2, 1, 3, 4).reshape(rows * columns, merge * merge, 2)
