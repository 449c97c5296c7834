"""Generation from noise against flows whose end is known."""

import numpy as np
import pytest
import torch
from conftest import make_unet, random_picture, seeded
from diffusers import ConfigMixin, DDIMScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config

from flowsr import FlowMatchPipeline, FlowMatchSREulerScheduler, FlowMatchSRPipeline

STD = 0.5
MEANS = torch.tensor([-0.4, 0.1, 0.6])


class GaussianFlow(ModelMixin, ConfigMixin):
    """The exact velocity where pictures of class c are N(MEANS[c], STD^2), and N(0, STD^2) without a class.

    On x_t = (1 - sigma) hr + sigma noise: E[noise - hr | x_t], by the rule for Gaussians (Lipman et al. 2023, eq. 20).
    """

    @register_to_config
    def __init__(
        self, in_channels: int = 3, num_class_embeds: int = 3, lr_channels: int | None = None,
        condition_dropout: float = 0.1,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("means", torch.cat([MEANS, torch.zeros(1)]))  # the last: no class

    def forward(self, sample, timestep, class_labels=None, return_dict=False):
        sigma = timestep / 1000
        mean = self.means[class_labels][:, None, None, None]
        variance = (1 - sigma) ** 2 * STD**2 + sigma**2
        return ((sigma - (1 - sigma) * STD**2) / variance * (sample - (1 - sigma) * mean) - mean,)


def make_pipe(unet, **config) -> FlowMatchPipeline:
    scheduler = FlowMatchSREulerScheduler(source="noise", source_noise_std=1.0, prediction_type="velocity")
    pipe = FlowMatchPipeline(unet, scheduler, **{"sample_size": [6, 5], **config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_guidance_moves_the_class_by_its_scale(guidance_scale, solver):
    # The velocities with and without class differ by a function of time alone, so that guidance by g is the flow to
    # N(g * mean, STD^2); that flow takes a source x to g * mean + STD * x.
    pipe = make_pipe(GaussianFlow())
    source = torch.randn(3, 3, 6, 5, generator=seeded())
    out = pipe(
        class_labels=[0, 1, 2], num_inference_steps=40, solver=solver, rtol=1e-6, atol=1e-6,
        guidance_scale=guidance_scale, latents=source, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(out, guidance_scale * MEANS[:, None, None, None] + STD * source, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("solver", "a_step"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("dopri5", 0)])
def test_the_number_of_evaluations_is_that_of_network_calls(solver, a_step):
    pipe, seen = make_pipe(GaussianFlow()), []
    pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    pipe(2, num_inference_steps=5, solver=solver)
    assert pipe.num_evaluations == len(seen)
    assert len(seen) == 5 * a_step or solver == "dopri5"
    pipe(class_labels=[0, 1], num_inference_steps=5, solver=solver, guidance_scale=2.0)
    assert len(seen) % 3 == 0 or solver == "dopri5"  # with guidance each evaluation looks twice
    assert pipe.num_evaluations == 5 * a_step or solver == "dopri5"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("solver", ["euler", "heun", "rk4"])
def test_a_batch_is_its_pictures_one_by_one(channels, solver):
    unet = make_unet(
        in_channels=channels, out_channels=channels, lr_channels=None, scale_factor=1, patch_size=1,
        precondition=False, num_class_embeds=3, norm="layer", condition_dropout=0.1,
    )  # fmt: skip
    pipe = make_pipe(unet)
    options = {"num_inference_steps": 3, "solver": solver, "guidance_scale": 1.5}
    together = pipe(class_labels=[2, 0], generator=[seeded(0), seeded(1)], output_type="pt", **options).images
    assert together.shape == (2, channels, 6, 5)
    for number, label in enumerate((2, 0)):
        alone = pipe(class_labels=[label], generator=[seeded(number)], output_type="pt", **options).images
        torch.testing.assert_close(alone, together[number : number + 1], atol=1e-5, rtol=0)
    pictures = pipe(class_labels=[2, 0], generator=[seeded(0), seeded(1)], **options).images
    assert [picture.mode for picture in pictures] == ["L" if channels == 1 else "RGB"] * 2
    expected = (together.permute(0, 2, 3, 1).numpy() * 255).round()
    assert np.array_equal(np.stack([np.asarray(p).reshape(6, 5, channels) for p in pictures]), expected)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_classes_in_any_kind_of_list(kind):
    labels = kind([2, 0])
    out = make_pipe(GaussianFlow())(class_labels=labels, num_inference_steps=20, output_type="latent").images
    torch.testing.assert_close(out.mean((1, 2, 3)), MEANS[[2, 0]], atol=0.2, rtol=0)


def test_what_cannot_be_generated_is_refused():
    pipe = make_pipe(GaussianFlow())
    for labels in ([[1], [1]], [1.5], [3], -1):
        with pytest.raises(ValueError, match=r"whole numbers in 0\.\.2"):
            pipe(class_labels=labels)
    with pytest.raises(ValueError, match="no class to be guided to"):
        pipe(guidance_scale=2.0)
    with pytest.raises(ValueError, match="without condition dropout"):
        make_pipe(GaussianFlow(condition_dropout=0.0))(class_labels=1, guidance_scale=2.0)
    cases = {
        "`num_inference_steps` must be a whole number from 1, got 2.5": {"num_inference_steps": 2.5},
        "`batch_size` must be a whole number from 1, got 1.5": {"batch_size": 1.5},
        "one label per image, got 2 for 3": {"batch_size": 3, "class_labels": [0, 1]},
        "`guidance_scale` must be a finite number": {"class_labels": 1, "guidance_scale": float("nan")},
        "`generator` must be a torch.Generator": {"generator": 0},
        "`latents` hold NaN": {"latents": torch.full((1, 3, 6, 5), torch.nan)},
        "`rtol` must be a positive number": {"solver": "dopri5", "rtol": 0},
        "`callback_on_step_end` must return a dict": {"callback_on_step_end": lambda *_: None},
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    half = make_unet(lr_channels=None, precondition=False, patch_size=1, scale_factor=1).to(torch.float16)
    with pytest.raises(ValueError, match="bfloat16"):
        make_pipe(half)()
    broken = make_unet(lr_channels=None, precondition=False, patch_size=1, scale_factor=1)
    broken.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        make_pipe(broken)()
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="needs a FlowMatchSREulerScheduler.* got DDIMScheduler"):
        pipe(class_labels=1)
    with pytest.raises(ValueError, match="needs a FlowMatchSREulerScheduler.* got DDIMScheduler"):
        FlowMatchSRPipeline(make_unet(), DDIMScheduler())(random_picture(4, 4))
