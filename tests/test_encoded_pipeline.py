"""A network that encodes the image once, in the pipeline that makes use of it."""

import pytest
import torch
from conftest import random_picture, run_without_flowsr, seeded

from flowsr import DDPMSRPipeline, EncodedSRModel, FlowMatchSREulerScheduler, FlowMatchSRPipeline

SMALL = {"encoder_channels": 8, "encoder_blocks": 2, "head_channels": 8, "head_blocks": 1, "time_embedding_dim": 16}
NOISE = {"source": "prior", "source_noise_std": 0.1}


def make_pipe(scheduler: dict | None = None, **config) -> FlowMatchSRPipeline:
    unet = EncodedSRModel(**{**SMALL, **config}).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=seeded())
    pipe = FlowMatchSRPipeline(unet, FlowMatchSREulerScheduler(**{**NOISE, **(scheduler or {})}))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def count_calls(pipe) -> dict[str, list[int]]:
    """Batch sizes of all calls of encoder and head from now on."""
    calls = {"encoder": [], "head": []}
    for name, seen in calls.items():
        getattr(pipe.unet, name).register_forward_hook(lambda _, inputs, __, seen=seen: seen.append(len(inputs[0])))
    return calls


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_n_steps_cost_the_encoder_and_one_head_less(steps):
    pipe = make_pipe()
    calls = count_calls(pipe)
    pipe(random_picture(7, 5), steps, generator=seeded())
    assert calls == {"encoder": [1], "head": [1] * (steps - 1)}
    assert pipe.num_evaluations == steps - 1
    assert pipe.num_timesteps == steps


def test_the_faithful_end_is_the_encoder_alone():
    pipe = make_pipe()
    calls = count_calls(pipe)
    lr = torch.rand(1, 3, 5, 7, generator=seeded())
    out = pipe(lr, 4, fidelity=1.0, output_type="latent").images
    assert calls == {"encoder": [1], "head": []}
    assert pipe.num_evaluations == 0
    with torch.no_grad():
        assert torch.equal(out, pipe.unet.encode(lr * 2 - 1).mean)


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 1.05])
def test_encoding_once_is_calling_the_whole_network_at_each_step(shift):
    pipe, lr = make_pipe({"evaluate_shift": shift}), torch.rand(1, 3, 5, 7, generator=seeded(3)) * 2 - 1
    out = pipe((lr + 1) / 2, 4, generator=seeded(), output_type="latent").images
    lr = ((lr + 1) / 2) * 2 - 1  # as the pipeline reads it
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    mean = pipe.unet(None, None, lr).sample
    x_t = scheduler.sample_source(mean, mean, generator=seeded())
    for timestep in scheduler.timesteps:
        x_t = scheduler.step(pipe.unet(x_t, timestep, lr).sample, timestep, x_t).prev_sample
    assert torch.equal(out, x_t)


