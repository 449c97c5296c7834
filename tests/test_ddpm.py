"""The diffusion pipeline and the context network."""

import inspect
import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from bad_calls import BAD_ARGUMENTS, BAD_IMAGES
from conftest import make_context_unet, make_ddpm, make_unet, random_picture, seeded
from diffusers import (
    ConfigMixin,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    ModelMixin,
    PNDMScheduler,
    RePaintScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import register_to_config

from flowsr import ContextUNetSRModel, DDPMSRPipeline, FlowMatchSRPipeline
from flowsr.cli import main

CONCATENATION = {"patch_size": 1, "precondition": False, "block_out_channels": (8, 8)}


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (13, 17)])
@pytest.mark.parametrize("target", ["residual", "image"])
@pytest.mark.parametrize("network", [make_context_unet, lambda: make_unet(**CONCATENATION)])
def test_output_is_exactly_scale_times_the_input(size, target, network):
    out = make_ddpm(network(), target=target)(random_picture(*size), num_inference_steps=2).images[0]
    assert out.size == (size[0] * 4, size[1] * 4)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_any_scheduler_of_diffusers_and_the_seed_decides(scheduler):
    pipe = make_ddpm(scheduler=scheduler(prediction_type="epsilon"))
    first, again, other = (
        pipe(random_picture(5, 4), 3, generator=seeded(s), output_type="latent").images for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


class Oracle(ContextUNetSRModel):
    """Knows the residual, and predicts what leads to it: the exact v for this schedule."""

    def forward(self, sample, timestep, lr, drop_condition=None, return_dict=True):
        alpha = self.alphas_cumprod[timestep.long()].to(sample)
        noise = (sample - alpha.sqrt() * self.residual) / (1 - alpha).sqrt()
        return (alpha.sqrt() * noise - (1 - alpha).sqrt() * self.residual,)


@pytest.mark.parametrize(("steps", "residual_std"), [(1, 1.0), (3, 1.0), (20, 1.0), (3, 0.25)])
def test_perfect_v_prediction_arrives_exactly_at_the_residual(steps, residual_std):
    unet = Oracle(block_out_channels=(8,), layers_per_block=1)
    pipe = make_ddpm(unet, residual_std=residual_std)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    unet.alphas_cumprod = pipe.scheduler.alphas_cumprod
    unet.residual = 0.2 * torch.randn(1, 3, 16, 20, generator=seeded())
    latent = pipe(random_picture(5, 4), steps, generator=seeded(1), output_type="latent").images
    torch.testing.assert_close(latent, unet.residual, atol=2e-3, rtol=0)
    picture = torch.full((1, 3, 4, 5), 0.5)
    out = pipe(picture, steps, generator=seeded(1), output_type="pt").images
    expected = F.interpolate(picture, scale_factor=4.0, mode="bicubic", antialias=True)
    expected = expected + residual_std * unet.residual / 2
    torch.testing.assert_close(out, expected.clamp(0, 1), atol=2e-3, rtol=0)


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The best possible network where each pixel of the picture is N(mean, std^2) whatever the LR.

    With x_t = a x + s noise, E[x | x_t] = mean + a std^2 (x_t - a mean) / (a^2 std^2 + s^2); a^2 is the product of
    1 - beta, written down here anew (Ho et al. 2020; Nichol and Dhariwal 2021, eq. 17).
    """

    size_multiple, receptive_field = 1, 0

    @register_to_config
    def __init__(
        self, betas: str, predicts: str, mean: float, std: float, in_channels: int = 3, scale_factor: int = 4
    ):
        super().__init__()
        t = torch.arange(1001, dtype=torch.float64) / 1000
        if betas == "linear":
            steps = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        else:
            f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
            steps = (f[1:] / f[:-1]).clamp(min=0.001)
        products = steps.cumprod(0)
        self.register_buffer("log_sigma", ((1 - products) / products).log() / 2)

    def forward(self, sample, timestep, lr, return_dict=False):
        low = int(timestep)
        high = min(low + 1, 999)
        sigma = torch.lerp(self.log_sigma[low], self.log_sigma[high], float(timestep) - low).exp()
        a, s = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        mean, std = self.config.mean, self.config.std
        x = mean + a * std**2 * (sample.double() - a * mean) / (a**2 * std**2 + s**2)
        noise = (sample.double() - a * x) / s
        answers = {"sample": x, "epsilon": noise, "v_prediction": a * noise - s * x}
        return (answers[self.config.predicts].to(sample.dtype),)


MEAN, STD = 0.25, 0.4


def gaussian_sample(scheduler, steps: int, predicts: str = "epsilon", betas: str = "linear", **options):
    pipe = make_ddpm(GaussianDenoiser(betas, predicts, MEAN, STD), scheduler)
    lr = torch.full((1, 3, 25, 25), 0.5)  # 30,000 draws: the mean is known to 0.0023, the std to 0.0016
    return pipe(lr, steps, generator=seeded(), output_type="latent", **options).images


def std_after(steps: int, eta: float, betas: str = "linear") -> float:
    """What the best network leads to in evenly spaced steps of Song et al. 2021, eq. 12 and 16: all is linear."""
    log_sigma = GaussianDenoiser(betas, "sample", MEAN, STD).log_sigma
    alpha = [1.0] + [float(1 / (1 + log_sigma[t].mul(2).exp())) for t in range(1000 // steps - 1, 1000, 1000 // steps)]
    variance = 1.0
    for now, after in zip(alpha[:0:-1], alpha[-2::-1]):
        noise = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        to_image, to_noise = now**0.5 * STD**2, (1 - now) ** 0.5  # of a deviation in x_t, times its variance
        factor = (after**0.5 * to_image + (1 - after - noise) ** 0.5 * to_noise) / (now * STD**2 + 1 - now)
        variance = factor**2 * variance + noise
    return variance**0.5


@pytest.mark.parametrize("betas", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_fifty_steps_of_ddim_and_a_thousand_of_ddpm_draw_from_the_known_distribution(betas, predicts):
    config = {"beta_schedule": betas, "prediction_type": predicts, "clip_sample": False}
    if betas == "linear":
        config |= {"beta_start": 1e-4, "beta_end": 0.02}
    ddim = DDIMScheduler(**config, timestep_spacing="trailing")
    for scheduler, steps, eta, options in (
        (ddim, 50, 0.0, {}),
        (ddim, 50, 0.5, {"eta": 0.5}),
        (DDPMScheduler(**config), 1000, 1.0, {}),
    ):
        pixels = gaussian_sample(scheduler, steps, predicts, betas, **options)
        assert abs(float(pixels.mean()) - MEAN) < 0.01
        assert abs(float(pixels.std()) - STD) < (0.04 if steps == 50 else 0.01)
        assert abs(float(pixels.std()) - std_after(steps, eta, betas)) < 0.005


DETERMINISTIC = [
    DDIMScheduler, DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler, UniPCMultistepScheduler,
    EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler, LMSDiscreteScheduler, PNDMScheduler,
    DEISMultistepScheduler,
]  # fmt: skip


@pytest.mark.parametrize("scheduler", [*DETERMINISTIC, EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_every_scheduler_by_swap_draws_from_the_known_distribution(scheduler):
    first = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")
    pixels = gaussian_sample(scheduler.from_config(first.config), 100)
    expected = STD if scheduler in DETERMINISTIC else std_after(100, eta=1)
    assert abs(float(pixels.mean()) - MEAN) < 0.01
    assert abs(float(pixels.std()) - expected) < (0.02 if scheduler in DETERMINISTIC else 0.005)


def test_trailing_spacing_starts_where_training_ended():
    # One step must lead from pure noise to the mean; "leading" takes the noise for a picture that is nearly clean.
    for spacing, start, mean, std in (("trailing", 999, MEAN, 0.0), ("leading", 0, 0.0, 1.0)):
        scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing=spacing)
        pixels = gaussian_sample(scheduler, 1)
        assert scheduler.timesteps.tolist() == [start]
        assert abs(float(pixels.mean()) - mean) < 0.02
        assert abs(float(pixels.std()) - std) < 0.01


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (FlowMatchEulerDiscreteScheduler(), "does not reverse a diffusion"),
        (EDMEulerScheduler(), "does not reverse a diffusion"),
        (
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
            "does not reverse a diffusion",
        ),
        (RePaintScheduler(), "does not reverse a diffusion"),
        (DDIMInverseScheduler(), "another task"),
        (DDPMScheduler(variance_type="learned_range"), "learned variance"),
    ],
)
def test_schedulers_that_cannot_are_refused_before_any_work(scheduler, message):
    with pytest.raises(ValueError, match=message):
        make_ddpm(scheduler=scheduler)(random_picture(4, 4), 2)


def test_evaluations_are_counted():
    pipe = make_ddpm(scheduler=HeunDiscreteScheduler(prediction_type="v_prediction"))
    seen = []
    pipe.unet.register_forward_hook(lambda *_: seen.append(1))
    pipe(random_picture(4, 4), 3, generator=seeded())
    assert pipe.num_evaluations == pipe.num_timesteps == len(seen) == 5
    with pytest.raises(ValueError, match="must not exceed the 1000 steps"):
        pipe(random_picture(4, 4), 1001)


def test_the_residual_is_added_to_the_cubic_of_the_config():
    picture = torch.rand(1, 3, 6, 5, generator=seeded())
    unet = Oracle(block_out_channels=(8,), layers_per_block=1)
    unet.residual = torch.zeros(1, 3, 24, 20)
    for coefficient, antialias in ((-0.5, True), (-0.75, False)):  # torch's two kernels
        pipe = make_ddpm(unet)
        pipe.register_to_config(bicubic_coefficient=coefficient)
        unet.alphas_cumprod = pipe.scheduler.alphas_cumprod
        out = pipe(picture, 1, latents=torch.zeros(1, 3, 24, 20), output_type="pt").images
        expected = F.interpolate(picture * 2 - 1, scale_factor=4.0, mode="bicubic", antialias=antialias)
        torch.testing.assert_close(out, ((expected + 1) / 2).clamp(0, 1), atol=1e-5, rtol=0)


def test_a_thousand_steps_are_those_of_the_tutorial():
    # Ho et al. 2020, algorithm 2, with sigma_t^2 = beta_t: as the original project wrote it, without its clamping.
    unet = GaussianDenoiser("linear", "epsilon", MEAN, STD)
    pipe = make_ddpm(unet, DDPMScheduler(variance_type="fixed_large", clip_sample=False))
    drawn = pipe(torch.full((1, 3, 2, 2), 0.5), 1000, generator=seeded(), output_type="latent").images
    betas, generator = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), seeded()
    alpha_bars = (1 - betas).cumprod(0)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    for t in range(999, -1, -1):
        mean = (x - betas[t] / (1 - alpha_bars[t]).sqrt() * unet(x, t, None)[0]) / (1 - betas[t]).sqrt()
        x = mean + (betas[t].sqrt() * torch.randn(x.shape, generator=generator) if t > 0 else 0)
    torch.testing.assert_close(drawn, x.float(), atol=1e-3, rtol=0)


def test_a_list_is_its_pictures_one_by_one():
    pipe = make_ddpm()
    for pictures in ([random_picture(6, 5, seed=i) for i in range(2)], [random_picture(6 + i, 5) for i in range(2)]):
        together = pipe(pictures, 2, generator=[seeded(i) for i in range(2)]).images
        alone = [pipe(p, 2, generator=seeded(i)).images[0] for i, p in enumerate(pictures)]
        for a, b in zip(together, alone):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1


def test_eta_adds_noise_to_ddim_only():
    pipe, picture = make_ddpm(), random_picture(5, 4)
    latents = torch.randn(1, 3, 16, 20, generator=seeded())
    calm = [pipe(picture, 3, latents=latents, generator=seeded(s), output_type="latent").images for s in (1, 2)]
    lively = [pipe(picture, 3, 1.0, latents=latents, generator=seeded(s), output_type="latent").images for s in (1, 2)]
    assert torch.equal(*calm)
    assert not torch.equal(*lively)
    with pytest.raises(ValueError, match="DDPMScheduler has none"):
        make_ddpm(scheduler=DDPMScheduler())(picture, eta=0.5)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pipe(picture, eta=2.0)


def test_tiles_consistency_callbacks_and_modes():
    pipe = make_ddpm()
    seen = []
    watch = lambda _, step, timestep, tensors: seen.append(step) or tensors  # noqa: E731
    out = pipe(random_picture(30, 20, "LA"), 2, tile=12, consistency="soft", callback_on_step_end=watch).images[0]
    assert out.size == (120, 80)
    assert out.mode == "LA"
    assert seen == [0, 1]


def test_bad_input_is_refused():
    pipe = make_ddpm()
    with pytest.raises(ValueError, match="NaN"):
        pipe(np.full((4, 4, 3), np.nan, np.float32))
    with pytest.raises(ValueError, match="`latents`"):
        pipe(random_picture(4, 4), latents=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="`target`"):
        make_ddpm(target="both")
    with pytest.raises(ValueError, match="`bicubic_coefficient`"):
        DDPMSRPipeline(make_context_unet(), DDIMScheduler(), bicubic_coefficient=-1.0)
    with pytest.raises(ValueError, match="`residual_std` must be positive"):
        make_ddpm(residual_std=0.0)
    with pytest.raises(ValueError, match="1 for the target 'image'"):
        make_ddpm(target="image", residual_std=0.1)
    with pytest.raises(ValueError, match="condition dropout"):
        pipe(random_picture(4, 4), guidance_scale=2.0)


def test_the_call_is_that_of_flow_matching():
    ours, theirs = (inspect.signature(cls.__call__).parameters for cls in (DDPMSRPipeline, FlowMatchSRPipeline))
    shared = [name for name in theirs if name in ours]
    of_flows = {"sigmas", "fidelity", "solver", "rtol", "atol", "class_labels", "corner", "output_uncertainty"}
    assert set(theirs) - set(ours) == of_flows
    assert set(ours) - set(theirs) == {"eta", "prompt_embeds"}
    assert [name for name in ours if name in theirs] == shared
    assert all(ours[name] == theirs[name] for name in shared if name != "num_inference_steps")


@pytest.mark.parametrize("name", [name for name in BAD_ARGUMENTS if name not in ("sigmas", "fidelity")])
def test_its_errors_too(name):
    value, message = BAD_ARGUMENTS[name]
    pipe = make_ddpm()
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(random_picture(6, 5), **{name: value})
    for image, message in BAD_IMAGES.values():
        with pytest.raises(ValueError, match=message):
            pipe(image)


def test_tiled_equals_whole_for_a_local_network():
    pipe, picture = make_ddpm(make_unet(**CONCATENATION)), random_picture(31, 20)
    latents = torch.randn(1, 3, 80, 124, generator=seeded())
    whole, tiled = (pipe(picture, 2, latents=latents, tile=tile, output_type="pt").images for tile in (None, 8))
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


def test_the_command_line_takes_it(tmp_path, capsys):
    make_ddpm().save_pretrained(tmp_path / "folder")
    random_picture(6, 5).save(tmp_path / "a.png")
    arguments = ["--checkpoint", str(tmp_path / "folder"), "--steps", "2"]
    assert main(["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "large"), *arguments]) == 0
    assert PIL.Image.open(tmp_path / "large/a.png").size == (24, 20)
    (tmp_path / "hr").mkdir()
    random_picture(24, 20).save(tmp_path / "hr/a.png")
    assert main(["evaluate", str(tmp_path / "hr"), *arguments]) == 0
    assert "2 steps" in capsys.readouterr().out
    assert main(["info", *arguments[:2]]) == 0
    assert "DDIMScheduler, squaredcos_cap_v2 betas, of the residual" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "hr"), *arguments, "--fidelity", "0.5"]) == 1
    assert "a dial of flow matching" in capsys.readouterr().err


def test_save_and_load_round_trip(tmp_path):
    pipe = make_ddpm(target="image")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name in ("image_encoder", "image_mean", "image_std", "image_size", "bicubic_coefficient"):
        index.pop(name)  # folders from before there were encoders
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded = DDPMSRPipeline.from_pretrained(tmp_path, disable_mmap=True)
    assert loaded.config.target == "image"
    outs = [p(random_picture(5, 4), 2, generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*outs)


def test_the_context_decides_and_can_be_dropped():
    unet = make_context_unet(condition_dropout=0.1)
    sample = torch.randn(2, 3, 16, 16, generator=seeded())
    lr = torch.rand(2, 3, 4, 4, generator=seeded())
    with torch.no_grad():
        kept = unet(sample, 10, lr).sample
        changed = unet(sample, 10, lr.flip(-1) * 0.5).sample
        dropped = [unet(sample, 10, x, drop_condition=torch.tensor([True, False])).sample for x in (lr, lr * 0.5)]
    assert not torch.allclose(kept, changed)
    assert torch.equal(dropped[0][0], dropped[1][0])
    assert not torch.equal(dropped[0][1], dropped[1][1])


def test_context_network_names_what_does_not_fit():
    unet = make_context_unet()
    with pytest.raises(ValueError, match="multiples of 2"):
        unet(torch.zeros(1, 3, 15, 16), 0, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"`lr` must have shape \(1, 3, 4, 4\)"):
        unet(torch.zeros(1, 3, 16, 16), 0, torch.zeros(1, 3, 4, 5))
    with pytest.raises(ValueError, match="num_attention_heads"):
        ContextUNetSRModel(block_out_channels=(30,))


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        unet = make_context_unet().train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(torch.ones(1, 3, 16, 16), 10, torch.ones(1, 3, 4, 4)).sample.square().mean().backward()
        grads.append([p.grad for p in unet.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
