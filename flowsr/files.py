"""Picture files: read whole or refused in one line, written whole or not at all, with what they hold beside pixels.

A [`PictureFile`] stands between the two: `read_file` makes it, `enlarged` upscales it, `check_target` says before any
work what a format cannot hold, `write_file` writes it. docs/files.md has the table of what each format keeps.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO
from xml.sax.saxutils import quoteattr

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import PIL.TiffImagePlugin

MAX_PIXELS = 2**29  # of a result, all frames together: 32 megapixels of input at x4
MAX_FRAMES = 4096
MAX_SCANS = 500  # of a JPEG: a small file of many progressive scans would keep the decoder busy for hours
ORIENTATION, EXIF_IFD, GPS_IFD, XMP_TAG, ICC_TAG = 0x0112, 0x8769, 0x8825, 700, 34675
X_RESOLUTION, Y_RESOLUTION = 0x011A, 0x011B
WIDTHS, HEIGHTS = (0x0100, 0xA002), (0x0101, 0xA003)  # of the picture in IFD0 and in the EXIF IFD
# What a TIFF says of the picture rather than of its layout in the file: description, maker, model, software, date,
# artist, copyright.
TIFF_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
COLOR_CHUNKS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4}  # of a PNG, with their lengths
KEPT_SEGMENTS = (b"Photoshop 3.0\0", b"http://ns.adobe.com/xmp/extension/\0")  # of a JPEG, as they are
READ_SEGMENTS = (b"JFIF", b"JFXX", b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"MPF\0", b"Adobe")
READ_CHUNKS = (
    "IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB cICP iCCP eXIf pHYs tEXt zTXt iTXt acTL fcTL fdAT "
    "bKGD hIST sBIT tIME"  # of the old pixels: their background, palette, precision and date
).split()
# Of a TIFF: 254 to 297 and 317 to 347 describe layout, colour and resolution of the pixels, 512 to 532 a JPEG in it.
LAYOUT_TAGS = (*range(254, 270), *range(273, 298), *range(317, 348), *range(512, 533))
NAMESPACE = "https://github.com/flowsr/ns/1.0/"


@dataclass(frozen=True)
class Format:
    """What a file format can hold."""

    name: str  # as in Pillow
    suffixes: tuple[str, ...]
    modes: tuple[str, ...] = ()  # that can be written; none: the format is read only
    deep: tuple[str, ...] = ()  # modes that can be written with 16 bits per channel
    keeps: tuple[str, ...] = ()  # beside the pixels
    frames: bool = False
    side: int = 2**31 - 1  # longest, pixels
    quality: int | None = None  # where compression loses, 0..100; None for lossless


FORMATS = (
    Format(
        "PNG", (".png", ".apng"), ("L", "LA", "RGB", "RGBA"), ("L", "LA", "RGB", "RGBA"),
        ("EXIF", "ICC profile", "XMP", "resolution", "text", "comment", "colour space"), frames=True,
    ),
    Format(
        "JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), ("L", "RGB", "CMYK"), (),
        ("EXIF", "ICC profile", "XMP", "resolution", "comment", "IPTC"), side=65500, quality=95,
    ),
    Format(
        "WEBP", (".webp",), ("L", "LA", "RGB", "RGBA"), (), ("EXIF", "ICC profile", "XMP"), frames=True, side=16383,
    ),
    Format(
        "TIFF", (".tif", ".tiff"), ("L", "LA", "RGB", "RGBA", "CMYK"), ("L", "RGB", "RGBA", "CMYK"),
        ("EXIF", "ICC profile", "XMP", "resolution"), frames=True,
    ),
    Format(
        "AVIF", (".avif",), ("L", "RGB", "RGBA"), (), ("EXIF", "ICC profile", "XMP"), frames=True, side=65535,
        quality=95,
    ),
    Format(
        "HEIF", (".heic", ".heif"), ("RGB", "RGBA"), (), ("EXIF", "ICC profile", "XMP"), side=16384, quality=95,
    ),
    Format("JPEG2000", (".jp2", ".j2k"), ("L", "LA", "RGB", "RGBA"), ("L",), ("comment",)),
    Format("BMP", (".bmp",), ("L", "RGB"), (), ("resolution",), side=2**15),
    Format("GIF", (".gif",)),
)  # fmt: skip
PICTURE_SUFFIXES = {suffix for format in FORMATS for suffix in format.suffixes}
WRITTEN = tuple(format for format in FORMATS if format.modes)


class UnreadableError(ValueError):
    """A file that is not a picture that can be read whole."""


@dataclass
class PictureFile:
    """A picture as it stands in a file, upright; or several, of an animation or of pages.

    Attributes:
        frames: arrays `(h, w, c)` of uint8 or uint16; 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 channels (RGB, alpha).
        cmyk: the four channels are ink, 0 for none.
        notes: what was found in the file and cannot be kept, in words.
        exif, icc_profile, xmp, comment: the bytes in the file.
        text: keywords and texts of a PNG.
        resolution: pixels per inch, across and down.
        colour_space: chunks of a PNG by their names.
        segments: of a JPEG, as they are: IPTC, and XMP beyond 64 KB.
        durations: of the frames, ms; empty for pages.
        loop: how often an animation plays; 0 for ever.
    """

    frames: list[np.ndarray]
    format: str = "PNG"
    cmyk: bool = False
    notes: list[str] = field(default_factory=list)
    exif: bytes = b""
    icc_profile: bytes = b""
    xmp: bytes = b""
    comment: bytes = b""
    text: dict[str, str] = field(default_factory=dict)
    resolution: tuple[float, float] | None = None
    colour_space: dict[bytes, bytes] = field(default_factory=dict)
    segments: bytes = b""
    durations: list[float] = field(default_factory=list)
    loop: int = 0

    @property
    def mode(self) -> str:
        return "CMYK" if self.cmyk else ("L", "LA", "RGB", "RGBA")[max(f.shape[2] for f in self.frames) - 1]

    @property
    def suffix(self) -> str:
        return next(format.suffixes[0] for format in FORMATS if format.name == self.format)

    @property
    def bits(self) -> int:
        return max(frame.dtype.itemsize for frame in self.frames) * 8

    def enlarged(self, enlarge: Callable[[np.ndarray], np.ndarray], scale: int) -> PictureFile:
        """The picture with `enlarge` applied to its frames, and what it says of its size changed to fit.

        Colour under alpha 0, which is often black, is replaced by the colour beside it, which would show as a fringe
        otherwise. Ink is upscaled as ink: cyan, magenta and yellow as one picture, black as another.

        Args:
            enlarge: takes `(h, w, c)` as in `frames` and returns `(scale * h, scale * w, c)`, float in [0, 1].
            scale: pixels of the result per pixel.
        """
        frames = []
        for pixels in self.frames:
            top = np.iinfo(pixels.dtype).max
            if self.cmyk:
                large = np.concatenate([enlarge(top - pixels[..., :3]), enlarge(top - pixels[..., 3:])], axis=2)
                large = 1 - large
            else:
                large = enlarge(bleed(pixels) if pixels.shape[2] in (2, 4) else pixels)
            frames.append((large * top).round().astype(pixels.dtype))
        height, width = frames[0].shape[:2]
        return replace(
            self,
            frames=frames,
            exif=update_exif(self.exif, (width, height), scale) if self.exif else b"",
            resolution=self.resolution and tuple(scale * each for each in self.resolution),
        )


def bleed(pixels: np.ndarray) -> np.ndarray:
    """`(h, w, c)` with alpha last -> the same with colour under alpha 0 taken from the pixels beside it.

    Pull and push (Gortler et al. 1996, section 4.2): colours are averaged, weighted by alpha, to ever coarser grids,
    and what is empty on one grid is filled from the coarser one.
    """
    alpha = pixels[..., -1:]
    if alpha.all() or not alpha.any():
        return pixels
    filled = fill(pixels[..., :-1].astype(np.float32), alpha.astype(np.float32) / np.iinfo(pixels.dtype).max)
    return np.concatenate([filled.round().astype(pixels.dtype), alpha], axis=2)


def fill(color: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """`(h, w, c)` -> the same where `weight` (`(h, w, 1)`) is positive, and averages from around elsewhere."""
    if weight.all():
        return color
    height, width, channels = color.shape
    both = np.pad(np.concatenate([color * weight, weight], axis=2), ((1, 1), (1, 1), (0, 0)))
    around = sum(both[y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9
    color = np.where(weight > 0, color, around[..., :-1] / np.maximum(around[..., -1:], 1e-12))
    weight = np.where(weight > 0, weight, around[..., -1:])
    both = np.concatenate([color * weight, weight], axis=2)
    both = np.pad(both, ((0, height % 2), (0, width % 2), (0, 0)))
    both = both.reshape(both.shape[0] // 2, 2, both.shape[1] // 2, 2, channels + 1).mean(axis=(1, 3))
    coarse = fill(both[..., :-1] / np.maximum(both[..., -1:], 1e-12), both[..., -1:])
    return np.where(weight > 0, color, coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width])


# Reading.


def read_file(path: str | Path, max_pixels: int = MAX_PIXELS) -> PictureFile:
    """Reads a picture file with everything in it, upright; `-` is the standard input.

    Args:
        path: of the file. Its content decides on the format, not its name.
        max_pixels (`int`): of all frames together; looked up before anything is decoded.

    Raises:
        UnreadableError: if the file is missing, closed to the user, empty, not a picture, cut off, damaged, too large,
            or of a kind that could be read only with a loss.
    """
    name = "standard input" if str(path) == "-" else str(path)
    data = read_bytes(path, name, 16 * max_pixels + 2**26)  # at 16 bits a picture has 8 bytes a pixel
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pixels beside `max_pixels`, of metadata that is checked below
            return decode(data, max_pixels)
    except UnreadableError as error:
        raise UnreadableError(f"{name}: {error}") from None
    except PIL.UnidentifiedImageError:
        wanted = ", ".join(format.name for format in FORMATS)
        raise UnreadableError(
            f"{name}: not a picture, or of a format or kind other than can be read ({wanted})."
        ) from None
    except PIL.Image.DecompressionBombError as error:
        raise UnreadableError(f"{name}: refused as too large ({one_line(error)}).") from None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... for broken files
        raise UnreadableError(f"{name}: broken or cut off ({one_line(error)}).") from None


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_bytes(path: str | Path, name: str, limit: int) -> bytes:
    """The content of a regular file or the standard input, `limit` bytes at most."""
    if str(path) == "-":
        data = sys.stdin.buffer.read(limit + 1)
    else:
        try:
            found = os.stat(path)
            if not stat.S_ISREG(found.st_mode):
                what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file; pipe it to `-` instead"
                raise UnreadableError(f"{name}: {what}.")
            with open(path, "rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            raise UnreadableError(f"{name}: there is no such file.") from None
        except PermissionError:
            raise UnreadableError(f"{name}: no permission to read it.") from None
        except OSError as error:
            raise UnreadableError(f"{name}: cannot be read ({error.strerror}).") from None
    if not data:
        raise UnreadableError(f"{name}: the file is empty.")
    if len(data) > limit:
        raise UnreadableError(f"{name}: refused as too large (more than {limit:,} bytes).")
    return data


def open_image(data: bytes, frame: int = 0) -> PIL.Image.Image:
    """The header of a frame; nothing is decoded."""
    formats = [format.name for format in FORMATS if format.name != "HEIF"]
    brands = data[8 : min(int.from_bytes(data[:4], "big"), 256)] if data[4:8] == b"ftyp" else b""
    if b"avif" not in brands and b"avis" not in brands and any(each in brands for each in (b"hei", b"hev", b"mif1")):
        if not load_heif():
            raise UnreadableError("HEIC is read with pillow-heif; pip install 'flowsr[heif]'.")
        formats = ["HEIF"]
    image = PIL.Image.open(io.BytesIO(data), formats=formats)
    if frame:
        image.seek(frame)
    return image


def load_heif() -> bool:
    """Adds HEIF to Pillow's formats, if pillow-heif is there."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def decode(data: bytes, max_pixels: int) -> PictureFile:
    image = open_image(data)
    picture = PictureFile([], image.format)
    if data[:2] == b"\xff\xd8" and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
        raise UnreadableError(f"refused as a JPEG of {scans} scans; at most {MAX_SCANS} are read.")
    check_size(image, image.width * image.height, max_pixels)
    frames = getattr(image, "n_frames", 1)
    if image.format == "MPO":
        picture.format = "JPEG"
        picture.notes.append(f"holds {frames} pictures (MPO), of which the first, the photo, is taken")
        frames = 1
    elif image.format == "HEIF" and frames > 1:
        picture.notes.append(f"holds {frames} pictures, of which the main one is taken")
        frames = 1
    if frames > MAX_FRAMES:
        raise UnreadableError(f"holds {frames} frames; at most {MAX_FRAMES} are read.")
    if image.info.get("default_image"):
        raise UnreadableError("an animation with another picture in front, for programs that cannot show it.")
    pixels, tiff_orientation = 0, image.tag_v2.get(ORIENTATION) if image.format == "TIFF" else None
    for number in range(frames):
        if frames > 1:
            image.seek(number)
        pixels += image.width * image.height
        check_size(image, pixels * (1 if image.format == "TIFF" else frames), max_pixels)
        picture.frames.append(pixels_of(image, data, number))
        if frames > 1 and image.format != "TIFF":
            picture.durations.append(float(image.info.get("duration") or 0))
        if number == 0:
            picture.cmyk = image.mode == "CMYK"
            metadata_of(image, data, picture)
        elif (image.mode == "CMYK") != picture.cmyk:
            raise UnreadableError("holds pages in CMYK beside others; split it.")
    picture.loop = int(image.info.get("loop") or 0)
    turn(picture, image, tiff_orientation)
    if picture.durations:  # frames of an animation are of one size and kind
        sizes = {frame.shape[1::-1] for frame in picture.frames}
        if len(sizes) > 1:
            raise UnreadableError(f"an animation with frames of {len(sizes)} sizes; make them one.")
        channels = {frame.shape[2] for frame in picture.frames}
        if len(channels) > 1:
            alpha, grey = bool(channels & {2, 4}), not channels & {3, 4}
            picture.frames = [with_channels(frame, grey, alpha) for frame in picture.frames]
    return picture


