"""The random chains: each step against what it is said to do. (MATLAB's bicubic is tested in test_metrics.py.)"""

import numpy as np
import pytest
import torch
from conftest import random_picture, smooth_picture

from flowsr.degradations import (
    CHAINS,
    blur,
    degrade,
    gaussian_kernel,
    gaussian_noise,
    jpeg,
    poisson_noise,
    random_kernel,
    random_resize,
    sinc_kernel,
)


def moments(kernel: torch.Tensor) -> np.ndarray:
    """Second moments of a kernel about its middle: [[xx, xy], [xy, yy]]."""
    offset = torch.arange(len(kernel)).double() - (len(kernel) - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    k = kernel.double()
    return np.array([[(k * x * x).sum(), (k * x * y).sum()], [(k * x * y).sum(), (k * y * y).sum()]])


def test_gaussian_kernels_have_the_covariance_asked_for():
    angle, sigmas = 0.6, (3.0, 1.5)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    expected = turn @ np.diag(np.square(sigmas)) @ turn.T
    kernel = gaussian_kernel(41, sigmas, angle)
    assert abs(float(kernel.sum()) - 1) < 1e-6
    np.testing.assert_allclose(moments(kernel), expected, rtol=1e-3)


def test_a_plateau_is_flatter_in_the_middle_than_a_gaussian():
    plain = gaussian_kernel(21, (3.0, 3.0), 0.0)
    plateau = gaussian_kernel(21, (3.0, 3.0), 0.0, beta=2.0, plateau=True)
    middle = lambda k: float(k[10, 11] / k[10, 10])  # noqa: E731
    assert middle(plateau) > middle(plain)


def test_the_sinc_filter_keeps_low_frequencies_and_stops_high_ones():
    x = torch.arange(128).float()
    kernel = sinc_kernel(21, np.pi / 2)
    for frequency, low, high in ((np.pi / 8, 0.9, 1.1), (np.pi * 0.9, 0.0, 0.12)):
        wave = torch.cos(frequency * x).expand(3, 128, 128) * 0.4
        gain = float(blur(wave, kernel)[:, 20:-20, 20:-20].std() / wave.std())
        assert low <= gain <= high


def test_noise_has_the_strength_asked_for():
    grey = torch.full((3, 128, 128), 0.5)
    for seed in range(4):
        noisy = gaussian_noise(grey, np.random.default_rng(seed), (10, 10)) - grey
        assert abs(float(noisy.std()) * 255 - 10) < 0.3
        shot = poisson_noise(grey, np.random.default_rng(seed), (2.0, 2.0)) - grey
        assert abs(float(shot.std()) * 255 - 2 * np.sqrt(127.5)) < 0.7
        assert abs(float(shot.mean())) * 255 < 1


def test_jpeg_of_lower_quality_is_farther_away():
    picture = torch.from_numpy(np.array(smooth_picture(64, 64))).permute(2, 0, 1).float() / 255
    random = np.random.default_rng(0)
    errors = [float((jpeg(picture, random, (q, q)) - picture).square().mean()) for q in (95, 60, 20)]
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 1e-3


def test_random_kernels_sum_to_one_and_resizing_stays_in_its_span():
    for seed in range(60):
        random = np.random.default_rng(seed)
        kernel = random_kernel(random, (0.2, 3.0), 0.1)
        assert abs(float(kernel.sum()) - 1) < 1e-5
        assert kernel.shape[0] in range(7, 22, 2)
        rows = random_resize(torch.zeros(3, 40, 40), random, (0.2, 0.7, 0.1), (0.15, 1.5), (40, 40)).shape[1]
        assert 6 <= rows <= 60


@pytest.mark.parametrize("chain", ["bicubic", *CHAINS])
@pytest.mark.parametrize("size", [(64, 48), (8, 8)])
def test_chains_give_the_lr_size_and_depend_on_their_generator_alone(chain, size):
    picture = np.array(random_picture(*size))
    outputs = [degrade(picture, 4, chain, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert outputs[0].shape == (size[1] // 4, size[0] // 4, 3)
    assert outputs[0].dtype == np.uint8
    assert np.array_equal(outputs[0], outputs[1])
    assert chain == "bicubic" or not np.array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_keep_the_picture_recognisable_on_average(chain):
    picture = np.array(smooth_picture(96, 96))
    clean = degrade(picture, 4, "bicubic", np.random.default_rng(0)).astype(float)
    mean = np.mean([degrade(picture, 4, chain, np.random.default_rng(seed)).astype(float) for seed in range(24)], 0)
    assert np.corrcoef(clean.ravel(), mean.ravel())[0, 1] > 0.6


def test_unknown_chains_are_named():
    with pytest.raises(ValueError, match="must be one of .*real_esrgan.*got 'rain'"):
        degrade(np.zeros((8, 8, 3), np.uint8), 4, "rain", np.random.default_rng(0))
