"""Downscaling and its pseudo-inverse, against dense linear algebra and Pillow."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import random_picture

from flowsr.degradations import bicubic_matrix, matlab_bicubic
from flowsr.pipelines.consistency import downscale, make_consistent, upscale_minimum_norm

SIZES = [(1, 1), (1, 5), (7, 3), (24, 33)]


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_filters_equal_dense_matrices(scale, size):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    hr = torch.randn(2, 3, height * scale, width * scale, dtype=torch.float64, generator=generator)
    lr = torch.randn(2, 3, height, width, dtype=torch.float64, generator=generator)
    rows, columns = (torch.from_numpy(bicubic_matrix(side * scale, scale)) for side in size)
    torch.testing.assert_close(downscale(hr, scale), rows @ hr @ columns.T, atol=1e-12, rtol=0)
    minimum_norm = torch.linalg.pinv(rows) @ lr @ torch.linalg.pinv(columns).T
    torch.testing.assert_close(upscale_minimum_norm(lr, scale), minimum_norm, atol=1e-6, rtol=0)


def test_exact_is_the_closest_consistent_picture():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 3, 48, 40, generator=generator, dtype=torch.float64) - 0.5
    estimate = truth + 0.1 * torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    lr = downscale(truth, 4)
    corrected = make_consistent(estimate, lr, 4, "exact")
    torch.testing.assert_close(downscale(corrected, 4), lr, atol=1e-6, rtol=0)
    # Pythagoras: the truth is consistent too, so projecting can only come closer to it.
    before, after, moved = (
        float((a - b).square().sum()) for a, b in ((estimate, truth), (corrected, truth), (estimate, corrected))
    )
    assert abs(before - after - moved) < 1e-4 * before


def test_exact_stays_in_range():
    lr = torch.rand(1, 3, 10, 12, generator=torch.Generator().manual_seed(0)).round() * 2 - 1
    out = make_consistent(torch.zeros(1, 3, 40, 48), lr, 4, "exact")
    assert out.abs().max() <= 1


def test_soft_cures_a_tint_and_leaves_fine_differences():
    truth = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)) - 0.5
    lr = downscale(truth, 4)
    tinted = truth + torch.tensor([0.1, 0.0, -0.1])[None, :, None, None]
    torch.testing.assert_close(make_consistent(tinted, lr, 4, "soft"), truth, atol=1e-5, rtol=0)
    checkers = ((torch.arange(24)[:, None] + torch.arange(24)) % 2 * 0.2 - 0.1).float()
    noisy_lr = lr + checkers
    assert float((make_consistent(truth, noisy_lr, 4, "soft") - truth).abs().max()) < 0.01


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_downscaling_agrees_with_pillow_away_from_the_edges(scale):
    # Not too contrasty: both clip between their two passes, but in different order.
    picture = random_picture(30 * scale, 20 * scale).point(lambda level: 64 + level // 2)
    ours = matlab_bicubic(np.asarray(picture), scale).astype(int)
    pillows = np.asarray(picture.resize((30, 20), PIL.Image.BICUBIC)).astype(int)
    assert np.abs(ours - pillows)[3:-3, 3:-3].max() <= 1


def test_downscaling_wants_multiples_and_uint8():
    with pytest.raises(ValueError, match="multiple of the scale 4, got 10"):
        matlab_bicubic(np.zeros((10, 8, 3), np.uint8), 4)
    with pytest.raises(TypeError, match="uint8"):
        matlab_bicubic(np.zeros((8, 8, 3)), 4)