def check_size(image: PIL.Image.Image, pixels: int, max_pixels: int) -> None:
    if not 0 < pixels <= max_pixels:
        raise UnreadableError(
            f"refused as too large ({image.width}x{image.height}; {pixels:,} pixels, at most {max_pixels:,} are read; "
            "raise `--max-pixels`)."
        )


def with_channels(pixels: np.ndarray, grey: bool, alpha: bool) -> np.ndarray:
    colors = 1 if pixels.shape[2] < 3 else 3
    color = pixels[..., :colors] if grey or colors == 3 else pixels[..., :1].repeat(3, axis=2)
    if not alpha:
        return color
    given = (
        pixels[..., colors:] if pixels.shape[2] > colors else np.full_like(pixels[..., :1], np.iinfo(pixels.dtype).max)
    )
    return np.concatenate([color, given], axis=2)


def pixels_of(image: PIL.Image.Image, data: bytes, frame: int) -> np.ndarray:
    """Decodes the frame that an open picture stands at: `(h, w, c)` of uint8 or uint16, nothing cut to 8 bits."""
    depth = bits_per_channel(image, data)
    tile = image.tile[0] if image.tile else None
    raw = raw_mode(tile) if tile else ""
    if image.format in ("PNG", "TIFF") and ";16" in raw and not raw.startswith("I;16"):
        if image.format == "PNG" and getattr(image, "n_frames", 1) > 1:
            raise UnreadableError("an animation of 16 bits per colour channel; convert it to 8 bits first.")
        if image.format == "TIFF" and image.tag_v2.get(284, 1) == 2:
            raise UnreadableError("16 bits per colour channel, each channel stored apart; store them together.")
        return decode_deep(image, data, frame, raw)
    if depth > 8 and image.format == "HEIF":
        import pillow_heif

        deep = pillow_heif.open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)  # its values fill 16 bits
        if deep.mode in ("RGB;16", "RGBA;16"):
            return np.array(deep)
    if depth > 8 and image.mode not in ("I;16", "I;16B", "I;16L", "I"):
        raise UnreadableError(
            f"{depth} bits per colour channel in a {image.format}; convert it to a 16-bit PNG or TIFF."
        )
    image.load()
    mode, info = image.mode, image.info
    if mode.startswith("I"):
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65535:
            raise UnreadableError(f"holds greys of {grey.min()}..{grey.max()}; only 0..65535 can be read.")
        grey = grey.astype(np.uint16)[..., None]
        return with_transparent(grey, info.get("transparency"))
    if mode in ("1", "L", "LA", "RGB", "RGBA", "CMYK"):
        work = mode.replace("1", "L")
    else:
        work = {"La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "PA": "RGBA", "P": "RGB", "YCbCr": "RGB"}.get(mode)
    if work is None:
        raise UnreadableError(f"holds {mode} values, which have no defined way to RGB; convert it first.")
    if info.get("transparency") is not None and work in ("L", "RGB"):
        work = {"L": "LA", "RGB": "RGBA"}[work]
    array = np.array(image if mode == work else image.convert(work))
    return array if array.ndim == 3 else array[..., None]


def raw_mode(tile: tuple) -> str:
    args = tile[3]
    return args if isinstance(args, str) else str(args[0]) if args else ""


def decode_deep(image: PIL.Image.Image, data: bytes, frame: int, raw: str) -> np.ndarray:
    """16-bit colour, of which Pillow keeps a byte: decoded once for it, once as if of the other byte order."""
    if raw == "LA;16B":  # four bytes a pixel, as RGBA has them
        image.tile = [with_raw_mode(tile, "RGBA") for tile in image.tile]
        image.load()
        high_low = np.array(image).astype(np.uint16)
        return high_low[..., 0::2] << 8 | high_low[..., 1::2]
    kind, order = raw.split(";16")
    order = {"N": "L" if sys.byteorder == "little" else "B"}.get(order, order)
    halves = []
    for byte_order in (order, {"L": "B", "B": "L"}[order]):
        image = open_image(data, frame)
        image.tile = [with_raw_mode(tile, f"{kind.replace('a', 'A')};16{byte_order}") for tile in image.tile]
        image.load()
        halves.append(np.array(image).astype(np.uint16))
    pixels = halves[0] << 8 | halves[1]
    if kind == "RGBa":  # premultiplied
        alpha = np.maximum(pixels[..., 3:], 1).astype(np.float64)
        pixels[..., :3] = np.minimum(np.round(pixels[..., :3] * (65535 / alpha)), 65535)
    return with_transparent(pixels, image.info.get("transparency"))


def with_raw_mode(tile: tuple, raw: str) -> tuple:
    args = raw if isinstance(tile[3], str) else (raw, *tile[3][1:])
    return type(tile)(*tile[:3], args)


def with_transparent(pixels: np.ndarray, color: int | tuple | None) -> np.ndarray:
    """Alpha 0 where pixels have the one colour that a 16-bit PNG calls transparent."""
    if color is None or pixels.shape[2] not in (1, 3):
        return pixels
    opaque = (pixels != np.array(color, dtype=np.int64)).any(axis=2, keepdims=True)
    return np.concatenate([pixels, opaque.astype(np.uint16) * 65535], axis=2)


def bits_per_channel(image: PIL.Image.Image, data: bytes) -> int:
    """Of formats that Pillow cuts to 8 bits in silence."""
    if image.format == "JPEG2000":
        start = data.find(b"\xff\x4f\xff\x51") + 4
        (count,) = struct.unpack_from(">H", data, start + 36)
        return max((data[start + 38 + 3 * number] & 0x7F) + 1 for number in range(min(count, 4)))
    if image.format == "AVIF":
        found = data.find(b"av1C")
        return 10 if found >= 0 and data[found + 6] & 0x40 else 8
    return int(image.info.get("bit_depth") or 8) if image.format == "HEIF" else 8


def turn(picture: PictureFile, image: PIL.Image.Image, tiff_orientation: int | None) -> None:
    """Turns the frames upright, as the EXIF orientation says, which then says 1."""
    if image.format == "HEIF":  # whose reader turns it
        return
    try:
        orientation = tiff_orientation or image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF says nothing
        orientation = 1
    turned = {
        2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1], 7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }.get(orientation)  # fmt: skip
    if turned is None:
        return
    if image.format != "TIFF":  # whose reader turns the pixels alone
        picture.frames = [np.ascontiguousarray(turned(frame)) for frame in picture.frames]
    if orientation > 4 and picture.resolution:
        picture.resolution = picture.resolution[::-1]
    if picture.exif:
        picture.exif = update_exif(picture.exif, picture.frames[0].shape[1::-1], 1)


