"""Both ends of the dial, their blend by a number and by a map, and what is made of a result afterwards."""

from math import erf

import numpy as np
import pytest
import torch
from conftest import make_pipeline, random_picture, smooth_picture

from flowsr.dial import at_fidelity, blend_ends, both_ends, invention_heat, resized
from flowsr.picture_file import PictureFile
from flowsr.uncertainty import FULL_HEAT


@pytest.fixture
def ends():
    pixels = np.asarray(smooth_picture(20, 16))
    return both_ends(make_pipeline(), PictureFile([pixels]), seed=3, num_inference_steps=4)


def test_the_ends_and_the_exact_answer_are_those_of_the_pipeline(ends):
    pipe = make_pipeline()
    for fidelity in (0.0, 0.5, 1.0):
        direct = pipe(
            ends.source.frames[0], fidelity=fidelity, generator=torch.Generator().manual_seed(3), output_type="np"
        ).images[0]
        assert np.array_equal(at_fidelity(pipe, ends, fidelity).frames[0], (direct * 255).round().astype(np.uint8))


def test_an_exact_answer_is_computed_once(ends):
    evaluations = []
    pipe = make_pipeline()
    pipe.unet.register_forward_hook(lambda *_: evaluations.append(1))
    first = at_fidelity(pipe, ends, 0.5)
    assert evaluations and at_fidelity(pipe, ends, 0.5) is first
    count = len(evaluations)
    at_fidelity(pipe, ends, 1.0), at_fidelity(pipe, ends, 0.0)
    assert len(evaluations) == count


def test_a_number_blends_linearly_and_a_constant_map_is_that_number():
    faithful, vivid = (np.asarray(random_picture(13, 9, seed=seed)) for seed in (0, 1))
    for fidelity in (0.0, 0.3, 1.0):
        expected = fidelity * faithful.astype(float) + (1 - fidelity) * vivid.astype(float)
        assert np.allclose(blend_ends(faithful, vivid, fidelity), expected, atol=1e-4)
        stretched = blend_ends(faithful, vivid, np.full((4, 5), fidelity), feather=2.0)
        assert np.allclose(stretched, expected, atol=1e-3)


def test_a_map_keeps_each_end_away_from_its_soft_edge():
    faithful, vivid = np.ones((40, 60, 3), np.float32), np.zeros((40, 60, 3), np.float32)
    mask = np.zeros((40, 60))
    mask[:, 30:] = 1
    mixed = blend_ends(faithful, vivid, mask, feather=2.0)[20, :, 0]
    assert np.array_equal(mixed[:23], np.zeros(23)) and np.allclose(mixed[37:], 1, atol=1e-6)
    assert (np.diff(mixed) >= 0).all()
    edge = [0.5 * (1 + erf((x + 0.5) / 2 / 2**0.5)) for x in range(3)]  # a step under a Gaussian of std 2
    assert np.allclose(mixed[30:33], edge, atol=0.01)
    assert np.array_equal(blend_ends(faithful, vivid, mask)[..., 0], mask)


@pytest.mark.parametrize("fidelity", [1.1, -0.1, float("nan"), np.ones(3), np.ones((0, 2)), np.full((2, 2), 2.0)])
def test_what_is_no_fidelity_is_refused(fidelity):
    with pytest.raises(ValueError, match="fidelity"):
        blend_ends(np.zeros((4, 4, 3)), np.zeros((4, 4, 3)), fidelity)
    with pytest.raises(ValueError, match="one shape"):
        blend_ends(np.zeros((4, 4, 3)), np.zeros((4, 5, 3)), 0.5)


def test_heat_is_black_where_nothing_was_invented_and_white_from_a_fixed_difference_on():
    faithful = np.full((4, 4, 3), 100, np.uint8)
    vivid = faithful.copy()
    vivid[0] += np.uint8(np.ceil(255 * FULL_HEAT))
    heat = invention_heat(faithful, vivid)
    assert (heat[1:] == 0).all() and (heat[0] == 255).all()
    assert np.array_equal(heat, invention_heat(faithful.astype(np.uint16) * 257, vivid.astype(np.uint16) * 257))


def test_a_smaller_output_has_its_size_and_resolution(ends):
    ends.vivid.resolution = (288.0, 288.0)
    half = resized(ends.vivid, (32, 40))
    assert half.frames[0].shape == (32, 40, 3) and half.resolution == (144.0, 144.0)
    assert resized(ends.vivid, (64, 80)) is ends.vivid
    flat = PictureFile([np.full((64, 80, 3), 40000, np.uint16)])
    assert np.array_equal(resized(flat, (48, 60)).frames[0], np.full((48, 60, 3), 40000))


def test_a_picture_without_a_dial_or_of_several_frames_is_refused():
    frame = np.asarray(smooth_picture(8, 8))
    with pytest.raises(ValueError, match="2 frames"):
        both_ends(make_pipeline(), PictureFile([frame, frame]))
