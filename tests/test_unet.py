"""The network: what it computes, for which settings, and that it says so when it cannot."""

import pytest
import torch
from conftest import make_unet

from flowsr import UNetSRModel

ORIGINAL = {  # the flow-matching x4 network that this library grew from
    "patch_size": 1,
    "layers_per_block": 2,
    "norm": "group",
    "mid_attention": True,
    "precondition": False,
    "bicubic_coefficient": -0.75,
}


def inputs(unet: UNetSRModel, batch: int = 2, height: int = 6, width: int = 8):
    generator = torch.Generator().manual_seed(1)
    scale = unet.config.scale_factor
    sample = torch.rand(batch, 3, height * scale, width * scale, generator=generator) * 2 - 1
    lr = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
    return sample, torch.tensor([900.0, 100.0])[:batch], lr


def test_by_config_it_is_the_original_network():
    with torch.device("meta"):
        unet = UNetSRModel(block_out_channels=(48, 96, 192), **ORIGINAL)
    assert unet.num_parameters() == 6_976_771
    assert unet.conv_in.in_channels == 6


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"norm": "layer"},
        {"norm": "group"},
        {"mid_attention": True, "num_attention_heads": 2},
        {"attention_levels": (0,), "num_attention_heads": 2},
        {"block_out_channels": (8, 16), "layers_per_block": 2, "mid_layers": 0},
        {"block_out_channels": (8, 8, 16), "patch_size": 1, "precondition": False},
        {"patch_size": 2},
        {"scale_factor": 2, "patch_size": 2},
        {"precondition": False},
    ],
)
def test_shapes_gradients_and_round_trip(config, tmp_path):
    unet = make_unet(**config)
    sample, timestep, lr = inputs(unet, height=8)
    out = unet(sample, timestep, lr).sample
    assert out.shape == sample.shape
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters() if p.numel() > 1)
    unet.save_pretrained(tmp_path)
    loaded = UNetSRModel.from_pretrained(tmp_path, disable_mmap=True)
    with torch.no_grad():
        assert torch.equal(loaded(sample, timestep, lr).sample, unet(sample, timestep, lr).sample)


def test_without_lr_and_with_classes_it_generates():
    unet = make_unet(
        in_channels=1, out_channels=1, lr_channels=None, scale_factor=1, patch_size=1, precondition=False,
        num_class_embeds=10,
    )  # fmt: skip
    sample = torch.randn(2, 1, 8, 8)
    outs = [unet(sample, 500.0, class_labels=torch.tensor(labels)).sample for labels in ([3, 7], [3, 10])]
    assert torch.equal(outs[0][0], outs[1][0])
    assert not torch.equal(outs[0][1], outs[1][1])


def test_a_batch_is_its_pictures_one_by_one():
    unet = make_unet()
    sample, timestep, lr = inputs(unet)
    with torch.no_grad():
        together = unet(sample, timestep, lr).sample
        for i in range(2):
            alone = unet(sample[i : i + 1], timestep[i : i + 1], lr[i : i + 1]).sample
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=1e-5)


def test_preconditioning_is_that_of_the_gaussian_posterior():
    # For hr - lr_up ~ N(0, s_r^2) the best estimate from x_t is c_skip * (x_t - lr_up), with an error of variance
    # c_out^2: estimated by least squares on samples.
    unet = UNetSRModel(residual_std=0.2, source_noise_std=0.5)
    residual, noise = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    residual, noise = 0.2 * residual, 0.5 * noise
    for sigma in (0.1, 0.5, 0.9):
        x = (1 - sigma) * residual + sigma * noise
        c_skip, c_out = (float(c) for c in unet.preconditioning(torch.tensor(sigma, dtype=torch.float64)))
        assert abs(c_skip - float((x * residual).mean() / x.square().mean())) < 0.01
        assert abs(c_out - float((residual - c_skip * x).std())) < 0.002


def test_at_sigma_one_the_noise_does_not_reach_the_answer():
    unet = make_unet()
    sample, _, lr = inputs(unet)
    with torch.no_grad():
        answers = [unet(sample + noise, 1000.0, lr).sample for noise in (0.0, torch.randn_like(sample))]
        torch.testing.assert_close(*answers, atol=1e-6, rtol=0)
        answers = [unet(sample + noise, 990.0, lr).sample for noise in (0.0, torch.randn_like(sample))]
        assert not torch.allclose(*answers, atol=1e-4)


