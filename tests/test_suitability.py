"""The chooser of weights: against noise and qualities that are known, and on the command line."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from conftest import ROOT, make_encoded_pipeline, random_picture

import flowsr
from flowsr.cli import main
from flowsr.degradations import matlab_bicubic
from flowsr.files import PictureFile, read_file
from flowsr.suitability import blockiness, jpeg_quality, noise, suits


@pytest.fixture(scope="module")
def clean() -> PIL.Image.Image:
    pixels = np.asarray(PIL.Image.open(ROOT / "examples" / "kitten.png").convert("RGB"))
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    return PIL.Image.fromarray(matlab_bicubic(pixels[:height, :width], 2))


def as_jpeg(picture: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    picture.save(file := io.BytesIO(), "JPEG", quality=quality)
    return PIL.Image.open(file)


def with_noise(pixels: np.ndarray, sigma: float) -> np.ndarray:
    return (pixels + np.random.default_rng(0).normal(0, sigma, pixels.shape)).round().clip(0, 255).astype(np.uint8)


@pytest.fixture
def both_ship(tmp_path, monkeypatch):
    """Checkpoints of both names, with weights of their own."""
    for name, scale in (("x4", 0.09), ("x4-real", 0.05)):
        make_encoded_pipeline(residual_std=scale).save_pretrained(tmp_path / "weights" / name)

    def bundled(name: str = "x4") -> str:
        if not (tmp_path / "weights" / name).is_dir():
            raise ValueError(name)
        return str(tmp_path / "weights" / name)

    monkeypatch.setattr(flowsr, "bundled", bundled)


@pytest.mark.parametrize("sigma", [2.0, 5.0, 15.0])
def test_noise_on_a_flat_picture_is_measured(sigma):
    flat = with_noise(np.full((400, 400, 3), 120.0), sigma).astype(np.float32)
    color, grey = noise(flat)
    assert color == pytest.approx(sigma, rel=0.08)
    assert grey == pytest.approx(sigma / 3**0.5, rel=0.08)  # the mean of three
    assert noise(flat[..., :1])[1] == pytest.approx(sigma, rel=0.08)


@pytest.mark.parametrize("quality", [25, 30, 50, 75, 90, 97])
def test_the_quality_of_a_file_is_read_off_its_tables(quality):
    assert jpeg_quality(as_jpeg(random_picture(16, 16), quality).quantization) == pytest.approx(quality, abs=1)
    assert jpeg_quality({}) is None


def test_the_blocks_are_found_wherever_they_begin(clean):
    pixels = np.asarray(as_jpeg(clean, 30)).astype(np.float32)
    expected = blockiness(pixels)
    for top, left in ((0, 0), (3, 5), (7, 1)):
        found = blockiness(pixels[top : top - 8, left : left - 8])
        assert np.allclose(found, expected, rtol=0.1)
    assert blockiness(np.asarray(clean).astype(np.float32))[0] < expected[0] / 5


def test_what_suits_clean_and_damaged_pictures(clean):
    assert suits(clean) == ("x4", "neither JPEG blocks nor noise")
    assert suits(as_jpeg(clean, 60)) == ("x4-real", "JPEG tables of quality 60")
    assert suits(as_jpeg(clean, 30).convert("RGB"))[0] == "x4-real"
    assert suits(as_jpeg(clean, 96))[0] == "x4"
    noisy = with_noise(np.asarray(clean), 5)
    assert suits(PIL.Image.fromarray(noisy))[0] == "x4-real"
    deep = PictureFile([noisy.astype(np.uint16) * 257])
    assert suits(deep) == suits(PictureFile([noisy]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
@pytest.mark.parametrize("size", [(1, 1), (9, 9), (30, 5), (2000, 11)])
def test_every_kind_and_size_has_an_answer(mode, size):
    assert suits(random_picture(*size, mode))[0] in ("x4", "x4-real")


def test_a_read_file_has_the_tables(tmp_path, clean):
    as_jpeg(clean, 40).save(tmp_path / "a.jpg", quality=40)
    assert suits(read_file(tmp_path / "a.jpg"))[1] == "JPEG tables of quality 40"


def test_the_command_line_chooses_for_each_picture(both_ship, tmp_path, clean, capsys):
    small = clean.crop((0, 0, 40, 40))
    small.save(tmp_path / "a.png")
    small.save(tmp_path / "b.jpg", quality=30)
    call = ["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.jpg"), "--steps", "1", "--json"]
    assert main([*call, "-o", str(tmp_path / "auto"), "--checkpoint", "auto"]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["model"] for line in printed.out.splitlines()] == ["x4", "x4-real"]
    assert "x4-real, as it has JPEG tables of quality 30" in printed.err
    assert b'flowsr:model="x4-real"' in read_file(tmp_path / "auto" / "b.jpg").xmp
    for name, picture in (("x4", "a.png"), ("x4-real", "b.jpg")):
        assert main([*call, "-o", str(tmp_path / name), "--checkpoint", name]) == 0
        assert (tmp_path / name / picture).read_bytes() == (tmp_path / "auto" / picture).read_bytes()
    advice = "x4-real may suit it better, as it has JPEG tables of quality 30"
    assert capsys.readouterr().err.count(advice) == 1


def test_auto_goes_on_where_it_stopped(both_ship, tmp_path, clean, capsys):
    clean.crop((0, 0, 40, 40)).save(tmp_path / "a.png")
    call = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--steps", "1", "--skip-existing"]
    assert main([*call, "--checkpoint", "auto"]) == 0
    assert main([*call, "--checkpoint", "auto"]) == 0
    assert "1 were there already" in capsys.readouterr().out
