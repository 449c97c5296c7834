"""Outputs of any size: the kernel against Pillow's, whole pictures against rows, and what files say afterwards."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_ddpm, make_encoded_pipeline, make_pipeline, random_picture, seeded, smooth_picture

from flowsr import Upscaler, stream
from flowsr.cli import main
from flowsr.estimate import estimate
from flowsr.files import PictureFile, read_file, write_file
from flowsr.pipelines.output_size import OutputSize, lanczos_taps, resize
from flowsr.streaming import Resized, upscaled
from flowsr.upscaler import upscale_file


def pillow(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(PIL.Image.fromarray(plane).resize(size[::-1], PIL.Image.LANCZOS)).clip(0, 1)


@pytest.mark.parametrize("size", [(30, 40), (31, 83), (64, 17), (1, 1), (7, 100)])
def test_the_kernel_is_that_of_pillow(size):
    image = torch.rand(2, 3, 37, 41, generator=seeded())
    made = resize(image, size)
    wanted = np.stack([[pillow(plane.numpy(), size) for plane in each] for each in image])
    assert made.shape == (2, 3, *size)
    assert np.abs(made.numpy() - wanted).max() < 2e-6


def test_taps_sum_to_one_and_a_flat_picture_stays_flat():
    for before, after in ((1, 5), (4, 3), (100, 7), (7, 100)):
        _, weights = lanczos_taps(before, after)
        assert torch.allclose(weights.sum(1), torch.ones(after), atol=1e-6)
    assert torch.allclose(resize(torch.full((1, 1, 9, 9), 0.3), (4, 22)), torch.tensor(0.3))


def test_sizes_are_those_asked_for():
    assert OutputSize(4).of(5, 7) == (20, 28)
    assert OutputSize(4, 2.5).of(5, 7) == (13, 18)
    assert OutputSize(4, height=50).of(5, 7) == (50, 70)
    assert OutputSize(4, width=70).of(5, 7) == (50, 70)
    assert OutputSize(4, height=3, width=11).of(5, 7) == (3, 11)
    assert OutputSize(4, 0.01).of(5, 7) == (1, 1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"outscale": 0}, "positive"), ({"outscale": float("inf")}, "positive"), ({"outscale": "2"}, "positive"),
        ({"outscale": 2.0, "height": 8}, "not both"), ({"width": 0}, "`width`"), ({"height": 8.5}, "`height`"),
    ],
)  # fmt: skip
def test_what_is_no_size_is_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        make_pipeline()(random_picture(6, 5), **wrong)


def test_a_latent_and_an_upscaler_have_one_size():
    with pytest.raises(ValueError, match="latent"):
        make_pipeline()(random_picture(6, 5), outscale=2, output_type="latent")
    with pytest.raises(ValueError, match="one `scale`"):
        Upscaler(make_pipeline(), outscale=2)


@pytest.mark.parametrize("pipe", [make_pipeline(), make_ddpm()], ids=["flow", "diffusion"])
@pytest.mark.parametrize("consistency", [None, "exact"])
def test_the_output_is_the_finished_picture_resized(pipe, consistency):
    image = np.asarray(smooth_picture(14, 11))
    call = {"num_inference_steps": 2, "output_type": "pt", "consistency": consistency}
    whole = pipe(image, generator=seeded(), **call).images
    half = pipe(image, generator=seeded(), outscale=2.5, **call).images
    assert torch.equal(half, resize(whole, (28, 35)))
    assert torch.equal(pipe(image, generator=seeded(), height=44, **call).images, whole)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "I;16"])
def test_every_mode_comes_back_in_its_size(pipe, mode):
    picture = random_picture(6, 5, "L" if mode == "I;16" else mode)
    picture = PIL.Image.fromarray(np.asarray(picture).astype(np.uint16) * 257) if mode == "I;16" else picture
    made = pipe([picture, random_picture(8, 8)], outscale=1.5).images
    assert (made[0].mode, made[0].size, made[1].size) == (mode, (9, 8), (12, 12))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [{"outscale": 2.5}, {"outscale": 5.3}, {"width": 60}, {"height": 121, "width": 240}])
def test_rows_are_those_of_the_whole_to_the_bit(channels, size):
    pipe = make_encoded_pipeline()
    image = np.random.default_rng(0).integers(0, 256, (60, 43, channels), dtype=np.uint8)
    call = {"num_inference_steps": 2, "generator": seeded(5), "output_type": "np"}
    whole = (pipe(image, **call, **size).images[0] * 255).round().astype(np.uint8)
    rows = upscaled(image, pipe, num_inference_steps=2, seed=5, tile=24, **size)
    assert isinstance(rows, Resized) or whole.shape[:2] == (240, 172)
    starts = range(0, rows.shape[0], 7)
    assert np.array_equal(np.concatenate([rows[start : start + 7] for start in starts]), whole)
    assert np.array_equal(rows[3:5], whole[3:5])  # once more from the top
    assert rows.rows.done <= 3 * len(rows.rows.bands) * len(rows.rows.columns) if isinstance(rows, Resized) else True
    large = np.zeros_like(whole)
    stream(image, large, pipe, num_inference_steps=2, seed=5, tile=24, **size)
    assert np.array_equal(large, whole)


def test_each_part_is_made_once_and_few_rows_are_held():
    pipe = make_encoded_pipeline()
    rows = upscaled(np.zeros((400, 30, 3), np.uint8), pipe, num_inference_steps=1, tile=32, outscale=2)
    for start in range(0, 800, 5):
        rows[start : start + 5]
        assert len(rows.held) <= 2 * 5 + 13
    assert rows.rows.done == len(rows.rows.bands) * len(rows.rows.columns)


def test_a_file_has_the_size_the_resolution_and_how_it_was_made(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x011A], exif[0x011B], exif.get_ifd(0x8769)[0xA002] = 72.0, 300.5, 40
    levels = np.asarray(smooth_picture(40, 30))
    write_file(PictureFile([levels], exif=exif.tobytes(), resolution=(72.0, 96.0)), tmp_path / "a.png")
    pipe = make_encoded_pipeline()
    size = upscale_file(pipe, tmp_path / "a.png", tmp_path / "b.png", model="m", num_inference_steps=2, height=50)
    made = read_file(tmp_path / "b.png")
    assert size == (67, 50) == made.frames[0].shape[1::-1]
    assert np.allclose(made.resolution, (72 * 67 / 40, 96 * 50 / 30), rtol=1e-3)
    kept = PIL.Image.Exif()
    kept.load(made.exif)
    assert float(kept[0x011A]) == pytest.approx(72 * 67 / 40, rel=1e-6)
    assert float(kept[0x011B]) == pytest.approx(300.5 * 50 / 30, rel=1e-6)
    assert kept.get_ifd(0x8769)[0xA002] == 67
    assert b'flowsr:size="67x50" flowsr:resize="Lanczos"' in made.xmp
    with pytest.raises(ValueError, match="would have"):
        upscale_file(pipe, tmp_path / "a.png", tmp_path / "c.png", max_pixels=20000, outscale=5)


def test_the_estimate_is_of_that_size():
    found = estimate(make_encoded_pipeline(), (40, 30), num_inference_steps=1, outscale=2.5)
    assert (found.width, found.height, found.disk) == (100, 75, 100 * 75 * 3)


def test_the_command_line_makes_that_size(tmp_path, capsys):
    make_encoded_pipeline().save_pretrained(tmp_path / "checkpoint")
    random_picture(9, 6).save(tmp_path / "a.png")
    call = ["upscale", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "checkpoint"), "--quiet"]
    for name, wanted, *size in (("b", (23, 15), "--outscale", "2.5"), ("c", (30, 20), "--width", "30")):
        assert main([*call, "-o", str(tmp_path / f"{name}.png"), *size]) == 0
        assert PIL.Image.open(tmp_path / f"{name}.png").size == wanted
    capsys.readouterr()
    assert main([*call, "-o", str(tmp_path / "d.png"), "--height", "7", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["height"] == 7
    assert main([*call, "-o", str(tmp_path / "d.png"), "--height", "7", "--outscale", "2"]) == 1
    assert "not both" in capsys.readouterr().err
