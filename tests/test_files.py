"""Picture files: each row of the table in docs/files.md, judged by other readers where there are any."""

import base64
import io
import os
import struct
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.PngImagePlugin
import png
import pytest
import tifffile
from conftest import make_pipeline, random_picture, smooth_picture
from metadata import PROFILE, XMP, exif

from flowsr import files, picture_reader
from flowsr.cli import main
from flowsr.files import FORMATS, PictureFile, UnreadableError, check_target, read_file, with_provenance, write_file
from flowsr.picture_file import NAMESPACE, WRITTEN, bleed, held, update_exif
from flowsr.pipelines.output_size import OutputSize

DOCS = Path(__file__).parents[1] / "docs/files.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_pipeline().save_pretrained(folder)
    return str(folder)


def upscale(checkpoint, *arguments):
    return main(["upscale", *[str(a) for a in arguments], "--checkpoint", checkpoint, "--steps", "1"])


def random_levels(height, width, channels, dtype=np.uint16):
    return np.random.default_rng(channels).integers(0, np.iinfo(dtype).max + 1, (height, width, channels), dtype=dtype)


def repeated(pixels):
    """Every pixel four times across and down, as `enlarged` takes it."""
    return pixels.repeat(4, axis=0).repeat(4, axis=1) / np.iinfo(pixels.dtype).max


def write_png16(path, levels, **options):
    kind = {"greyscale": levels.shape[2] < 3, "alpha": levels.shape[2] in (2, 4)}
    writer = png.Writer(levels.shape[1], levels.shape[0], bitdepth=16, **kind, **options)
    with open(path, "wb") as file:
        if options.get("interlace"):
            writer.write_array(file, levels.ravel().tolist())
        else:
            writer.write(file, levels.reshape(len(levels), -1).tolist())


def read_png16(path):
    width, height, rows, info = png.Reader(filename=str(path)).read()
    assert info["bitdepth"] == 16
    return np.array([list(row) for row in rows], dtype=np.uint16).reshape(height, width, info["planes"])


# Sixteen bits.


