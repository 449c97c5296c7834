"""Picture files: read whole or refused in one line, written whole or not at all, with what they hold beside pixels.

`read_file` makes a [`PictureFile`], `enlarged` upscales it, `check_target` says before any work what a format cannot
hold, `write_file` writes it. docs/files.md has the table of what each format keeps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image

from flowsr.picture_file import (
    FORMATS,
    MAX_PIXELS,
    PICTURE_SUFFIXES,
    PictureFile,
    UnreadableError,
    as_image,
    update_exif,
    with_provenance,
)
from flowsr.picture_reader import read_file
from flowsr.picture_writer import check_place, check_target, encode, format_of, write_file

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "PICTURE_SUFFIXES",
    "PictureFile",
    "UnreadableError",
    "as_levels",
    "as_rgb",
    "check_place",
    "check_target",
    "encode",
    "find_pictures",
    "format_of",
    "read_file",
    "read_picture",
    "save_picture",
    "with_provenance",
    "write_file",
]


def as_rgb(picture: PictureFile) -> PIL.Image.Image:
    """The first frame in 8-bit RGB, for looking at."""
    frame = picture.frames[0] if picture.bits == 8 else (picture.frames[0] / 257).round().astype(np.uint8)
    return as_image(frame, picture).convert("RGB")


def as_levels(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """An image of 8 bits per channel in "RGB" or "L"; greys of 16 bits keep their brightness, as in inference.

    Raises:
        ValueError: for a mode without a defined way to RGB.
    """
    from flowsr.pipelines.image_processor import read_pil

    if image.mode[0] in "IF" or image.mode == "LAB":  # which Pillow would clip to 255
        grey = read_pil(image).color[0, 0]
        image = PIL.Image.fromarray(((grey + 1) * 127.5).round().byte().numpy())
    return image.convert(mode)


def read_picture(path: str | Path) -> PIL.Image.Image:
    """A still picture as PIL has it, upright, with its EXIF and ICC profile in `info`.

    Raises:
        UnreadableError: if the file cannot be read, holds several frames, or 16 bits per colour channel.
    """
    picture = read_file(path)
    if len(picture.frames) > 1:
        raise UnreadableError(f"{path}: holds {len(picture.frames)} frames; a still picture is wanted here.")
    if picture.bits == 16 and picture.mode != "L":
        raise UnreadableError(f"{path}: 16 bits per colour channel; convert it to 8 bits first.")
    image = as_image(picture.frames[0], picture)
    for name, value in (("exif", picture.exif), ("icc_profile", picture.icc_profile)):
        if value:
            image.info[name] = value
    return image


def save_picture(image: PIL.Image.Image, path: str | Path) -> None:
    """Writes a PIL picture as `write_file` does, with the EXIF and ICC profile in `image.info`.

    Raises:
        ValueError: if the suffix or the format does not allow the picture.
    """
    if image.mode not in ("L", "LA", "RGB", "RGBA", "CMYK", "I;16"):
        raise ValueError(f"{path}: a picture of mode {image.mode} cannot be written; convert it to RGB first.")
    frame = np.asarray(image)
    picture = PictureFile([frame if frame.ndim == 3 else frame[..., None]], cmyk=image.mode == "CMYK")
    picture.icc_profile = image.info.get("icc_profile") or b""
    exif = bytes(image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    picture.exif = update_exif(exif, image.size) if exif else b""
    write_file(picture, path)


def find_pictures(places: list[str]) -> list[Path]:
    """The picture files among `places`: files as named, and those directly in a named folder, sorted.

    Raises:
        ValueError: for a place that does not exist or a folder without pictures.
    """
    found = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(p for p in place.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
            if not inside:
                raise ValueError(f"No pictures in {place} (looked for {', '.join(sorted(PICTURE_SUFFIXES))}).")
            found += inside
        elif place.exists() or str(place) == "-":
            found.append(place)
        else:
            raise ValueError(f"There is no {place}.")
    return found
