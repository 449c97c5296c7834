"""Mean and spread of samples: against the samples themselves, in parts, calibrated, and as a heat map."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_encoded_pipeline, make_pipeline, random_picture

from flowsr import FlowMatchSRPipeline
from flowsr.cli import main
from flowsr.uncertainty import FULL_HEAT, heat, sampled_uncertainty


def with_factor(factor: float) -> FlowMatchSRPipeline:
    pipe = make_encoded_pipeline()
    pipe = FlowMatchSRPipeline(pipe.unet, pipe.scheduler, uncertainty_factor=factor)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(60, 190, (9, 12, 3), dtype=np.uint8)


@pytest.mark.parametrize("size", [{}, {"outscale": 2.5}])
def test_mean_and_spread_are_those_of_the_samples(image, size):
    call = {"num_images_per_prompt": 4, "output_type": "np", "generator": generators(8), "consistency": "soft", **size}
    found = with_factor(3.0)([image, image[::-1].copy()], output_uncertainty=True, **call)
    samples = found.images.reshape(2, 4, *found.images.shape[1:])
    assert np.allclose(found.mean, samples.mean(axis=1), atol=1e-5)
    assert np.allclose(found.uncertainty, 3 * np.sqrt(samples.var(axis=1, ddof=1).mean(axis=-1)), atol=1e-5)
    assert found.uncertainty.shape == (2, *found.images.shape[1:3])
    without = with_factor(3.0)([image, image[::-1].copy()], **{**call, "generator": generators(8)})
    assert np.array_equal(without.images, found.images) and without.uncertainty is None


def test_kinds_and_tuples(pipe):
    pictures = [random_picture(6, 5, "RGBA"), random_picture(8, 8, "L")]
    images, mean, uncertainty = pipe(pictures, num_images_per_prompt=2, output_uncertainty=True, return_dict=False)
    assert [each.mode for each in images] == ["RGBA", "RGBA", "L", "L"]
    assert [each.mode for each in mean] == ["RGBA", "L"]
    assert [each.shape for each in uncertainty] == [(20, 24), (32, 32)]


@pytest.mark.parametrize("make", [make_encoded_pipeline, make_pipeline], ids=["in parts", "whole"])
def test_samples_one_after_the_other_give_the_same(make, image):
    pipe = make()
    found = pipe(
        image, 2, num_images_per_prompt=3, generator=generators(3), output_uncertainty=True, output_type="np"
    ).uncertainty[0]
    options = {"tile": 8} if make is make_encoded_pipeline else {}
    assert np.allclose(sampled_uncertainty(pipe, image, 0, 3, num_inference_steps=2, **options), found, atol=1e-4)


def test_the_factor_is_saved(tmp_path):
    with_factor(5.5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["uncertainty_factor"] == 5.5
    assert FlowMatchSRPipeline.from_pretrained(tmp_path).config.uncertainty_factor == 5.5


@pytest.mark.parametrize("wrong", [{"num_images_per_prompt": 1}, {"fidelity": 1.0}, {"output_type": "latent"}])
def test_what_has_no_spread_is_refused(image, wrong):
    with pytest.raises(ValueError, match="`output_uncertainty`"):
        make_pipeline()(image, **{"num_images_per_prompt": 2, "output_uncertainty": True, **wrong})


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), "large"])
def test_what_is_no_factor_is_refused(factor):
    with pytest.raises(ValueError, match="`uncertainty_factor`"):
        with_factor(factor)


def test_heat_rises_from_black_to_white():
    ramp = heat(np.linspace(0, FULL_HEAT, 50)[None]).astype(int)
    assert (ramp[0, 0] == 0).all() and (ramp[0, -1] == 255).all() and (np.diff(ramp.sum(axis=2)) >= 0).all()
    assert (heat(np.full((1, 1), 1.0)) == 255).all()


def test_the_command_line_writes_a_heat_map(tmp_path, capsys):
    make_encoded_pipeline().save_pretrained(tmp_path / "checkpoint")
    random_picture(10, 8).save(tmp_path / "a.png")
    call = ["upscale", str(tmp_path / "a.png"), "--checkpoint", str(tmp_path / "checkpoint")]
    call += ["--uncertainty", "--steps", "2"]
    assert main([*call, "-o", str(tmp_path / "out")]) == 0
    assert PIL.Image.open(tmp_path / "out" / "a_uncertainty.png").size == (40, 32)
    assert main([*call, "-o", str(tmp_path / "faithful"), "--fidelity", "1"]) == 0  # which has no spread of its own
    heat_maps = [PIL.Image.open(tmp_path / folder / "a_uncertainty.png") for folder in ("out", "faithful")]
    assert np.array_equal(*heat_maps) and np.asarray(heat_maps[0]).any()
    assert main([*call, "-o", "-"]) == 1
    assert "takes one picture" in capsys.readouterr().err
