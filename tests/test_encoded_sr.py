"""The network that encodes once: its ends, its preconditioning and the reach of its two parts."""

import math

import pytest
import torch
from conftest import make_encoded

from flowsr import EncodedSRModel
from flowsr.models.encoded_sr import SREncoding


def inputs(height: int = 10, width: int = 12, scale: int = 4, channels: int = 3, batch: int = 2) -> tuple:
    generator = torch.Generator().manual_seed(0)
    lr = torch.rand(batch, channels, height, width, generator=generator) * 2 - 1
    return torch.randn(batch, channels, scale * height, scale * width, generator=generator), lr


@torch.no_grad()
def test_at_sigma_1_the_image_is_the_mean_whatever_the_state():
    model, (sample, lr) = make_encoded(), inputs()
    mean = model.encode(lr).mean
    assert torch.equal(model(sample, 1000.0, lr).sample, mean)
    assert torch.equal(model(-3 * sample, torch.tensor([1000.0, 1000.0]), lr).sample, mean)
    assert torch.equal(model(None, None, lr).sample, mean)
    assert not torch.allclose(model(sample, torch.tensor([1000.0, 500.0]), lr).sample[1], mean[1])


@torch.no_grad()
def test_an_encoding_that_is_known_changes_nothing():
    model, (sample, lr) = make_encoded(), inputs()
    encoding = model.encode(lr)
    assert torch.equal(model(sample, 300.0, lr, encoding).sample, model(sample, 300.0, lr).sample)
    expected = model(sample, 300.0, lr, encoding, return_dict=False)
    assert torch.equal(expected[0], model(sample, 300.0, lr).sample)


@torch.no_grad()
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_a_fresh_head_gives_the_best_linear_estimate(sigma):
    """Of the error e from (1 - sigma) e + sigma s noise: least squares over a million draws is the reference."""
    s_e, s = 0.075, 0.1
    model, (_, lr) = EncodedSRModel(encoder_channels=8, encoder_blocks=1, head_channels=8, head_blocks=1), inputs()
    mean = model.encode(lr).mean
    sample = mean + 0.1 * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    image = model(sample, 1000 * sigma, lr).sample
    generator = torch.Generator().manual_seed(2)
    error = s_e * torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    state = (1 - sigma) * error + sigma * s * torch.randn(1_000_000, generator=generator, dtype=torch.float64)
    slope = float((error * state).sum() / state.square().sum())
    found = ((image - mean) / (sample - mean)).median()
    assert float(found) == pytest.approx(slope, abs=5e-3)
    # And the head's factor is the error of that estimate, so that it is to answer with unit variance.
    torch.nn.init.constant_(model.head.conv_out.bias, 1.0)
    factor = float((model(sample, 1000 * sigma, lr).sample - image).mean())
    assert factor == pytest.approx(float((error - slope * state).std()), rel=5e-3)


@torch.no_grad()
def test_a_fresh_encoder_is_close_to_bicubic():
    model, (_, lr) = EncodedSRModel(), inputs()
    bicubic = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic", antialias=True)
    assert float((model.encode(lr).mean - bicubic).std()) < 0.1


@pytest.mark.parametrize(("blocks", "head_blocks", "scale"), [(1, 1, 4), (3, 2, 2), (2, 1, 3)])
def test_receptive_fields_bound_what_a_pixel_depends_on(blocks, head_blocks, scale):
    model = make_encoded(encoder_blocks=blocks, head_blocks=head_blocks, scale_factor=scale)
    side = 2 * math.ceil(model.receptive_field / scale) + 9
    sample, lr = (x.requires_grad_() for x in inputs(side, side, scale, batch=1))
    features, mean = (x.detach().requires_grad_() for x in model.encode(lr))
    answer = model(sample, 500.0, lr, SREncoding(features, mean)).sample
    cases = {
        "encoder": (model.encode(lr).mean, lr, model.encoder_receptive_field, scale),
        "features": (answer, features, model.head_receptive_field, scale),
        "mean": (answer, mean, model.head_receptive_field, 1),
        "both": (model(sample, 500.0, lr).sample, lr, model.receptive_field, scale),
        "state": (model(sample, 500.0, lr).sample, sample, model.head_receptive_field, 1),
    }
    pixel = scale * side // 2
    for name, (answer, cause, field, unit) in cases.items():
        (gradient,) = torch.autograd.grad(answer[0, :, pixel, pixel].sum(), cause, retain_graph=True)
        seen = gradient[0].abs().sum(0).nonzero()  # positions of the cause that matter
        first, last = seen.min(0).values * unit, (seen.max(0).values + 1) * unit - 1
        assert first.min() >= pixel - field - scale, name
        assert last.max() <= pixel + field + scale, name
        assert last.max() - first.min() >= field, name  # the bound is not far too large


@torch.no_grad()
@pytest.mark.parametrize(("scale", "channels"), [(2, 3), (3, 3), (4, 1)])
def test_scales_and_channels(scale, channels):
    counts = {"in_channels": channels, "out_channels": channels, "lr_channels": channels}
    model, (sample, lr) = make_encoded(scale_factor=scale, **counts), inputs(5, 7, scale, channels)
    features, mean = model.encode(lr)
    assert features.shape == (2, 8, 5, 7)
    assert mean.shape == model(sample, 500.0, lr).sample.shape == sample.shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 1}, "equal channels"),
        ({"encoder_blocks": 0}, "`encoder_blocks` must be a whole number from 1, got 0"),
        ({"head_channels": 1.5}, "`head_channels`"),
        ({"mean_error_std": 0}, "`mean_error_std` must be positive"),
    ],
)
def test_settings_that_cannot_be_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        EncodedSRModel(**config)


def test_sizes_that_do_not_fit_are_named():
    model, (sample, lr) = make_encoded(), inputs()
    with pytest.raises(ValueError, match=r"`sample` must have shape \(2, 3, 40, 48\).*got \(2, 3, 40, 44\)"):
        model(sample[..., :-4], 500.0, lr)
    with pytest.raises(ValueError, match=r"`lr` must have shape \(batch, 3, h, w\), got \(2, 1, 10, 12\)"):
        model.encode(lr[:, :1])