def test_outputs_of_one_image_share_one_encoding():
    pipe = make_pipe()
    calls, images = count_calls(pipe), [random_picture(7, 5, seed=i) for i in range(2)]
    options = {"num_inference_steps": 3, "output_type": "pt"}
    together = pipe(images, num_images_per_prompt=3, generator=[seeded(i) for i in range(6)], **options).images
    assert calls == {"encoder": [2], "head": [6, 6]}
    for number in range(6):
        alone = pipe(images[number // 3], generator=seeded(number), **options).images[0]
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=0)  # convolutions round by batch size
    assert (together[0] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("size", [(31, 20), (9, 40)])
def test_tiles_equal_the_whole_image(scale, size):
    pipe, image = make_pipe(scale_factor=scale), random_picture(*size)
    whole, tiled = (pipe(image, 3, tile=t, generator=seeded(), output_type="latent").images for t in (None, 8))
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)
    lr = torch.rand(2, 3, *size, generator=seeded())
    with torch.no_grad():
        for one, other in zip(pipe.encode(lr), pipe.encode(lr, tile=8)):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def test_tiles_bound_what_encoder_and_head_see():
    pipe, seen = make_pipe(), {"encoder": [], "head": []}
    for name, sides in seen.items():
        scale = 1 if name == "encoder" else 4  # the head sees the state, on the grid of the HR
        module = getattr(pipe.unet, name)
        module.register_forward_pre_hook(
            lambda _, inputs, sides=sides, scale=scale: sides.append(max(inputs[0].shape[-2:]) // scale)
        )
    pipe(random_picture(70, 50), 2, tile=16)
    assert len(seen["encoder"]) == len(seen["head"]) == 5 * 4
    assert max(seen["encoder"]) == 16 + 2 * pipe.unet.encoder_receptive_field // 4
    assert max(seen["head"]) == 16 + 2 * pipe.unet.head_receptive_field // 4


@pytest.mark.parametrize(("solver", "heads"), [("midpoint", 5), ("heun", 5), ("rk4", 11), ("dopri5", None)])
def test_other_solvers_have_their_first_evaluation_for_free(solver, heads):
    pipe = make_pipe()
    calls = count_calls(pipe)
    pipe(random_picture(7, 5), 3, solver=solver, generator=seeded())
    assert calls["encoder"] == [1]
    assert pipe.num_evaluations == len(calls["head"])
    assert heads is None or len(calls["head"]) == heads


def test_latents_batches_and_modes():
    pipe, lr = make_pipe(), torch.rand(1, 3, 5, 7, generator=seeded(3))
    given = pipe(lr, 3, generator=seeded(), output_type="pt").images
    latents = pipe.prepare_source(lr * 2 - 1, seeded())
    torch.testing.assert_close(pipe(lr, 3, latents=latents, output_type="pt").images, given, atol=1e-5, rtol=0)
    assert pipe([random_picture(7, 5, "LA"), random_picture(4, 5, "I;16")], 2).images[1].size == (16, 20)


@pytest.mark.parametrize(
    "wrong",
    [{"source": "lr"}, {"path": "vp"}, {"prediction_type": "velocity"}, {"num_train_timesteps": 100},
     {"source_noise_std": 0.2}],
)  # fmt: skip
def test_another_flow_is_refused(wrong):
    with pytest.raises(ValueError, match="formulas of this EncodedSRModel hold for a flow with") as error:
        make_pipe(wrong)
    assert next(iter(wrong)) in str(error.value)
    pipe = make_pipe()
    pipe.scheduler = FlowMatchSREulerScheduler(**{**NOISE, **wrong})
    with pytest.raises(ValueError, match="formulas of this EncodedSRModel"):
        pipe(random_picture(4, 4))
    with pytest.raises(ValueError, match="network's own estimate; leave `prior` out"):
        FlowMatchSRPipeline(pipe.unet, FlowMatchSREulerScheduler(**NOISE), prior=torch.nn.Identity())
    with pytest.raises(ValueError, match="Flow|reverse a diffusion"):
        DDPMSRPipeline(pipe.unet, FlowMatchSREulerScheduler(**NOISE))


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_encoder_and_head_are_brought_back_from_the_disk(offload_type, tmp_path):
    pipe, lr = make_pipe(), torch.rand(1, 3, 5, 7, generator=seeded())
    expected = pipe(lr, 3, generator=seeded(), output_type="pt").images
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    pipe.enable_group_offload(
        torch.device("cpu"), offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks
    )
    for parameter in pipe.unet.parameters():
        parameter.data.fill_(torch.nan)
    for _ in range(2):
        torch.testing.assert_close(pipe(lr, 3, generator=seeded(), output_type="pt").images, expected)


def test_it_loads_where_flowsr_is_not_installed(tmp_path):
    pipe = make_pipe()
    pipe.save_pretrained(tmp_path / "folder")
    expected = pipe(torch.full((3, 4, 5), 0.5), 2, generator=seeded(), output_type="pt").images
    torch.save(expected, tmp_path / "expected.pt")
    again = FlowMatchSRPipeline.from_pretrained(tmp_path / "folder", disable_mmap=True)
    assert torch.equal(again(torch.full((3, 4, 5), 0.5), 2, generator=seeded(), output_type="pt").images, expected)
    script = """
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True, disable_mmap=True)
out = pipe(torch.full((3, 4, 5), 0.5), 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.testing.assert_close(out, torch.load("expected.pt"), atol=1e-5, rtol=0)  # threads may differ
print("loaded", type(pipe.unet).__name__)
"""
    assert "loaded EncodedSRModel" in run_without_flowsr(script, tmp_path)
