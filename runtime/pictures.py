"""Pictures on disk: PNGs that say how they were made, and sheets of several."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from runtime.errors import InputError

_MARGIN = 8
_LINE = 14
_TILE = 160


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a PNG with text metadata, under a temporary name first.

    Raises:
        InputError: the folder cannot be written to.
    """
    info = PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}; choose another output folder") from error


def png_bytes(image: Image.Image) -> bytes:
    """A PNG file in memory."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def contact_sheet(images: Sequence[Image.Image], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """Pictures side by side, enlarged without blur, each with its label below."""
    columns = columns or min(len(images), 4)
    rows = -(-len(images) // columns)
    font = ImageFont.load_default(11)
    wrapped = [_wrap(label, font, _TILE) for label in labels]
    text_height = _LINE * max((len(lines) for lines in wrapped), default=0)
    cell = (_TILE + _MARGIN, _TILE + text_height + _MARGIN)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = _MARGIN + i % columns * cell[0], _MARGIN + i // columns * cell[1]
        scale = _TILE / max(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        sheet.paste(image.convert("RGB").resize(size, Image.Resampling.NEAREST), (left, top))
        pen.rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=(200, 200, 200))
        for line, text in enumerate(lines):
            pen.text((left, top + _TILE + 2 + line * _LINE), text, fill="black", font=font)
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
