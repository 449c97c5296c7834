"""Picture files: read with a clear error, written whole or not at all, with what they carry beside the pixels."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path

import PIL.Image
import PIL.ImageOps

PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
ORIENTATION, EXIF_IFD, GPS_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x0112, 0x8769, 0x8825, 0xA002, 0xA003
# What a TIFF says of the picture rather than of its layout in the file: description, maker, model, software, date,
# artist, copyright.
TIFF_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)


class UnreadableError(ValueError):
    """A file that is not a picture that can be read whole."""


def read_picture(path: str | Path) -> PIL.Image.Image:
    """Opens a picture and decodes all of it, upright: an EXIF orientation is applied and removed.

    Raises:
        UnreadableError: if the file is missing, empty, not a picture, cut off, or holds several frames.
    """
    path = Path(path)
    if not path.is_file():
        raise UnreadableError(f"{path}: there is no such file.")
    if path.stat().st_size == 0:
        raise UnreadableError(f"{path}: the file is empty.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = PIL.Image.open(path)
            if getattr(image, "n_frames", 1) > 1:
                raise UnreadableError(f"{path}: holds {image.n_frames} frames; only still pictures can be upscaled.")
            if (
                image.format == "PNG"
                and image.tile
                and "16B" in str(image.tile[0][3])
                and image.mode in ("RGB", "RGBA")
            ):
                raise UnreadableError(
                    f"{path}: 16 bits per colour channel, of which Pillow would drop 8; convert it to 8 bits first."
                )
            exif = {tag: dict(image.getexif().get_ifd(tag)) for tag in (EXIF_IFD, GPS_IFD)}  # while the file is open
            image.load()
    except UnreadableError:
        raise
    except PIL.UnidentifiedImageError:
        raise UnreadableError(f"{path}: not a picture in a format that Pillow knows.") from None
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UnreadableError(f"{path}: refused as too large ({error}).") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... for broken files
        raise UnreadableError(f"{path}: broken or cut off ({error}).") from None
    PIL.ImageOps.exif_transpose(image, in_place=True)
    if image.format == "TIFF":
        found, kept = image.getexif(), PIL.Image.Exif()
        kept.update({tag: found[tag] for tag in TIFF_TAGS if tag in found})
        for tag, values in exif.items():
            if values:
                kept.get_ifd(tag).update(values)
        image.info["exif"] = kept.tobytes()
    return image


def save_picture(image: PIL.Image.Image, path: str | Path) -> None:
    """Writes a picture in the format of its suffix, with the ICC profile and EXIF in `image.info`.

    The file appears under its name only when it is complete. JPEG is written at quality 95 without chroma subsampling,
    WebP without loss; what the format cannot hold (alpha in a JPEG, 16 bits in one) is refused.

    Raises:
        ValueError: if the suffix or the format does not allow the picture.
    """
    path = Path(path)
    format = PIL.Image.registered_extensions().get(path.suffix.lower())
    if format is None or path.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"{path}: flowsr writes {', '.join(sorted(PICTURE_SUFFIXES))}.")
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(format, {})
    exif = image.getexif()
    exif.pop(ORIENTATION, None)
    inner = exif.get_ifd(EXIF_IFD)
    if EXIF_WIDTH in inner:
        inner[EXIF_WIDTH], inner[EXIF_HEIGHT] = image.size
    if len(exif):
        options["exif"] = exif.tobytes()
    if image.info.get("icc_profile"):
        options["icc_profile"] = image.info["icc_profile"]
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format=format, **options)
        os.chmod(partial, 0o666 & ~current_umask())
        os.replace(partial, path)
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None):  # of the system: a full disk, not the picture
            raise
        raise ValueError(f"{path}: {format} cannot hold this picture of mode {image.mode} ({error}).") from error
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


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
        elif place.exists():
            found.append(place)
        else:
            raise ValueError(f"There is no {place}.")
    return found
