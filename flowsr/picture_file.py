"""What a picture file holds and what a format can hold; pixels, and what stands beside them, changed together."""

from __future__ import annotations

import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from xml.sax.saxutils import quoteattr

import numpy as np
import PIL.Image

MAX_PIXELS = 2**29  # of a result, all frames together: 32 megapixels of input at x4
ORIENTATION, EXIF_IFD, GPS_IFD, XMP_TAG, ICC_TAG = 0x0112, 0x8769, 0x8825, 700, 34675
X_RESOLUTION, Y_RESOLUTION = 0x011A, 0x011B
WIDTHS, HEIGHTS = (0x0100, 0xA002), (0x0101, 0xA003)  # of the picture in IFD0 and in the EXIF IFD
# What a TIFF says of the picture rather than of its layout in the file: description, maker, model, software, date,
# artist, copyright.
TIFF_TAGS = (0x010E, 0x010F, 0x0110, 0x0131, 0x0132, 0x013B, 0x8298)
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
            PNG and TIFF are also written of what has `shape`, `dtype` and `nbytes` and makes rows `[first:last]` in
            turn.
        cmyk: the four channels are ink, 0 for none.
        notes: what was found in the file and cannot be kept, in words.
        exif, icc_profile, xmp, comment: the bytes in the file.
        text: keywords and texts of a PNG.
        resolution: pixels per inch, across and down.
        colour_space: chunks of a PNG by their names.
        segments: of a JPEG, as they are: IPTC, and XMP beyond 64 KB.
        quantization: tables of a JPEG, in zigzag or natural order, by their numbers; they are not written.
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
    quantization: dict[int, list[int]] = field(default_factory=dict)
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

    def enlarged(self, enlarge: Callable[[np.ndarray], np.ndarray]) -> PictureFile:
        """The picture with `enlarge` applied to its frames, and what it says of its size changed to fit.

        Colour under alpha 0, which is often black, is replaced by the colour beside it, which would show as a fringe
        otherwise. Ink is upscaled as ink: cyan, magenta and yellow as one picture, black as another.

        Args:
            enlarge: takes `(h, w, c)` as in `frames` and returns `(H, W, c)`, float in [0, 1] or of the same dtype,
                also as something whose rows are made when they are asked for.
        """
        frames = []
        for pixels in self.frames:
            top = np.iinfo(pixels.dtype).max
            if self.cmyk:
                large = np.concatenate([enlarge(top - pixels[..., :3]), enlarge(top - pixels[..., 3:])], axis=2)
                large = (1 if large.dtype.kind == "f" else top) - large
            else:
                large = enlarge(bleed(pixels) if pixels.shape[2] in (2, 4) else pixels)
            frames.append((large * top).round().astype(pixels.dtype) if large.dtype.kind == "f" else large)
        return self.resized(frames)

    def resized(self, frames: list[np.ndarray]) -> PictureFile:
        """The picture with frames of another size in place of its own, and what it says of its size changed to fit.

        The resolution changes as the pixels do: what is printed stays as large as it was.
        """
        size = frames[0].shape[1::-1]
        scale = tuple(Fraction(new, old) for new, old in zip(size, self.frames[0].shape[1::-1]))
        return replace(
            self,
            frames=frames,
            exif=update_exif(self.exif, size, scale) if self.exif else b"",
            resolution=self.resolution and tuple(float(s * dots) for s, dots in zip(scale, self.resolution)),
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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def load_heif() -> bool:
    """Adds HEIF to Pillow's formats, if pillow-heif is there."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def update_exif(exif: bytes, size: tuple[int, int], scale: tuple[Fraction, Fraction] = (1, 1)) -> bytes:
    """EXIF with the size in pixels, orientation 1 and the resolution times `scale`; every other byte as it is.

    Args:
        size, scale: across and down.

    Raises:
        ValueError: for an EXIF that is damaged.
    """
    parsed = parse_exif(exif)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
                scaled = above * scale[tag == Y_RESOLUTION]
                if scaled.denominator > 1:
                    scaled = (scaled / max(below, 1)).limit_denominator(2**16)
                    below = scaled.denominator
                if scaled.numerator < 2**32:
                    struct.pack_into(order + "II", data, value, scaled.numerator, below)
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


def held(picture: PictureFile) -> dict[str, object]:
    """What a picture holds beside its pixels, by the names of `Format.keeps`."""
    return {
        "EXIF": picture.exif, "ICC profile": picture.icc_profile, "XMP": picture.xmp, "text": picture.text,
        "resolution": picture.resolution, "comment": picture.comment, "colour space": picture.colour_space,
        "IPTC": picture.segments,
    }  # fmt: skip


def as_image(frame: np.ndarray, picture: PictureFile) -> PIL.Image.Image:
    """A frame of 8 bits, or of 16 bits and one channel, as PIL has it."""
    frame = frame[..., 0] if frame.shape[2] == 1 else frame
    return PIL.Image.fromarray(frame, "CMYK") if picture.cmyk else PIL.Image.fromarray(frame)
