"""Damaged and hostile files give a picture or one line, in bounded time and memory."""

import functools
import io
import random
import resource
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import PIL.features
import PIL.Image
import pytest
from conftest import make_pipeline, random_picture, smooth_picture
from metadata import PROFILE, XMP, exif

from flowsr.cli import main
from flowsr.files import PictureFile, UnreadableError, check_target, read_file, write_file

SECONDS, MEMORY = 5.0, 2**29  # for any one small file; of growth over all of them, bytes


@functools.cache
def valid_files() -> dict[str, bytes]:
    """Small files of every format and kind, most with EXIF, ICC profile and XMP."""
    made = {}

    def save(name: str, image: PIL.Image.Image, **options) -> None:
        if "append_images" in options:  # copies, as a picture remembers how it was saved last
            options["append_images"] = [each.copy() for each in options["append_images"]]
        image.copy().save(buffer := io.BytesIO(), **options)
        made[name] = buffer.getvalue()

    def write(name: str, picture: PictureFile, folder: str) -> None:
        write_file(picture, path := Path(folder) / name)
        made[name] = path.read_bytes()

    smooth, noise = smooth_picture(24, 18), [random_picture(9, 7, seed=seed) for seed in range(3)]
    rich = {"exif": exif(6), "icc_profile": PROFILE, "xmp": XMP}
    frames = {"save_all": True, "append_images": noise[1:], "duration": 50}
    save("baseline.jpg", smooth, format="JPEG", comment=b"hi", dpi=(72, 72), **rich)
    save("progressive.jpg", smooth, format="JPEG", progressive=True, **rich)
    save("ink.jpg", smooth.convert("CMYK"), format="JPEG")
    save("several.jpg", smooth, format="MPO", save_all=True, append_images=noise)
    save("palette.png", smooth.quantize(9), format="PNG", transparency=2, **rich)
    save("moving.png", noise[0], format="PNG", **frames)
    save("moving.gif", noise[0].quantize(16), format="GIF", comment=b"hi", **frames)
    save("lossy.webp", smooth, format="WEBP", **rich)
    save("moving.webp", noise[0], format="WEBP", **frames)
    save("true.bmp", smooth, format="BMP")
    save("palette.bmp", smooth.quantize(20), format="BMP")
    for compression in ("raw", "tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate"):
        options = rich if compression == "raw" else {"icc_profile": PROFILE}  # libtiff writes no EXIF
        save(f"{compression}.tif", smooth, format="TIFF", compression=compression, **options)
    save("pages.tif", noise[0], format="TIFF", **frames)
    save("fax.tif", smooth.convert("1"), format="TIFF", compression="group4")
    save("colour.jp2", smooth, format="JPEG2000")
    save("stream.j2k", smooth.convert("L"), format="JPEG2000", no_jp2=True)
    if PIL.features.check("avif"):
        save("still.avif", smooth, format="AVIF", **rich)
    deep = np.random.default_rng(0).integers(0, 65536, (7, 9, 4), dtype=np.uint16)
    kept = {"exif": exif().removeprefix(b"Exif\0\0"), "icc_profile": PROFILE, "xmp": XMP, "text": {"Title": "a"}}
    with tempfile.TemporaryDirectory() as folder:
        write("deep.png", PictureFile([deep], resolution=(72, 72), colour_space={b"gAMA": bytes(4)}, **kept), folder)
        write("grey.png", PictureFile([deep[..., :2]], **kept), folder)
        write("deep.tif", PictureFile([deep, deep[:4, :, :3]], **kept), folder)
        try:
            write("still.heic", PictureFile([np.asarray(smooth)], **kept), folder)
        except ValueError:
            pass  # pillow-heif is not installed
    return made


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Damages that find faults: flips, extreme numbers, cuts, doublings; also within EXIF, ICC profile and XMP."""
    data = bytearray(data)
    start, stop = 0, len(data)
    if draw.random() < 0.3:  # within metadata
        places = [data.find(mark) for mark in (b"Exif", b"II*\0", b"MM\0*", b"acsp", b"<x:xmp", b"iCCP", b"IFD")]
        start = draw.choice([place for place in places if place >= 0] or [0])
        stop = min(len(data), start + 200)
    elif draw.random() < 0.4:  # within the header
        stop = min(len(data), 120)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(start, max(stop, start + 1))
        kind = draw.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            data[at : at + 4] = draw.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x01\0\0"))
        elif kind == 2:
            data[at : at + 2] = struct.pack(draw.choice("<>") + "H", draw.choice((0, 1, 255, 256, 32767, 65535)))
        elif kind == 3:
            del data[at : at + draw.randrange(1, 40)]
        elif kind == 4:
            data[at:at] = data[at : at + draw.randrange(1, 200)]
        else:
            data[at] ^= 1 << draw.randrange(8) if at < len(data) else 0
        if at >= len(data) or stop > len(data):
            start, stop = 0, max(len(data), 1)
        if not data:
            break
    if data[:8] == b"\x89PNG\r\n\x1a\n" and draw.random() < 0.8:
        data = with_checksums(data)  # or every damage ends at the first checksum
    return bytes(data)


def with_checksums(data: bytearray) -> bytearray:
    at = 8
    while at + 12 <= len(data):
        (size,) = struct.unpack_from(">I", data, at)
        end = at + 8 + size
        if end + 4 > len(data):
            break
        struct.pack_into(">I", data, end, zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data


def judge(data: bytes, path: Path) -> bool:
    """Reads one file as `flowsr upscale` does and writes what came of it; whether there was a picture."""
    path.write_bytes(data)
    start = time.perf_counter()
    try:
        picture = read_file(path, max_pixels=2**20)
    except UnreadableError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(str(path))
        return False
    finally:
        assert time.perf_counter() - start < SECONDS, path
    for frame in picture.frames:
        assert frame.ndim == 3
        assert frame.dtype in (np.uint8, np.uint16)
    same = picture.enlarged(lambda pixels: pixels / np.iinfo(pixels.dtype).max)
    suffixes = (".png", ".jpg", ".webp", ".tif", ".avif", ".jp2", ".bmp")
    target = path.with_name("out" + suffixes[zlib.crc32(data) % len(suffixes)])
    try:
        check_target(same, target)
    except ValueError as error:
        assert "cannot hold" in str(error)
        return True
    write_file(same, target)
    return True


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def keep_failure(path: Path) -> None:
    print(f"the file: {path.read_bytes().hex()}")


def fuzz(name: str, count: int, folder: Path) -> int:
    data, draw, pictures = valid_files()[name], random.Random(name), 0
    path = folder / f"a{Path(name).suffix}"
    assert judge(data, path)
    before = peak()
    try:
        for _ in range(count):
            pictures += judge(mutated(data, draw), path)
    except BaseException:
        keep_failure(path)
        raise
    assert peak() - before < MEMORY
    return pictures


NAMES = sorted(valid_files())


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_give_pictures_or_one_line(tmp_path, name):
    fuzz(name, 250, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_thousands_of_mutated_files_give_pictures_or_one_line(tmp_path, name):
    fuzz(name, 5000, tmp_path)


def cut(name: str, step: int, folder: Path) -> None:
    data, path = valid_files()[name], folder / f"a{Path(name).suffix}"
    try:
        for length in range(0, len(data), step):
            judge(data[:length], path)
    except BaseException:
        keep_failure(path)
        raise


@pytest.mark.parametrize("name", NAMES)
def test_files_cut_at_many_lengths_give_pictures_or_one_line(tmp_path, name):
    cut(name, 41, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_cut_at_every_length_give_pictures_or_one_line(tmp_path, name):
    cut(name, 1, tmp_path)


def test_files_that_swell_are_refused_from_their_headers(tmp_path):
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">II", 60000, 60000) + b"\x08\x02\0\0\0")
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10**7))) + chunk(b"IEND", b"")
    text = chunk(b"iTXt", b"Title\0\1\0\0\0" + zlib.compress(bytes(10**8)))
    small = chunk(b"IHDR", struct.pack(">II", 1, 1) + b"\x08\x02\0\0\0")
    swelling = b"\x89PNG\r\n\x1a\n" + small + text + chunk(b"IDAT", zlib.compress(bytes(4))) + chunk(b"IEND", b"")
    smooth_picture(16, 16).save(tmp_path / "scans.jpg", progressive=True)
    whole = (tmp_path / "scans.jpg").read_bytes()
    at = whole.rfind(b"\xff\xda")
    (tmp_path / "scans.jpg").write_bytes(whole[:-2] + whole[at:-2] * 2000 + whole[-2:])
    image = PIL.Image.new("L", (1, 1))
    image.save(tmp_path / "frames.gif", save_all=True, append_images=[image.point(lambda v, n=n: n) for n in (1, 2)])
    frames = (tmp_path / "frames.gif").read_bytes()
    at = frames.rfind(b"\x21\xf9")
    (tmp_path / "frames.gif").write_bytes(frames[:-1] + frames[at:-1] * 6000 + b";")
    (tmp_path / "bomb.png").write_bytes(bomb)
    (tmp_path / "text.png").write_bytes(swelling)
    before = peak()
    wanted = {"bomb.png": "too large", "scans.jpg": "scans", "frames.gif": "frames", "text.png": "broken"}
    for name, message in wanted.items():
        start = time.perf_counter()
        with pytest.raises(UnreadableError, match=message):
            read_file(tmp_path / name)
        assert time.perf_counter() - start < SECONDS, name
    assert peak() - before < MEMORY


def test_a_folder_of_damaged_files_is_done_to_its_end(tmp_path, capsys):
    make_pipeline().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "in").mkdir()
    draw = random.Random(1)
    for name, data in valid_files().items():
        (tmp_path / "in" / f"mutated_{name}").write_bytes(mutated(mutated(data, draw), draw))
    random_picture(5, 4).save(tmp_path / "in/z_good.png")
    call = ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--checkpoint", str(tmp_path / "checkpoint")]
    main([*call, "--steps", "1", "--max-pixels", str(2**20)])
    captured = capsys.readouterr()
    assert (tmp_path / "out/z_good.png").exists()
    written = int(captured.out.split()[0])
    assert written == len(list((tmp_path / "out").iterdir()))
    lines = [line for line in captured.err.splitlines() if line]
    assert all(line.startswith("flowsr: ") for line in lines), lines