def metadata_of(image: PIL.Image.Image, data: bytes, picture: PictureFile) -> None:
    """What is in a decoded file beside the pixels; what is damaged is left out, with a note."""
    info = image.info
    try:
        exif = tiff_exif(image) if image.format == "TIFF" else exif_of(image)
        if exif:
            picture.exif = update_exif(exif, picture.frames[0].shape[1::-1], 1)
    except Exception:
        picture.notes.append("its EXIF is damaged and is left out")
    profile = info.get("icc_profile") or b""
    if profile and (len(profile) < 132 or profile[36:40] != b"acsp"):
        picture.notes.append("its ICC profile is damaged and is left out")
    elif profile:
        picture.icc_profile = bytes(profile)
    xmp = info.get("xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else bytes(xmp).rstrip(b"\0")
    if xmp:
        try:
            xmp = xmp.decode()
            if "</rdf:RDF>" not in xmp:
                raise ValueError
            xmp = re.sub(r'(tiff:Orientation=["\'])[1-8]', r"\g<1>1", xmp)
            picture.xmp = re.sub(r"(<tiff:Orientation>)[1-8]", r"\g<1>1", xmp).encode()
        except ValueError:
            picture.notes.append("its XMP is damaged and is left out")
    try:
        resolution = tuple(float(each) for each in info["dpi"])
        if len(resolution) == 2 and all(math.isfinite(each) and 0.1 < each < 1e5 for each in resolution):
            picture.resolution = resolution
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        pass
    comment = info.get("comment") or b""
    picture.comment = comment.encode() if isinstance(comment, str) else bytes(comment)
    if image.format == "PNG":
        ours = ("XML:com.adobe.xmp", "Raw profile type exif", "Raw profile type APP1")
        picture.text = {key: value for key, value in image.text.items() if key not in ours}
        picture.colour_space = color_chunks(data)
    if picture.format == "JPEG":
        for name, content in getattr(image, "applist", []):
            if content.startswith(KEPT_SEGMENTS):
                marker = bytes([0xFF, 0xE0 + int(name[3:])])
                picture.segments += marker + struct.pack(">H", len(content) + 2) + content
    others = others_of(image, data)
    if others:
        picture.notes.append(f"its {', '.join(others)} cannot be kept")


def others_of(image: PIL.Image.Image, data: bytes) -> list[str]:
    """Names of what stands in a file beside the pixels and all that is read from it."""
    if image.format in ("JPEG", "MPO"):
        known = (*KEPT_SEGMENTS, *READ_SEGMENTS)
        found = [
            f"{name} segment" for name, content in image.applist if not content.startswith(known) and name != "COM"
        ]
    elif image.format == "PNG":
        found = [f"{name} chunk" for name in png_chunks(data) if name not in READ_CHUNKS]
    elif image.format == "TIFF":
        known = {*TIFF_TAGS, *LAYOUT_TAGS, EXIF_IFD, GPS_IFD, XMP_TAG, ICC_TAG}
        found = [f"tag {tag}" for tag in sorted(image.tag_v2) if tag not in known]
    else:
        found = []
    found = list(dict.fromkeys(found))
    return found if len(found) <= 5 else [*found[:5], f"{len(found) - 5} others"]


def png_chunks(data: bytes) -> list[str]:
    names, at = [], 8
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        names.append(name.decode("latin-1") if name.isalpha() else "damaged")
        at += size + 12
    return names


def exif_of(image: PIL.Image.Image) -> bytes:
    exif = image.info.get("exif") or b""
    if not exif and "Raw profile type exif" in image.info:
        exif = image.getexif().tobytes()
    exif = bytes(exif)
    return exif.removeprefix(b"Exif\0\0")


def tiff_exif(image: PIL.Image.Image) -> bytes:
    """What a TIFF says of its picture, as EXIF."""
    found, kept = image.getexif(), PIL.Image.Exif()
    kept.update({tag: found[tag] for tag in TIFF_TAGS if tag in found})
    for tag in (EXIF_IFD, GPS_IFD):
        values = dict(found.get_ifd(tag))
        if values:
            kept.get_ifd(tag).update(values)
    return kept.tobytes().removeprefix(b"Exif\0\0") if len(kept) or any(kept._ifds.values()) else b""


def update_exif(exif: bytes, size: tuple[int, int], scale: int) -> bytes:
    """EXIF with the size in pixels, orientation 1 and the resolution times `scale`; every other byte as it is.

    Raises:
        ValueError: for an EXIF that is damaged.
    """
    parsed = parse_exif(exif)
    dict(parsed), parsed.tobytes()  # whatever is wrong with a value comes to light here
    data = bytearray(exif)
    order = {b"II": "<", b"MM": ">"}[exif[:2]]

    def walk(start: int) -> None:
        (count,) = struct.unpack_from(order + "H", data, start)
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, number, value = struct.unpack_from(order + "HHII", data, at)
            if tag == ORIENTATION and kind == 3:
                struct.pack_into(order + "H", data, at + 8, 1)
            elif tag in WIDTHS + HEIGHTS and kind in (3, 4) and number == 1:
                struct.pack_into(order + "HII", data, at + 2, 4, 1, size[tag in HEIGHTS])
            elif tag in (X_RESOLUTION, Y_RESOLUTION) and kind == 5:
                above, below = struct.unpack_from(order + "II", data, value)
                if above * scale < 2**32:
                    struct.pack_into(order + "I", data, value, above * scale)
            elif tag == EXIF_IFD and start == first:
                walk(value)

    try:
        (first,) = struct.unpack_from(order + "I", data, 4)
        walk(first)
    except struct.error as error:
        raise ValueError(f"EXIF is damaged ({error}).") from None
    return bytes(data)


def parse_exif(exif: bytes) -> PIL.Image.Exif:
    """EXIF as Pillow has it; cameras write slips that it warns of and reads over."""
    parsed = PIL.Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parsed.load(exif)
        for directory in (EXIF_IFD, GPS_IFD):
            parsed.get_ifd(directory)
    return parsed


def color_chunks(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG that say what its numbers mean as colours."""
    found, at = {}, 8
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"IDAT":
            break
        if COLOR_CHUNKS.get(name) == size:
            found[name] = data[at + 8 : at + 8 + size]
        at += size + 12
    return found


# How a picture was made.


def with_provenance(picture: PictureFile, facts: dict[str, object]) -> PictureFile:
    """The picture with `facts` in its XMP, in the namespace `flowsr`; those of an earlier upscaling are replaced."""
    packet = picture.xmp.decode() or (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    )
    packet = re.sub(r'<rdf:Description [^>]*xmlns:flowsr="[^>]*/>', "", packet)
    about = re.search(r"rdf:about=(\"[^\"]*\"|'[^']*')", packet)
    written = "".join(f" flowsr:{key}={quoteattr(str(value))}" for key, value in facts.items())
    about = about[1] if about else '""'
    made = f'<rdf:Description rdf:about={about} xmlns:flowsr="{NAMESPACE}"{written}/>'
    start, end = packet.rsplit("</rdf:RDF>", 1)
    return replace(picture, xmp=f"{start}{made}</rdf:RDF>{end}".encode())


# Writing.


def format_of(path: str | Path) -> Format:
    """The format that a name stands for.

    Raises:
        ValueError: for a name without the suffix of a format that can be written.
    """
    suffix = Path(path).suffix.lower()
    for format in WRITTEN:
        if suffix in format.suffixes:
            if format.name == "HEIF" and not load_heif():
                raise ValueError(f"{path}: HEIC is written with pillow-heif; pip install 'flowsr[heif]'.")
            return format
    if suffix == ".gif":
        raise ValueError(
            f"{path}: a GIF holds 256 colours a frame, fewer than an upscaled picture has; flowsr writes animations "
            "as PNG, WebP or AVIF: choose with `--format`."
        )
    raise ValueError(f"{path}: flowsr writes {', '.join(suffix for each in WRITTEN for suffix in each.suffixes)}.")


def check_target(picture: PictureFile, path: str | Path, scale: int = 1, quality: int | None = None) -> list[str]:
    """Says before any work whether a format can hold a picture, and what it would leave out.

    Args:
        picture: as it was read.
        path: where the result is to go; its suffix says the format.
        scale (`int`): pixels of the result per pixel of `picture`.
        quality (`int` in 1..100, *optional*): of lossy compression.

    Returns:
        `list[str]`: in words, what beside the pixels the format does not keep.

    Raises:
        ValueError: if the format cannot hold the picture.
    """
    path, format = Path(path), format_of(path)
    modes = format.deep if picture.bits == 16 else format.modes
    if picture.mode not in modes:
        kind = {"L": "grey", "LA": "grey with alpha", "RGB": "colour", "RGBA": "colour with alpha"}
        kind = f"{kind.get(picture.mode, picture.mode)} of {picture.bits} bits"
        fitting = [each.name for each in WRITTEN if picture.mode in (each.deep if picture.bits == 16 else each.modes)]
        raise ValueError(f"{path}: {format.name} cannot hold {kind}; choose {' or '.join(fitting)}.")
    if len(picture.frames) > 1:
        many = f"{len(picture.frames)} frames"
        if not format.frames:
            fitting = " or ".join(each.name for each in WRITTEN if each.frames)
            raise ValueError(f"{path}: {format.name} cannot hold {many}; choose {fitting}.")
        if not picture.durations and format.name != "TIFF":
            raise ValueError(f"{path}: {format.name} cannot hold {many} that are pages; choose TIFF.")
        if picture.durations and format.name == "TIFF":
            raise ValueError(f"{path}: TIFF cannot hold {many} of an animation; choose PNG, WEBP or AVIF.")
        for duration in picture.durations if format.name == "PNG" else []:  # seconds as two 16-bit numbers
            if Fraction(duration / 1000).limit_denominator(65535).numerator > 65535:
                raise ValueError(f"{path}: PNG cannot hold a frame of {duration:g} ms; choose WEBP or AVIF.")
    height, width = (scale * max(frame.shape[axis] for frame in picture.frames) for axis in (0, 1))
    if max(height, width) > format.side:
        raise ValueError(f"{path}: {format.name} cannot hold {width}x{height}; at most {format.side} a side.")
    size = scale**2 * sum(frame.nbytes for frame in picture.frames)
    if format.name in ("TIFF", "BMP") and size > 0.99 * 2**32:
        raise ValueError(f"{path}: {format.name} cannot hold {size:,} bytes of pixels; at most 4 GiB: choose PNG.")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"`--quality` must be in 1..100, got {quality}.")
    if quality is not None and format.quality is None and format.name != "WEBP":
        raise ValueError(f"{path}: {format.name} is written without a loss and has no `--quality`; leave it.")
    lost = left_out(picture, format)
    return [f"{format.name} does not keep {', '.join(lost)}"] if lost else []


def check_place(path: Path) -> None:
    """Raises a ValueError for a name that no file can be written under."""
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{path}: {folder} is a file, not a folder.")
    # os.access judges by the effective user where it can.
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"{path}: no permission to write to {folder}.")
    longest = os.pathconf(folder, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    if len(os.fsencode(path.name)) > longest:
        raise ValueError(f"{path}: the name is longer than the {longest} bytes that the file system takes.")
    if path.is_dir():
        raise ValueError(f"{path}: a folder has this name.")


def held(picture: PictureFile) -> dict[str, object]:
    """What a picture holds beside its pixels, by the names of `Format.keeps`."""
    return {
        "EXIF": picture.exif, "ICC profile": picture.icc_profile, "XMP": picture.xmp, "text": picture.text,
        "resolution": picture.resolution, "comment": picture.comment, "colour space": picture.colour_space,
        "IPTC": picture.segments,
    }  # fmt: skip


def left_out(picture: PictureFile, format: Format) -> list[str]:
    """Names of what a picture holds and a format does not keep, or not of that length."""
    parts = held(picture)
    lost = [name for name, value in parts.items() if value and name not in format.keeps]
    if format.name == "JPEG":  # one segment each
        longest = {"EXIF": 65533 - 8, "XMP": 65533 - 29, "comment": 65533}
        lost += [f"{name} of {len(parts[name]):,} bytes" for name in longest if len(parts[name]) > longest[name]]
    return lost


def write_file(picture: PictureFile, path: str | Path, quality: int | None = None) -> None:
    """Writes a picture in the format of its suffix, with what the format keeps of all it holds.

    The file appears under its name only when it is complete. Compression is lossless where the format has it; JPEG,
    AVIF and HEIC are written at quality 95 without chroma subsampling, WebP with a loss only if `quality` is given.

    Raises:
        ValueError: if the format cannot hold the picture.
    """
    path = Path(path)
    check_target(picture, path, quality=quality)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".flowsr-", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of slips in EXIF, which is written as it was
            encode(picture, file, format_of(path), quality)
        os.chmod(partial, 0o666 & ~current_umask())
        os.replace(partial, path)
    except Exception as error:  # encoders raise as many kinds as decoders
        if getattr(error, "errno", None):  # of the system: a full disk, not the picture
            raise
        raise ValueError(f"{path}: cannot be written as {format_of(path).name} ({one_line(error)}).") from error
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def encode(picture: PictureFile, file: BinaryIO, format: Format, quality: int | None = None) -> None:
    """Writes a picture that `check_target` has let pass to an open file."""
    lost = {name.split(" of ")[0] for name in left_out(picture, format)}
    kept = {name: value for name, value in held(picture).items() if value and name not in lost}
    if format.name == "TIFF":
        encode_tiff(picture, kept, file)
        return
    options: dict[str, object] = {}
    for name, option in (("EXIF", "exif"), ("ICC profile", "icc_profile"), ("XMP", "xmp"), ("comment", "comment")):
        if name in kept:
            options[option] = kept[name]
    if "EXIF" in kept and format.name == "JPEG":
        options["exif"] = b"Exif\0\0" + kept["EXIF"]
    if "resolution" in kept:
        options["dpi"] = tuple(kept["resolution"])
    if format.quality is not None:
        options["quality"] = quality or format.quality
    if format.name == "JPEG":
        options |= {"subsampling": 0, "extra": picture.segments}
        if max(options.get("dpi", (0,))) >= 65535.5:
            del options["dpi"]
    elif format.name == "WEBP":
        options |= {"exact": True, **({"quality": quality} if quality else {"lossless": True})}
    elif format.name == "AVIF":
        options["subsampling"] = "4:4:4"
    elif format.name == "HEIF":
        options["chroma"] = 444
    elif format.name == "PNG":
        options["pnginfo"] = png_info(kept)
        for name in ("xmp", "comment"):
            options.pop(name, None)
        if picture.bits == 16:
            encode_png16(picture.frames[0], file, options)
            return
    images = [as_image(frame, picture) for frame in picture.frames]
    if len(images) > 1:
        durations = [round(each) for each in picture.durations]
        options |= {"save_all": True, "append_images": images[1:], "duration": durations, "loop": picture.loop}
    images[0].save(file, format=format.name, **options)


def as_image(frame: np.ndarray, picture: PictureFile) -> PIL.Image.Image:
    """A frame of 8 bits, or of 16 bits and one channel, as PIL has it."""
    frame = frame[..., 0] if frame.shape[2] == 1 else frame
    return PIL.Image.fromarray(frame, "CMYK") if picture.cmyk else PIL.Image.fromarray(frame)


def png_info(kept: dict) -> PIL.PngImagePlugin.PngInfo:
    info = PIL.PngImagePlugin.PngInfo()
    for name, content in kept.get("colour space", {}).items():
        info.add(name, content)
    if "XMP" in kept:
        info.add_itxt("XML:com.adobe.xmp", kept["XMP"].decode())
    text = dict(kept.get("text", {}))
    if "comment" in kept:
        text.setdefault("Comment", kept["comment"].decode("utf-8", "replace").replace("\0", ""))
    for key, value in text.items():
        if isinstance(value, PIL.PngImagePlugin.iTXt):
            info.add_itxt(key, value, value.lang or "", value.tkey or "")
        else:
            info.add_text(key, value)
    return info


def encode_png16(pixels: np.ndarray, file: BinaryIO, options: dict) -> None:
    """A PNG of 16 bits per channel; Pillow, which has none in colour, writes all chunks but the picture's own two."""
    height, width, channels = pixels.shape
    frame = io.BytesIO()
    PIL.Image.new(("L", "LA", "RGB", "RGBA")[channels - 1], (1, 1)).save(frame, format="PNG", **options)
    data, at = frame.getvalue(), 8

    def chunk(name: bytes, *contents: bytes) -> None:
        content = b"".join(contents)
        file.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))

    file.write(data[:8])
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if name == b"IHDR":
            chunk(b"IHDR", struct.pack(">II", width, height), b"\x10", data[at + 17 : at + 21])
        elif name == b"IDAT":
            compressor, above = zlib.compressobj(6), np.zeros((1, width * channels * 2), np.uint8)
            for start in range(0, height, 64):
                rows = pixels[start : start + 64].astype(">u2", order="C").view(np.uint8)
                rows = rows.reshape(-1, width * channels * 2)
                chunk(b"IDAT", compressor.compress(paeth(rows, above, 2 * channels)))
                above = rows[-1:]
            chunk(b"IDAT", compressor.flush())
        else:
            file.write(data[at : at + size + 12])
        at += size + 12


