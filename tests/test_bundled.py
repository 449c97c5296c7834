"""The checkpoint that ships: it loads, does what the README says, and keeps its distance from bicubic."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from conftest import seeded

import flowsr
from flowsr.degradations import matlab_bicubic
from flowsr.demo import example_photo
from flowsr.evaluation import load_pairs, measure_steps
from flowsr.files import read_picture
from flowsr.loading import load_upscaler
from flowsr.metrics import lr_psnr, psnr_y

SHARED = Path(__file__).resolve().parents[2] / "shared"
NAMES = ["ddpm_x4", "digits", "x4", "x4-real"]


@pytest.fixture(scope="module")
def pipe():
    pipe = flowsr.FlowMatchSRPipeline.from_pretrained(flowsr.bundled("x4"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_and_come_with_what_made_them(name):
    folder = Path(flowsr.bundled(name))
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 12 * 2**20
    assert {"README.md", "settings.yaml", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
    for earlier in folder.glob("*_part"):
        assert {path.name for path in earlier.iterdir()} == {"settings.yaml", "metrics.jsonl"}
    assert not list(folder.rglob("*.py"))


def test_names_that_do_not_ship_are_refused():
    with pytest.raises(ValueError, match=re.escape(f"these ship with flowsr: {NAMES}")):
        flowsr.bundled("x16")


def test_the_example_photo_is_well_above_bicubic(pipe):
    hr = np.asarray(read_picture(example_photo()).convert("RGB"))[:240, 100:340]
    lr = PIL.Image.fromarray(matlab_bicubic(hr, 4))
    bicubic = psnr_y(np.asarray(lr.resize((240, 240), PIL.Image.BICUBIC)), hr, 4)
    faithful = np.asarray(pipe(lr, fidelity=1.0, generator=seeded()).images[0])
    assert psnr_y(faithful, hr, 4) > bicubic + 1.5
    exact = np.asarray(pipe(lr, fidelity=1.0, consistency="exact", generator=seeded()).images[0])
    assert psnr_y(exact, hr, 4) > psnr_y(faithful, hr, 4) - 0.01
    assert lr_psnr(exact, np.asarray(lr), 4) > 55


def test_tiled_equals_whole(pipe):
    lr = PIL.Image.fromarray(matlab_bicubic(np.asarray(read_picture(example_photo()).convert("RGB")), 4))
    whole, tiled = (np.asarray(pipe(lr, 2, generator=seeded(), tile=t).images[0]).astype(int) for t in (None, 48))
    assert np.abs(whole - tiled).max() <= 1


@pytest.mark.skipif(
    not (SHARED / "data/Set5").is_dir(), reason="the published test set Set5 is not beside this checkout"
)
@pytest.mark.parametrize("name", ["x4", "ddpm_x4"])
def test_the_published_numbers_are_those_of_these_weights(name):
    pipe = load_upscaler(name)
    pipe.set_progress_bar_config(disable=True)
    written = json.loads((Path(flowsr.bundled(name)) / "evaluation.json").read_text())["Set5"]
    pairs = load_pairs(SHARED / "data/Set5/HR", SHARED / "data/Set5/LRx4", 4)
    measured = measure_steps(pipe, pairs, steps=[1])["rows"]
    for row in measured:
        (claimed,) = [claim for claim in written["rows"] if claim["method"] == row["method"]]
        assert row["psnr_y"] == pytest.approx(claimed["psnr_y"], abs=0.01)
        assert row["ssim_y"] == pytest.approx(claimed["ssim_y"], abs=0.001)


@pytest.mark.skipif(not (SHARED / "data/mnist").is_dir(), reason="the digits of MNIST are not beside this checkout")
def test_digits_are_those_asked_for():
    # Of the mean pictures of the real digits, that of its own class is the most like the mean of a class's samples.
    def read(name: str, header: int) -> np.ndarray:
        (path,) = (SHARED / "data/mnist").glob(f"t10k-{name}*.gz")
        return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)

    pictures, labels = read("images", 16).reshape(-1, 784), read("labels", 8)
    real = np.stack([pictures[labels == digit].mean(0) for digit in range(10)])
    pipe = flowsr.FlowMatchPipeline.from_pretrained(flowsr.bundled("digits"))
    pipe.set_progress_bar_config(disable=True)
    wanted = [digit for digit in range(10) for _ in range(5)]
    how = {"num_inference_steps": 4, "solver": "heun", "guidance_scale": 2.0, "output_type": "np"}
    drawn = pipe(class_labels=wanted, generator=seeded(), **how).images.reshape(10, 5, 784).mean(1)
    alike = np.corrcoef(drawn, real)[:10, 10:]
    assert alike.argmax(1).tolist() == list(range(10))
    assert alike.diagonal().min() > 0.6