def test_at_sigma_one_a_silent_network_returns_the_upsampled_lr():
    unet = make_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    sample, _, lr = inputs(unet)
    lr_up = torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic", antialias=True)
    with torch.no_grad():
        torch.testing.assert_close(unet(sample, 1000.0, lr).sample, lr_up, atol=1e-6, rtol=0)
        torch.testing.assert_close(unet(sample, 0.0, lr).sample, sample, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [{}, {"norm": "layer"}, {"layers_per_block": 2, "mid_layers": 0}, {"patch_size": 2}, {"patch_size": 1},
     {"block_out_channels": (8, 8)}, {"block_out_channels": (4, 4, 4), "patch_size": 1},
     {"precondition": False, "lr_detail": True}],
)  # fmt: skip
def test_receptive_field_bounds_what_a_pixel_depends_on(config):
    unet = make_unet(**config).double()
    side = 4 * ((2 * unet.receptive_field + 40) // 16 * 4)
    for offset in range(0, 2 * unet.size_multiple, max(1, unet.size_multiple // 3)):
        sample = torch.rand(1, 3, side, side, dtype=torch.float64, requires_grad=True)
        lr = torch.rand(1, 3, side // 4, side // 4, dtype=torch.float64, requires_grad=True)
        centre = side // 2 + offset
        unet(sample, 500.0, lr).sample[0, :, centre, centre].sum().backward()
        for grad, pixel in ((sample.grad, 1), (lr.grad, 4)):
            seen = grad[0].abs().sum(0).nonzero() * pixel
            assert seen.min() >= centre - unet.receptive_field - pixel
            assert seen.max() <= centre + unet.receptive_field + pixel


@pytest.mark.parametrize("config", [{"norm": "group"}, {"mid_attention": True}, {"attention_levels": (0,)}])
def test_networks_that_see_everything_say_so(config):
    assert UNetSRModel(block_out_channels=(8,), **config).receptive_field is None


@pytest.mark.parametrize("config", [{"precondition": False, "lr_detail": True}, {}])
def test_the_detail_of_the_lr_is_what_differs_from_its_neighbourhood(config):
    unet, seen = make_unet(residual_std=0.25, **config), []
    sample, timestep, lr = inputs(unet)
    unet.conv_in.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    unet(sample, timestep, lr)
    shown, detail = seen[0][:, -6:-3], seen[0][:, -3:]
    torch.testing.assert_close(shown, lr)
    height, width = lr.shape[-2:]
    for y, x in ((0, 0), (height - 1, 1), (height // 2, width // 2)):
        around = lr[:, :, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3].mean((2, 3))
        torch.testing.assert_close(detail[:, :, y, x], (lr[:, :, y, x] - around) / 0.25)


def test_dropped_condition_hides_the_detail_of_the_lr():
    unet = make_unet()
    sample, timestep, lr = inputs(unet)
    drop = torch.tensor([True, False])
    with torch.no_grad():
        dropped, kept = unet(sample, timestep, lr, drop_condition=drop).sample, unet(sample, timestep, lr).sample
    assert torch.equal(dropped[1], kept[1])
    assert not torch.allclose(dropped[0], kept[0])


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        unet = make_unet(mid_attention=True, num_attention_heads=2).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        sample, timestep, lr = inputs(unet)
        unet(sample, timestep, lr).sample.square().mean().backward()
        grads.append([p.grad for p in unet.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


def test_bfloat16_weights_keep_the_picture_precise():
    # Only the residual passes through the convolutions: the picture itself is not rounded to 8 bits of mantissa.
    unet = make_unet()
    sample, timestep, lr = inputs(unet)
    with torch.no_grad():
        exact = unet(sample, timestep, lr).sample
        rounded = unet.to(torch.bfloat16)(sample, timestep, lr).sample
    assert rounded.dtype == torch.float32
    scale = float((exact - sample).std())
    assert float((rounded - exact).std()) < 0.02 * scale


def test_wrong_inputs_are_named():
    unet = make_unet(block_out_channels=(8, 8))
    sample, timestep, lr = inputs(unet)
    with pytest.raises(ValueError, match="multiples of 8, got 20x32"):
        unet(sample[:, :, :20], timestep, lr[:, :, :5])
    with pytest.raises(ValueError, match="3 channels"):
        unet(sample[:, :2], timestep, lr)
    with pytest.raises(ValueError, match="needs a low-resolution condition"):
        unet(sample, timestep)
    with pytest.raises(ValueError, match=r"`lr` must have shape \(2, 3, 6, 8\)"):
        unet(sample, timestep, lr[:, :, :4])
    with pytest.raises(ValueError, match="was built without .*class_labels"):
        unet(sample, timestep, lr, class_labels=torch.zeros(2, dtype=torch.long))
    wrong = {
        "norm": "batch",
        "attention_levels": (1,),
        "bicubic_coefficient": -1.0,
        "residual_std": 0.0,
        "lr_channels": None,
        "layers_per_block": 0,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name if name != "lr_channels" else "precondition"):
            UNetSRModel(**{name: value})
    with pytest.raises(ValueError, match="norm_num_groups"):
        UNetSRModel(block_out_channels=(12,), norm="group")
    with pytest.raises(ValueError, match="`lr_detail=True` needs a positive `residual_std`"):
        UNetSRModel(precondition=False, lr_detail=True, residual_std=0.0)
