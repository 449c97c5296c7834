"""Files to pictures: read whole, or refused in one line before anything is decoded that could hang or swell."""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import PIL.Image

from flowsr.picture_file import (
    EXIF_IFD,
    FORMATS,
    GPS_IFD,
    ICC_TAG,
    MAX_PIXELS,
    ORIENTATION,
    TIFF_TAGS,
    XMP_TAG,
    PictureFile,
    UnreadableError,
    load_heif,
    one_line,
    update_exif,
)

MAX_FRAMES = 4096
MAX_SCANS = 500  # of a JPEG: a small file of many progressive scans would keep the decoder busy for hours
COLOR_CHUNKS = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"cICP": 4}  # of a PNG, with their lengths
KEPT_SEGMENTS = (b"Photoshop 3.0\0", b"http://ns.adobe.com/xmp/extension/\0")  # of a JPEG, as they are
READ_SEGMENTS = (b"JFIF", b"JFXX", b"Exif\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0", b"MPF\0", b"Adobe")
READ_CHUNKS = (
    "IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB cICP iCCP eXIf pHYs tEXt zTXt iTXt acTL fcTL fdAT "
    "bKGD hIST sBIT tIME"  # of the old pixels: their background, palette, precision and date
).split()
# Of a TIFF: 254 to 297 and 317 to 347 describe layout, colour and resolution of the pixels, 512 to 532 a JPEG in it.
LAYOUT_TAGS = (*range(254, 270), *range(273, 298), *range(317, 348), *range(512, 533))


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
    return read_data(read_bytes(path, name, 16 * max_pixels + 2**26), name, max_pixels)  # 16 bits: 8 bytes a pixel


def read_data(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> PictureFile:
    """As [`read_file`], of the content of a file; `name` stands in errors."""
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


def shape_of(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int, int, str]:
    """Width, height, channels and dtype of the first frame of a picture file, by its header.

    Raises:
        UnreadableError: for what is no picture, or too large.
    """
    try:
        with warnings.catch_warnings(), PIL.Image.open(path) as image:
            warnings.simplefilter("ignore")
            load_heif()
            check_size(image, image.width * image.height, max_pixels)
            raw = raw_mode(image.tile[0]) if image.tile else ""
            deep = "16" in raw or image.mode.startswith("I")
            channels = {"L": 1, "1": 1, "LA": 2, "RGBA": 4, "CMYK": 4}.get(image.mode, 1 if deep else 3)
            return image.width, image.height, channels, "uint16" if deep else "uint8"
    except UnreadableError as error:
        raise UnreadableError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise many kinds for broken files
        raise UnreadableError(f"{path}: not a picture that can be read ({one_line(error)}).") from None


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


def decode(data: bytes, max_pixels: int) -> PictureFile:
    image = open_image(data)
    picture = PictureFile([], image.format, quantization=getattr(image, "quantization", {}))
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
        picture.exif = update_exif(picture.exif, picture.frames[0].shape[1::-1])


def metadata_of(image: PIL.Image.Image, data: bytes, picture: PictureFile) -> None:
    """What is in a decoded file beside the pixels; what is damaged is left out, with a note."""
    info = image.info
    try:
        exif = tiff_exif(image) if image.format == "TIFF" else exif_of(image)
        if exif:
            picture.exif = update_exif(exif, picture.frames[0].shape[1::-1])
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
