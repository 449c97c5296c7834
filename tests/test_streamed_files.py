"""Files that are written row by row, by the command line too."""

import io

import numpy as np
import PIL.Image
import pytest
import tifffile
import torch
from conftest import make_encoded, random_picture

from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline, picture_writer
from flowsr.cli import main, size_in_bytes
from flowsr.files import PictureFile, read_file, write_file
from flowsr.upscaler import upscale_file


class Rows:
    """An array whose rows are given one after the other, never twice, never many."""

    def __init__(self, array: np.ndarray):
        self.array, self.next, self.most = array, 0, 0
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, _ = rows.indices(len(self.array))
        assert first == self.next
        self.next, self.most = last, max(self.most, last - first)
        return self.array[rows]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    scheduler = FlowMatchSREulerScheduler(source="prior", noise="positional")
    FlowMatchSRPipeline(make_encoded(), scheduler).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pipe(checkpoint):
    pipe = FlowMatchSRPipeline.from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("dtype", "channels"), [("uint8", 1), ("uint8", 4), ("uint16", 3)])
def test_rows_make_the_file_that_an_array_makes(tmp_path, suffix, dtype, channels):
    levels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (500, 700, channels), dtype=dtype)
    rows, held = Rows(levels), {"resolution": (300.0, 300.0), "xmp": b"<x></rdf:RDF></x>"}
    write_file(PictureFile([rows], **held), tmp_path / f"rows.{suffix}")
    write_file(PictureFile([levels], **held), tmp_path / f"array.{suffix}")
    read, other = (read_file(tmp_path / f"{name}.{suffix}") for name in ("rows", "array"))
    assert rows.next == 500
    assert rows.most * 700 * channels * levels.itemsize <= 2**18
    assert np.array_equal(read.frames[0], levels)
    assert np.array_equal(other.frames[0], levels)
    assert (read.resolution, read.xmp) == (other.resolution, other.xmp)


def test_a_tiff_beyond_4_gib_is_a_bigtiff(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_writer, "TIFF_BYTES", 1000)
    exif = PIL.Image.Exif()
    exif[0x010F], exif.get_ifd(0x8769)[0xA434] = "a camera", "a lens"
    levels = np.random.default_rng(0).integers(0, 65536, (300, 700, 3), dtype=np.uint16)
    write_file(PictureFile([Rows(levels), Rows(levels[:7])], exif=exif.tobytes()), tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        assert np.array_equal(file.pages[0].asarray(), levels)
        assert np.array_equal(file.pages[1].asarray(), levels[:7])
        assert file.pages[0].tags["Make"].value == "a camera"
        assert file.pages[0].tags["ExifTag"].value["LensModel"] == "a lens"
    read = read_file(tmp_path / "a.tif")
    assert np.array_equal(read.frames[0], levels)


HOLDS = {"png": ("RGB", "RGBA", "L"), "tif": ("RGB", "RGBA", "L", "CMYK"), "jpg": ("RGB", "L", "CMYK")}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in HOLDS.items() for mode in modes])
def test_files_in_parts_hold_the_whole_picture(tmp_path, pipe, mode, suffix):
    random_picture(90, 100, mode).save(tmp_path / "a.tif")
    options = {"seed": 2, "num_inference_steps": 2}
    parts = []
    upscale_file(pipe, tmp_path / "a.tif", tmp_path / f"b.{suffix}", tile=40, **options,
                 progress=lambda so_far: parts.append(so_far.parts))  # fmt: skip
    assert set(parts) == {9}
    upscale_file(pipe, tmp_path / "a.tif", tmp_path / f"whole.{suffix}", tile=200, **options)
    assert (tmp_path / f"b.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()
    if mode in ("RGB", "L") and suffix != "jpg":
        image, seeded = PIL.Image.open(tmp_path / "a.tif"), torch.Generator().manual_seed(2)
        whole = pipe(image, generator=seeded, num_inference_steps=2).images[0]
        assert np.array_equal(np.asarray(whole), np.asarray(PIL.Image.open(tmp_path / f"b.{suffix}")))


def test_the_command_line_keeps_to_its_memory(tmp_path, checkpoint, capsys):
    random_picture(100, 90).save(tmp_path / "a.png")
    call = ["upscale", str(tmp_path / "a.png"), "--checkpoint", checkpoint, "--steps", "2", "-o"]
    assert main([*call, str(tmp_path / "b.png")]) == 0
    assert main([*call, str(tmp_path / "c.png"), "--max-memory", "25M"]) == 0
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()
    assert main([*call, str(tmp_path / "d.png"), "--max-memory", "1M"]) == 1
    assert "needs at least" in capsys.readouterr().err
    assert not (tmp_path / "d.png").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_sizes_in_words():
    assert [size_in_bytes(text) for text in ("5", "2k", "1.5G")] == [5, 2048, 3 * 2**29]
    with pytest.raises(SystemExit):
        main(["upscale", "a.png", "-o", "b.png", "--max-memory", "much"])


def test_what_is_written_to_a_stream(tmp_path, pipe):
    random_picture(9, 8).save(tmp_path / "a.png")
    upscale_file(pipe, tmp_path / "a.png", tmp_path / "-.tif", stream=(whole := io.BytesIO()))
    assert tifffile.imread(io.BytesIO(whole.getvalue())).shape == (32, 36, 3)
