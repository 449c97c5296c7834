"""Pictures to files: what a format cannot hold is refused before any work; a file is written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import math
import os
import socket
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import PIL.TiffImagePlugin
import psutil

from flowsr.picture_file import (
    EXIF_IFD,
    GPS_IFD,
    ICC_TAG,
    TIFF_TAGS,
    WRITTEN,
    XMP_TAG,
    Format,
    PictureFile,
    as_image,
    held,
    load_heif,
    one_line,
    parse_exif,
)

PARTIAL = ".partial"  # suffix of files that are being written
TIFF_BYTES = int(0.99 * 2**32)  # of pixels in a TIFF that is no BigTIFF


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


def check_target(
    picture: PictureFile,
    path: str | Path,
    size_of: Callable[[int, int], tuple[int, int]] = lambda height, width: (height, width),
    quality: int | None = None,
) -> list[str]:
    """Says before any work whether a format can hold a picture, and what it would leave out.

    Args:
        picture: as it was read.
        path: where the result is to go; its suffix says the format.
        size_of: height and width of the result, of those of a frame; by default the same.
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
    sizes = [size_of(*frame.shape[:2]) for frame in picture.frames]
    height, width = (max(each) for each in zip(*sizes))
    if max(height, width) > format.side:
        raise ValueError(f"{path}: {format.name} cannot hold {width}x{height}; at most {format.side} a side.")
    samples = sum(math.prod(size) * frame.shape[2] for size, frame in zip(sizes, picture.frames))
    size = samples * picture.bits // 8
    if format.name == "BMP" and size > 0.99 * 2**32:
        raise ValueError(f"{path}: BMP cannot hold {size:,} bytes of pixels; at most 4 GiB: choose PNG or TIFF.")
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
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=partial_prefix(os.getpid()), suffix=PARTIAL)
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


def partial_prefix(pid: int | str) -> str:
    """How a process of this machine begins the names of files that it has not finished."""
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f".flowsr-{host}-{pid}-"


def remove_unfinished(folder: Path) -> None:
    """Removes what processes of this machine left unfinished below a folder when they were killed."""
    before, after = partial_prefix("*").split("*")
    for partial in folder.rglob(f"{before}*{after}*{PARTIAL}"):
        pid = partial.name.removeprefix(before).split(after)[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            partial.unlink(missing_ok=True)


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
        if picture.bits == 16 or not isinstance(picture.frames[0], np.ndarray):
            encode_png(picture.frames[0], file, options)
            return
    images = [as_image(frame, picture) for frame in picture.frames]
    if len(images) > 1:
        durations = [round(each) for each in picture.durations]
        options |= {"save_all": True, "append_images": images[1:], "duration": durations, "loop": picture.loop}
    images[0].save(file, format=format.name, **options)


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


def encode_png(pixels: np.ndarray, file: BinaryIO, options: dict) -> None:
    """A PNG whose rows are asked for one after the other, of 8 or 16 bits per channel.

    Pillow, which takes whole pictures and none of 16 bits in colour, writes all chunks but the picture's own two.
    """
    (height, width, channels), size_of = pixels.shape, pixels.dtype.itemsize
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
            depth = struct.pack("B", 8 * size_of)
            chunk(b"IHDR", struct.pack(">II", width, height), depth, data[at + 17 : at + 21])
        elif name == b"IDAT":
            compressor, above = zlib.compressobj(6), np.zeros((1, width * channels * size_of), np.uint8)
            count = rows_at_once(pixels)
            for start in range(0, height, count):
                rows = pixels[start : start + count].astype(f">u{size_of}", order="C").view(np.uint8)
                rows = rows.reshape(-1, width * channels * size_of)
                chunk(b"IDAT", compressor.compress(paeth(rows, above, size_of * channels)))
                above = rows[-1:]
            chunk(b"IDAT", compressor.flush())
        else:
            file.write(data[at : at + size + 12])
        at += size + 12


def rows_at_once(pixels: np.ndarray) -> int:
    """How many rows are asked for and compressed together: about a quarter of a MiB."""
    _, width, channels = pixels.shape
    return max(1, 2**18 // (width * channels * pixels.dtype.itemsize))


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
    """A TIFF of 8 or 16 bits per channel, a page per frame, compressed by Deflate with horizontal differences.

    Pillow writes the directories. Rows are asked for one after the other, and a file that may pass 4 GiB is a BigTIFF.
    """
    big = sum(frame.nbytes for frame in picture.frames) > TIFF_BYTES
    header = b"II+\0\x08\0\0\0" if big else b"II*\0"
    word, integer, entry = ("<Q", 16, 20) if big else ("<I", 4, 12)  # of a position, as tag and in the file
    link = len(header)  # of the pointer to the next page
    position = link + struct.calcsize(word)  # of the end of the file
    file.write(header + struct.pack(word, 0))
    for pixels in picture.frames:
        (height, width, channels), size_of = pixels.shape, pixels.dtype.itemsize
        rows = rows_at_once(pixels)
        page = PIL.TiffImagePlugin.ImageFileDirectory_v2(header.ljust(16 if big else 8, b"\0"))
        if "EXIF" in kept:
            exif = parse_exif(kept["EXIF"])
            for tag in TIFF_TAGS:
                if tag in exif:
                    page[tag] = exif[tag]
            for tag in (EXIF_IFD, GPS_IFD):
                if values := dict(exif.get_ifd(tag)):
                    page[tag] = values
        page[256], page[257], page[258] = width, height, (8 * size_of,) * channels
        page[259], page[317] = 8, 2
        page[262] = 5 if picture.cmyk else 2 if channels > 2 else 1
        if channels in (2, 4) and not picture.cmyk:
            page[338] = 2  # alpha, not multiplied into the colour
        page[277], page[278], page[284] = channels, rows, 1
        if "resolution" in kept:
            page[282], page[283], page[296] = *kept["resolution"], 2
        for name, tag, kind in (("XMP", XMP_TAG, 1), ("ICC profile", ICC_TAG, 7)):
            if name in kept:
                page[tag], page.tagtype[tag] = kept[name], kind
        if position % 2:
            file.write(b"\0")
            position += 1
        file.seek(link)
        file.write(struct.pack(word, position))
        sizes = [0] * math.ceil(height / rows)
        file.seek(position)
        file.write(directory := tiff_directory(page, sizes, position, integer))  # holds its place
        for number in range(len(sizes)):
            strip = pixels[number * rows : (number + 1) * rows]
            differences = strip.copy()
            differences[:, 1:] -= strip[:, :-1]  # wraps around, as TIFF 6.0 (section 14) has it
            packed = zlib.compress(differences.astype(strip.dtype.newbyteorder("<")).tobytes())
            file.write(packed)
            sizes[number] = len(packed)
        file.seek(position)
        file.write(tiff_directory(page, sizes, position, integer))
        file.seek(0, os.SEEK_END)
        link = position + (8 if big else 2) + entry * len(page)
        position += len(directory) + sum(sizes)


def tiff_directory(
    page: PIL.TiffImagePlugin.ImageFileDirectory_v2, sizes: list[int], position: int, integer: int
) -> bytes:
    """The directory of a page at `position`, with the strips of these sizes right behind it.

    Args:
        integer: tag type of sizes and positions: 4 of a TIFF, 16 of a BigTIFF.
    """
    page[279] = tuple(sizes)
    page[273] = tuple(int(offset) for offset in np.cumsum([0, *sizes[:-1]]))  # Pillow adds where they begin
    page.tagtype[273] = page.tagtype[279] = integer
    return page.tobytes(position)


def current_umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