@pytest.mark.parametrize("interlace", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_read_and_written_to_the_bit(tmp_path, channels, interlace):
    levels = random_levels(70, 9, channels)
    write_png16(tmp_path / "a.png", levels, interlace=interlace)
    picture = read_file(tmp_path / "a.png")
    assert np.array_equal(picture.frames[0], levels)
    write_file(picture, tmp_path / "b.png")
    assert np.array_equal(read_png16(tmp_path / "b.png"), levels)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_is_read_and_written_to_the_bit(tmp_path, channels, compression, dtype):
    levels = random_levels(40, 31, channels, dtype)
    kind = {"photometric": "rgb" if channels > 2 else "minisblack", "rowsperstrip": 7, "compression": compression}
    kind |= {"planarconfig": "contig"} if channels > 1 else {}
    kind |= {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    for order in "<>":
        tifffile.imwrite(tmp_path / "a.tif", levels if channels > 1 else levels[..., 0], byteorder=order, **kind)
        picture = read_file(tmp_path / "a.tif")
        assert np.array_equal(picture.frames[0], levels)
    write_file(picture, tmp_path / "b.tif")
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif").reshape(levels.shape), levels)
    assert np.array_equal(read_file(tmp_path / "b.tif").frames[0], levels)


def test_premultiplied_16_bit_tiff_is_divided_by_its_alpha(tmp_path):
    levels = random_levels(6, 5, 4)
    levels[..., 3] = levels[..., 3] // 2 + 30000
    many = levels.astype(np.float64)
    many[..., :3] *= many[..., 3:] / 65535
    extra = {"photometric": "rgb", "planarconfig": "contig", "extrasamples": ["assocalpha"]}
    tifffile.imwrite(tmp_path / "a.tif", many.round().astype(np.uint16), **extra)
    assert np.abs(read_file(tmp_path / "a.tif").frames[0].astype(int) - levels).max() <= 2


def test_the_transparent_colour_of_a_16_bit_png_becomes_alpha(tmp_path):
    levels = random_levels(4, 5, 3)
    write_png16(tmp_path / "a.png", levels, transparent=tuple(levels[1, 2].tolist()))
    frame = read_file(tmp_path / "a.png").frames[0]
    assert np.array_equal(frame[..., :3], levels)
    assert np.argwhere(frame[..., 3] != 65535).tolist() == [[1, 2]]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_go_through_the_network(checkpoint, tmp_path, channels):
    y, x = np.mgrid[0:10, 0:12]
    levels = np.stack([20000 + 900 * x + 37 * y, 30000 + 11 * x, 9000 + 100 * y, 65535 + 0 * x], axis=2)
    write_png16(tmp_path / "a.png", levels[..., :channels].astype(np.uint16))
    assert upscale(checkpoint, tmp_path / "a.png", "-o", tmp_path / "b.png") == 0
    assert upscale(checkpoint, tmp_path / "a.png", "-o", tmp_path / "b.tif") == 0
    large = read_png16(tmp_path / "b.png")
    assert large.shape == (40, 48, channels)
    assert np.array_equal(tifffile.imread(tmp_path / "b.tif").reshape(large.shape), large)
    assert len(np.unique(large[..., 0] % 257)) > 100  # more than 8 bits widened
    pipe = make_pipeline()
    import torch

    tensor = levels[None, ..., :channels].astype(np.uint16)
    wanted = pipe(
        tensor, num_inference_steps=1, tile=256, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    assert np.array_equal(large, (wanted.images[0] * 65535).round().astype(np.uint16))


# 4x4 pixels of one colour, by imagecodecs 2026.3.6: jpeg2k_encode(levels, level=0, bitspersample=12) and
# avif_encode(levels >> 2, bitspersample=10).
JP2_12_BITS = (
    "0000CYEU2`4GM<}0000KW^{RQYH%_j00000YH%_j0000jYH%`W0000MX=r3}000040000400RpL0000001sntY;pkr000005C8xGylQYVWB*V8Q2;L"
    "h000001ONa41ONa400000000001ONa41ONa4000000009E0RamE0Sf^E|55-9000010RRL900IA800cl_|6~9q00BdCWnpw>WFTUBAWv{*Zc0!^M<8"
    "}(a&u{KZXhx)H7+#&kN^q*00000L;wN*lf&~26aZYH;-CNn2<IQ;-{4dcP)c&d;2027+EM1i^I{L_PYerB!T1G$5l~a3*Z?q(F-{}@*#"
)
AVIF_10_BITS = (
    "0000WW^{RQVRmU|00000VRmU|ZE0pPZE0a<O+hh10002%ZDn*}000000000XXk=`10000000000aA{+7000000000000000000004sdC7Z2$lO0003"
    "10016oY;R)#0000)000310RR910RR926951JBLDyZC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ00000YH4tCZ~y=ROKEUpZvX%Q6lr"
    "sCWdHyG000001ONa41ONa45O8UDX#fBK00RmN3IG5A3}JRLLxCVb000006Ju{|a&BX6cmM(b0ssJj0000NX>e^}0000000001009I60)qqq001j(W"
    "MOm?015~=1b>_e2m(Md6%YUb01x<%15wDitOvLK1xlP?iGT"
)


@pytest.mark.parametrize(("content", "bits"), [(JP2_12_BITS, 12), (AVIF_10_BITS, 10)])
def test_what_would_be_cut_to_8_bits_in_silence_is_refused(tmp_path, content, bits):
    (tmp_path / "a").write_bytes(base64.b85decode(content))
    with PIL.Image.open(tmp_path / "a") as image:
        assert (image.mode, image.size) == ("RGB", (4, 4))  # as Pillow has it, of 8 bits
    with pytest.raises(UnreadableError, match=f"{bits} bits per colour channel"):
        read_file(tmp_path / "a")


def test_heic_of_10_bits_is_read_as_such(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    y, x = np.mgrid[0:16, 0:24]
    levels = np.stack([1500 * (x + y), 900 * (x + y), 400 * (x + y)], axis=2).astype(np.uint16)
    with open(tmp_path / "a.heic", "wb") as file:
        pillow_heif.encode("RGB;16", (24, 16), levels.tobytes(), file, quality=100, chroma=444)
    picture = read_file(tmp_path / "a.heic")
    assert picture.bits == 16
    off = np.abs(picture.frames[0].astype(int) - levels)
    assert off.mean() < 257 / 3  # a third of a level of 8 bits
    with pytest.raises(ValueError, match="choose PNG or TIFF"):
        check_target(picture, "b.heic")


# Beside the pixels.


def rich(mode="RGB", bits=8):
    channels = len(mode) if mode != "CMYK" else 4
    dtype = np.uint16 if bits == 16 else np.uint8
    return PictureFile(
        [random_levels(8, 12, channels, dtype)], cmyk=mode == "CMYK", exif=exif().removeprefix(b"Exif\0\0"), xmp=XMP,
        icc_profile=PROFILE, comment=b"hello", text={"Title": "a budgie", "Ort": "Köln \u2603"},
        resolution=(300.0, 200.0),
        colour_space={b"gAMA": struct.pack(">I", 45455)}, segments=b"\xff\xed\x00\x12Photoshop 3.0\0ab",
    )  # fmt: skip


def formats(wanted=lambda format: True):
    return [pytest.param(format, id=format.name) for format in WRITTEN if wanted(format)]


def skip_without_plugin(format):
    if format.name == "HEIF":
        pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")


@pytest.mark.parametrize("format", formats())
def test_each_format_keeps_what_the_table_says(tmp_path, format):
    skip_without_plugin(format)
    picture, path = rich(), tmp_path / f"a{format.suffixes[0]}"
    notes = check_target(picture, path)
    write_file(picture.enlarged(repeated), path)
    with PIL.Image.open(path) as image:  # Pillow's reading, not ours
        image.load()
        assert image.size == (48, 32)
        info, found = image.info, set()
        inside = image.getexif()
        if inside.get(0x010F) == "a camera":
            inner = inside.get_ifd(0x8769)
            assert (inner[0xA002], inner[0xA003]) == (48, 32)
            assert inner[0x927C] == b"maker\0note"
            assert inside.get_ifd(0x8825)[2] == (51.0, 30.0, 26.0)
            if format.name != "TIFF":  # whose resolution is that of the picture
                assert inside[0x011A] == 288
            found.add("EXIF")
        found |= {"ICC profile"} if info.get("icc_profile") == PROFILE else set()
        xmp = info.get("xmp") or b""
        found |= {"XMP"} if b"a pond" in (xmp.encode() if isinstance(xmp, str) else xmp) else set()
        if "dpi" in info and np.allclose(info["dpi"], (1200, 800), rtol=1e-3):
            found.add("resolution")
        text = getattr(image, "text", {})
        found |= {"text"} if text.get("Title") == "a budgie" and text.get("Ort") == "Köln \u2603" else set()
        comment = info.get("comment") or text.get("Comment")
        found |= {"comment"} if comment in (b"hello", "hello") else set()
        found |= {"colour space"} if info.get("gamma") == 0.45455 else set()
        found |= {"IPTC"} if ("APP13", b"Photoshop 3.0\0ab") in getattr(image, "applist", []) else set()
    assert found == set(format.keeps)
    lost = ["EXIF", "ICC profile", "XMP", "text", "resolution", "comment", "colour space", "IPTC"]
    lost = [name for name in lost if name not in format.keeps]
    assert notes == ([f"{format.name} does not keep {', '.join(lost)}"] if lost else [])


@pytest.mark.parametrize("format", formats())
def test_our_reader_finds_what_our_writer_keeps(tmp_path, format):
    skip_without_plugin(format)
    path = tmp_path / f"a{format.suffixes[0]}"
    write_file(rich(), path)
    again = held(read_file(path))
    for name, value in held(rich()).items():
        if name in format.keeps and name not in ("EXIF", "resolution", "text", "comment"):
            assert again[name] == value, name
        if name in format.keeps and name in ("EXIF", "text", "comment"):
            assert again[name] or again["text"]["Comment"] == "hello"
    assert not read_file(path).notes


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("format", formats())
def test_each_format_holds_the_modes_of_the_table_and_refuses_the_others(tmp_path, format, mode, bits):
    skip_without_plugin(format)
    picture, path = rich(mode, bits), tmp_path / f"a{format.suffixes[0]}"
    if mode not in (format.modes if bits == 8 else format.deep):
        with pytest.raises(ValueError, match=f"{format.name} cannot hold .*; choose "):
            check_target(picture, path)
        with pytest.raises(ValueError, match="cannot hold"):
            write_file(picture, path)
        assert not list(tmp_path.iterdir())
        return
    write_file(picture, path)
    again = read_file(path)
    assert again.bits == bits
    levels = again.frames[0]
    wanted = picture.frames[0]
    if levels.shape[2] > wanted.shape[2]:  # grey in a format of colours
        wanted = np.concatenate([wanted[..., :1].repeat(3, axis=2), wanted[..., 1:]], axis=2)
    if format.quality is None:
        assert np.array_equal(levels, wanted)
    else:
        assert np.abs(levels.astype(int) - wanted).mean() < 12
    assert again.cmyk == picture.cmyk


def test_the_table_and_the_numbers_in_the_docs_are_those_of_the_code():
    text = DOCS.read_text()
    assert table() in text
    assert f"2 ** {files.MAX_PIXELS.bit_length() - 1} unless given" in text
    assert 2 ** (files.MAX_PIXELS.bit_length() - 1) == files.MAX_PIXELS
    assert (
        f"more than {picture_reader.MAX_FRAMES} frames, or as a JPEG of more than {picture_reader.MAX_SCANS} scans"
        in text
    )


def table() -> str:
    words = ("EXIF", "ICC profile", "XMP", "resolution", "text", "comment", "colour space", "IPTC")
    head = ["format", "suffixes", "8 bits", "16 bits", "frames", "longest side", "compression", *words]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for format in FORMATS:
        loss = "lossless" if format.quality is None else f"quality {format.quality}"
        side = f"{format.side:,}" if format.side < 2**31 - 1 else ""
        cells = [format.name, " ".join(format.suffixes), ", ".join(format.modes), ", ".join(format.deep)]
        cells += ["yes" * format.frames, side, loss] + ["yes" * (word in format.keeps) for word in words]
        cells = cells if format.modes else [*cells[:2], "read only", *[""] * (len(cells) - 3)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
def test_a_turned_picture_comes_upright_with_all_its_metadata(tmp_path, suffix):
    picture = smooth_picture(12, 8)
    turned = XMP.replace(b"dc:source", b'tiff:Orientation="6" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" dc:source')
    picture.save(tmp_path / f"a.{suffix}", exif=exif(6), icc_profile=PROFILE, quality=100, xmp=turned, dpi=(300, 200))
    read = read_file(tmp_path / f"a.{suffix}")
    wanted = np.rot90(np.asarray(picture), -1)
    assert np.abs(read.frames[0].astype(int) - wanted).mean() < 6
    kept = PIL.Image.Exif()
    kept.load(read.exif)
    assert kept.get(0x0112, 1) == 1
    assert (kept.get_ifd(0x8769)[0xA002], kept.get_ifd(0x8769)[0xA003]) == (8, 12)
    if read.xmp and b"Orientation" in read.xmp:
        assert b'tiff:Orientation="1"' in read.xmp
    if read.resolution:
        assert np.allclose(read.resolution, (200, 300), rtol=1e-3)


def test_exif_keeps_every_byte_but_the_numbers_that_changed():
    before = exif(6).removeprefix(b"Exif\0\0")
    after = update_exif(before, (48, 32), (4, 4))
    assert len(after) == len(before)
    assert sum(a != b for a, b in zip(after, before)) < 24
    assert b"maker\0note" in after


# Alpha, ink, palettes, frames.


def bicubic(pixels):
    """As the pipeline without its network: every channel for itself."""
    planes = [PIL.Image.fromarray(plane.astype(np.float32)) for plane in np.moveaxis(pixels, 2, 0)]
    size = (4 * pixels.shape[1], 4 * pixels.shape[0])
    large = np.stack([np.asarray(plane.resize(size, PIL.Image.BICUBIC)) for plane in planes], axis=2)
    return (large / np.iinfo(pixels.dtype).max).clip(0, 1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_no_dark_fringe_around_a_bright_disk_on_transparent_black(dtype):
    top, (y, x) = np.iinfo(dtype).max, np.mgrid[0:33, 0:31]
    alpha = (10.5 - np.hypot(y - 16, x - 14)).clip(0, 1)
    disk = np.zeros((33, 31, 4))
    disk[alpha > 0] = [1.0, 0.8, 0.2, 0]
    disk[..., 3] = alpha
    levels = (disk * top).round().astype(dtype)
    large = PictureFile([levels]).enlarged(bicubic).frames[0] / top
    seen = large[..., 3] > 0
    assert np.abs(large[seen][:, :3] - [1.0, 0.8, 0.2]).max() < 0.01
    fringed = bicubic(levels)
    assert np.abs(fringed[fringed[..., 3] > 0.01][:, :3] - [1.0, 0.8, 0.2]).max() > 0.3  # what it would be without


def test_bleeding_leaves_all_that_can_be_seen_and_takes_colour_from_beside_it():
    levels = random_levels(20, 21, 4, np.uint8)
    levels[5:, :, 3] = 0
    after = bleed(levels)
    assert np.array_equal(after[:5], levels[:5])
    assert np.array_equal(after[..., 3], levels[..., 3])
    half = np.zeros((16, 16, 4), np.uint8)
    half[:, :8], half[:, 8:, 3] = [200, 10, 10, 255], 0
    half[:8, 15] = [10, 10, 200, 255]
    filled = bleed(half)
    assert filled[12, 8].tolist() == [200, 10, 10, 0]
    assert filled[3, 14, 2] > 100


def test_ink_is_upscaled_as_ink(tmp_path):
    levels = random_levels(6, 5, 4, np.uint8)
    large = PictureFile([levels], cmyk=True).enlarged(repeated)
    assert np.array_equal(large.frames[0][::4, ::4], levels)
    write_file(large, tmp_path / "a.tif")
    with PIL.Image.open(tmp_path / "a.tif") as image:
        assert image.mode == "CMYK"
        assert np.array_equal(np.asarray(image), large.frames[0])


def test_palettes_become_colour_with_their_transparency(tmp_path):
    image = random_picture(9, 7).quantize(16)
    image.save(tmp_path / "a.png", transparency=3)
    frame = read_file(tmp_path / "a.png").frames[0]
    assert frame.shape == (7, 9, 4)
    assert np.array_equal(frame[..., 3] == 0, np.asarray(image) == 3)
    assert np.array_equal(frame[..., :3], np.asarray(image.convert("RGB")))


def moving(alpha=False):
    frames = [random_levels(6, 7, 3 + alpha, np.uint8) // (1 + number) for number in range(3)]
    return PictureFile(frames, durations=[100.0, 250.0, 40.0], loop=2)


@pytest.mark.parametrize("format", formats(lambda format: format.frames and format.name != "TIFF"))
@pytest.mark.parametrize("alpha", [False, True])
def test_animations_come_frame_by_frame(tmp_path, format, alpha):
    picture, path = moving(alpha), tmp_path / f"a{format.suffixes[0]}"
    write_file(picture.enlarged(repeated), path)
    again = read_file(path)
    assert again.durations == picture.durations
    assert again.loop == (0 if format.name == "AVIF" else 2)  # Pillow's AVIF plays for ever
    for frame, wanted in zip(again.frames, picture.frames, strict=True):
        off = np.abs(frame[::4, ::4].astype(int)[..., :3] - wanted[..., :3])
        assert off.max() == 0 if format.quality is None else off.mean() < 12


def test_gifs_are_read_whole_and_refused_as_results(checkpoint, tmp_path, capsys):
    pictures = [smooth_picture(8, 6).quantize(5), random_picture(8, 6).quantize(7), smooth_picture(8, 6).quantize(9)]
    options = {"save_all": True, "append_images": pictures[1:], "duration": [70, 80, 90], "loop": 0, "comment": b"hi"}
    pictures[0].save(tmp_path / "a.gif", **options)
    picture = read_file(tmp_path / "a.gif")
    for frame, wanted in zip(picture.frames, pictures, strict=True):
        assert np.array_equal(frame[..., :3], np.asarray(wanted.convert("RGB")))
    assert (picture.durations, picture.loop, picture.comment) == ([70, 80, 90], 0, b"hi")
    assert upscale(checkpoint, tmp_path / "a.gif", "-o", tmp_path / "out") == 1
    assert "256 colours" in capsys.readouterr().err
    assert upscale(checkpoint, tmp_path / "a.gif", "-o", tmp_path / "out", "--format", "webp") == 0
    with PIL.Image.open(tmp_path / "out/a.webp") as image:
        assert (image.n_frames, image.size) == (3, (32, 24))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pages_of_a_tiff_come_one_by_one(checkpoint, tmp_path, dtype):
    pages = [random_levels(6, 7, 3, dtype), random_levels(5, 9, 1, dtype)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(pages[0], photometric="rgb", planarconfig="contig")
        writer.write(pages[1][..., 0], photometric="minisblack")
    assert upscale(checkpoint, tmp_path / "a.tif", "-o", tmp_path / "b.tif") == 0
    with tifffile.TiffFile(tmp_path / "b.tif") as file:
        assert [page.shape for page in file.pages] == [(24, 28, 3), (20, 36)]
        assert [page.dtype for page in file.pages] == [dtype, dtype]
    with pytest.raises(ValueError, match="pages; choose TIFF"):
        check_target(read_file(tmp_path / "a.tif"), "a.png") if dtype == np.uint8 else _pages_to_webp(tmp_path)


def _pages_to_webp(folder):
    picture = read_file(folder / "a.tif")
    picture.frames = [(frame >> 8).astype(np.uint8) for frame in picture.frames]
    check_target(picture, "a.webp")


def test_the_photo_of_a_multi_picture_jpeg_is_taken_and_the_rest_named(tmp_path):
    photo, preview = smooth_picture(16, 12), smooth_picture(8, 6)
    photo.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[preview], quality=95)
    picture = read_file(tmp_path / "a.jpg")
    assert [frame.shape for frame in picture.frames] == [(12, 16, 3)]
    assert "2 pictures" in picture.notes[0]


# How it was made.


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "avif"])
def test_how_it_was_made_stands_in_the_file(checkpoint, tmp_path, suffix):
    write_file(PictureFile([np.asarray(smooth_picture(9, 8))], xmp=XMP), tmp_path / f"a.{suffix}")
    assert upscale(checkpoint, tmp_path / f"a.{suffix}", "-o", tmp_path / "out", "--seed", 7, "--fidelity", 0.5) == 0
    packet = read_file(tmp_path / f"out/a.{suffix}").xmp
    (made,) = [
        element.attrib
        for element in xml.etree.ElementTree.fromstring(packet).iter()
        if f"{{{NAMESPACE}}}model" in element.attrib
    ]
    facts = {key.split("}")[1]: value for key, value in made.items() if NAMESPACE in key}
    assert facts.pop("software").startswith("flowsr ")
    assert facts == {"model": Path(checkpoint).name, "scale": "4", "steps": "1", "seed": "7", "fidelity": "0.5"}
    assert b"a pond" in packet
    plain = [tmp_path / f"a.{suffix}", "-o", tmp_path / "plain", "--no-provenance"]
    assert upscale(checkpoint, *plain) == 0
    assert b"flowsr" not in (tmp_path / f"plain/a.{suffix}").read_bytes()


def test_a_second_upscaling_replaces_what_the_first_said():
    twice = with_provenance(with_provenance(PictureFile([], xmp=XMP), {"model": 'a "b"'}), {"model": "c"})
    assert twice.xmp.count(b"flowsr:model") == 1
    xml.etree.ElementTree.fromstring(twice.xmp)


def test_the_example_in_the_docs_runs(tmp_path, monkeypatch):
    levels = random_levels(7, 9, 3)
    write_file(PictureFile([levels], icc_profile=PROFILE), tmp_path / "photo.tif")
    monkeypatch.chdir(tmp_path)
    exec(DOCS.read_text().split("```python\n")[1].split("```")[0], {})
    large = read_file("large.tif")
    assert (large.frames[0].shape, large.bits, large.icc_profile) == ((28, 36, 3), 16, PROFILE)


# Damage and other hindrances.


def test_damaged_metadata_is_left_out_and_named(tmp_path):
    whole = exif().removeprefix(b"Exif\0\0")
    random_picture(8, 6).save(
        tmp_path / "a.jpg", exif=b"Exif\0\0" + whole[:30], icc_profile=PROFILE[:100], xmp=b"<x:xmpmeta\xff\xfe"
    )
    picture = read_file(tmp_path / "a.jpg")
    assert len(picture.notes) == 3
    assert not (picture.exif or picture.icc_profile or picture.xmp)


def test_what_is_in_a_file_beside_all_that_is_read_is_named(tmp_path):
    random_picture(8, 6).save(tmp_path / "a.jpg", extra=b"\xff\xeb\x00\x08JP\0\1ab")
    assert read_file(tmp_path / "a.jpg").notes == ["its APP11 segment cannot be kept"]
    info = PIL.PngImagePlugin.PngInfo()
    info.add(b"caBX", b"credentials")
    random_picture(8, 6).save(tmp_path / "a.png", pnginfo=info)
    assert read_file(tmp_path / "a.png").notes == ["its caBX chunk cannot be kept"]
    tags = [(33550, "d", 3, (1.0, 1.0, 0.0), False)]
    tifffile.imwrite(tmp_path / "a.tif", random_levels(6, 8, 1, np.uint8)[..., 0], extratags=tags, software=None)
    assert read_file(tmp_path / "a.tif").notes == ["its tag 33550 cannot be kept"]


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path):
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    random_picture(40, 30).save(tmp_path / "large.png")
    wanted = {"absent": "no such file", "folder": "a folder", "pipe": "not a regular file", "loop": "cannot be read"}
    for name, message in wanted.items():
        with pytest.raises(UnreadableError, match=message):
            read_file(tmp_path / f"{name}.png")
    with pytest.raises(UnreadableError, match="40x30; 1,200 pixels, at most 1,199"):
        read_file(tmp_path / "large.png", max_pixels=1199)
    random_picture(4, 4).save(tmp_path / "a.ppm")
    with pytest.raises(UnreadableError, match="not a picture, or of a"):
        read_file(tmp_path / "a.ppm")  # not on the list of formats


@pytest.fixture
def other_user():
    """The effective user is one without rights; a folder that this user may enter."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = os.geteuid() == 0

        def become():
            if root:
                os.seteuid(65534)

        yield Path(folder), become
        if root:
            os.seteuid(0)
        os.chmod(folder, 0o700)


def test_closed_files_and_folders_are_named_as_such(other_user):
    folder, become = other_user
    random_picture(4, 4).save(folder / "a.png")
    os.chmod(folder / "a.png", 0)
    os.chmod(folder, 0o555)
    become()
    with pytest.raises(UnreadableError, match="no permission to read"):
        read_file(folder / "a.png")
    with pytest.raises(ValueError, match="no permission to write"):
        files.check_place(folder / "b.png")
    with pytest.raises(ValueError, match="no permission to write"):
        files.check_place(folder / "new/b.png")


def test_long_names_are_written_or_refused_before_any_work(checkpoint, tmp_path, capsys):
    random_picture(4, 4).save(tmp_path / f"{'n' * 251}.png")
    assert upscale(checkpoint, tmp_path / f"{'n' * 251}.png", "-o", tmp_path / "out") == 0
    assert upscale(checkpoint, tmp_path / f"{'n' * 251}.png", "-o", tmp_path / "out", "--suffix", "_x4") == 1
    assert "longer than the 255 bytes" in capsys.readouterr().err


def test_results_too_large_for_their_format_are_refused():
    wide = PictureFile([np.zeros((1, 4097, 3), np.uint8)])
    with pytest.raises(ValueError, match="WEBP cannot hold 16388x4; at most 16383"):
        check_target(wide, "a.webp", OutputSize(4).of)
    check_target(wide, "a.jpg", OutputSize(4).of)
    slow = PictureFile([np.zeros((2, 2, 3), np.uint8)] * 2, durations=[1.0, 70001.0])
    with pytest.raises(ValueError, match="PNG cannot hold a frame of 70001 ms"):
        check_target(slow, "a.png")
    with pytest.raises(ValueError, match="no `--quality`"):
        check_target(wide, "a.png", quality=80)


# The command line.


def test_standard_input_to_standard_output(checkpoint, tmp_path, monkeypatch, capsysbinary):
    random_picture(9, 6).save(tmp_path / "a.png")
    for options, format in (([], "PNG"), (["--format", "tif"], "TIFF")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.png").read_bytes())))
        assert upscale(checkpoint, "-", "-o", "-", *options) == 0
        captured = capsysbinary.readouterr()
        with PIL.Image.open(io.BytesIO(captured.out)) as image:
            assert (image.format, image.size) == (format, (36, 24))
        assert b"1 of 1 pictures written to standard output" in captured.err


def test_nothing_that_exists_is_overwritten_unasked(checkpoint, tmp_path, capsys):
    random_picture(4, 4).save(tmp_path / "a.png")
    random_picture(4, 4).save(tmp_path / "a_compare.png")
    before = (tmp_path / "a_compare.png").read_bytes()
    out = tmp_path / "out"
    assert upscale(checkpoint, tmp_path / "a.png", "-o", out) == 0
    first = (out / "a.png").read_bytes()
    calls = {
        "a.png exists": [tmp_path / "a.png", "-o", out],
        "a_compare.png exists": [tmp_path / "a.png", "-o", tmp_path / "a.jpg", "--compare"],
        "out.xyz": [tmp_path / "a.png", "-o", tmp_path / "out.xyz"],
        "part of a name": [tmp_path / "a.png", "-o", out, "--suffix", "/../b"],
        "disagree": [tmp_path / "a.png", "-o", tmp_path / "c.png", "--format", "jpg"],
        "no `--quality`": [tmp_path / "a.png", "-o", tmp_path / "c.png", "--quality", 80],
        "JPEG cannot hold": [tmp_path / "alpha.png", "-o", tmp_path / "c.jpg"],
        "cannot hold": [tmp_path / "alpha.png", "-o", tmp_path / "c", "--format", "bmp"],
    }
    random_picture(4, 4, "RGBA").save(tmp_path / "alpha.png")
    for message, call in calls.items():
        assert upscale(checkpoint, *call) == 1, message
        assert message in capsys.readouterr().err, message
    assert (tmp_path / "a_compare.png").read_bytes() == before
    assert (out / "a.png").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a_compare.png", "alpha.png", "out"]
    assert upscale(checkpoint, tmp_path / "a.png", "-o", out, "--overwrite", "--seed", 3) == 0
    assert (out / "a.png").read_bytes() != first


def test_compare_is_never_written_on_top_of_an_input(checkpoint, tmp_path, capsys):
    for name in ("a.png", "a_compare.png"):
        random_picture(4, 4).save(tmp_path / name)
    inputs = [tmp_path / "a.png", tmp_path / "a_compare.png"]
    assert upscale(checkpoint, *inputs, "-o", tmp_path / "out", "--compare") == 1
    assert "Two inputs" in capsys.readouterr().err
    assert upscale(checkpoint, tmp_path / "a_compare.png", tmp_path / "a.png", "-o", tmp_path, "--suffix", "_x4") == 0
    assert (
        upscale(checkpoint, *inputs, "-o", tmp_path, "--suffix", "", "--format", "jpg", "--compare", "--overwrite")
        == 1
    )
    assert "is an input" in capsys.readouterr().err


def test_format_suffix_and_quality(checkpoint, tmp_path):
    smooth_picture(16, 12).save(tmp_path / "a.png")
    for quality in (50, 95):
        out = tmp_path / str(quality)
        call = [tmp_path / "a.png", "-o", out, "--format", "jpg", "--suffix", "_x4", "--quality", quality]
        assert upscale(checkpoint, *call) == 0
    sizes = [os.path.getsize(tmp_path / f"{quality}/a_x4.jpg") for quality in (50, 95)]
    assert sizes[0] < sizes[1]