def paeth(rows: np.ndarray, above: np.ndarray, step: int) -> bytes:
    """Rows of bytes, each behind a 4, less what filter 4 of the PNG specification (section 9.4) predicts for them.

    Args:
        rows: `(n, bytes)`.
        above: `(1, bytes)`, the row over the first.
        step: bytes per pixel.
    """
    up = np.concatenate([above, rows[:-1]]).astype(np.int16)
    left, up_left = (np.pad(each, ((0, 0), (step, 0)))[:, :-step].astype(np.int16) for each in (rows, up))
    to_left, to_up, to_up_left = abs(up - up_left), abs(left - up_left), abs(left + up - 2 * up_left)
    near = np.where((to_left <= to_up) & (to_left <= to_up_left), left, np.where(to_up <= to_up_left, up, up_left))
    filtered = np.full((len(rows), rows.shape[1] + 1), 4, np.uint8)
    filtered[:, 1:] = rows - near.astype(np.uint8)
    return filtered.tobytes()


def encode_tiff(picture: PictureFile, kept: dict, file: BinaryIO) -> None:
    """A TIFF of 8 or 16 bits per channel, a page per frame, compressed by Deflate with horizontal differences."""
    file.write(b"II*\0")
    link, position = 4, 8  # of the pointer to the next page; of the end of the file
    file.write(struct.pack("<I", 0))
    for pixels in picture.frames:
        height, width, channels = pixels.shape
        rows = max(1, 2**18 // pixels[:1].nbytes)
        strips = []
        for start in range(0, height, rows):
            strip = pixels[start : start + rows].copy()
            strip[:, 1:] -= pixels[start : start + rows, :-1]  # wraps around, as TIFF 6.0 (section 14) has it
            strips.append(zlib.compress(strip.astype(strip.dtype.newbyteorder("<")).tobytes()))
        sizes = [len(strip) for strip in strips]
        page = PIL.TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
        if "EXIF" in kept:
            exif = parse_exif(kept["EXIF"])
            for tag in TIFF_TAGS:
                if tag in exif:
                    page[tag] = exif[tag]
            for tag in (EXIF_IFD, GPS_IFD):
                if values := dict(exif.get_ifd(tag)):
                    page[tag] = values
        page[256], page[257], page[258] = width, height, (8 * pixels.itemsize,) * channels
        page[259], page[317] = 8, 2
        page[262] = 5 if picture.cmyk else 2 if channels > 2 else 1
        if channels in (2, 4) and not picture.cmyk:
            page[338] = 2  # alpha, not multiplied into the colour
        page[277], page[278], page[284], page[279] = channels, rows, 1, tuple(sizes)
        page[273] = tuple(int(offset) for offset in np.cumsum([0, *sizes[:-1]]))  # Pillow adds where they begin
        page.tagtype[273] = page.tagtype[279] = 4
        if "resolution" in kept:
            page[282], page[283], page[296] = *kept["resolution"], 2
        for name, tag, kind in (("XMP", XMP_TAG, 1), ("ICC profile", ICC_TAG, 7)):
            if name in kept:
                page[tag], page.tagtype[tag] = kept[name], kind
        if position % 2:
            file.write(b"\0")
            position += 1
        file.seek(link)
        file.write(struct.pack("<I", position))
        file.seek(position)
        directory = page.tobytes(position)
        file.write(directory + b"".join(strips))
        link = position + 2 + 12 * len(page)
        position += len(directory) + sum(sizes)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


# Stills as PIL pictures.


def as_rgb(picture: PictureFile) -> PIL.Image.Image:
    """The first frame in 8-bit RGB, for looking at."""
    frame = picture.frames[0] if picture.bits == 8 else (picture.frames[0] / 257).round().astype(np.uint8)
    return as_image(frame, picture).convert("RGB")


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
    picture.exif = update_exif(exif, image.size, 1) if exif else b""
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
