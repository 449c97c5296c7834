"""The diffusion pipeline and the context network."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_unet, random_picture
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from flowsr import ContextUNetSRModel, DDPMSRPipeline


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_context_unet(**config) -> ContextUNetSRModel:
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "time_embedding_dim": 8, "context_channels": 8}
    unet = ContextUNetSRModel(**{**small, **config}).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded())
    return unet


def make_ddpm(unet=None, scheduler=None, target="residual") -> DDPMSRPipeline:
    scheduler = scheduler or DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", rescale_betas_zero_snr=False,
    )  # fmt: skip
    pipe = DDPMSRPipeline(unet or make_context_unet(), scheduler, target)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_perfect_v_prediction_arrives_exactly_at_the_residual(steps):
    unet = Oracle(block_out_channels=(8,), layers_per_block=1)
    pipe = make_ddpm(unet)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    unet.alphas_cumprod = pipe.scheduler.alphas_cumprod
    unet.residual = 0.2 * torch.randn(1, 3, 16, 20, generator=seeded())
    latent = pipe(random_picture(5, 4), steps, generator=seeded(1), output_type="latent").images
    torch.testing.assert_close(latent, unet.residual, atol=2e-3, rtol=0)
    picture = torch.full((1, 3, 4, 5), 0.5)
    out = pipe(picture, steps, generator=seeded(1), output_type="pt").images
    expected = F.interpolate(picture, scale_factor=4.0, mode="bicubic", antialias=True) + unet.residual / 2
    torch.testing.assert_close(out, expected.clamp(0, 1), atol=2e-3, rtol=0)


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
    with pytest.raises(ValueError, match="condition dropout"):
        pipe(random_picture(4, 4), guidance_scale=2.0)


def test_save_and_load_round_trip(tmp_path):
    pipe = make_ddpm(target="image")
    pipe.save_pretrained(tmp_path)
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
