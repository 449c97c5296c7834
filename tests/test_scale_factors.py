"""x2, x3 and x8 are as good as x4, in both super-resolution pipelines and in evaluation."""

import pytest
import torch
from conftest import make_unet, random_picture
from diffusers import DDIMScheduler

from flowsr import ContextUNetSRModel, DDPMSRPipeline, FlowMatchSREulerScheduler, FlowMatchSRPipeline
from flowsr.degradations import bicubic_matrix
from flowsr.evaluation import load_pairs, measure_steps
from flowsr.pipelines.consistency import make_consistent

SCALES = [2, 3, 8]


def make_flow(scale: int, **config) -> FlowMatchSRPipeline:
    unet = make_unet(scale_factor=scale, **{"patch_size": scale, **config})
    return quiet(FlowMatchSRPipeline(unet, FlowMatchSREulerScheduler()))


def make_diffusion(scale: int, levels: int = 2) -> DDPMSRPipeline:
    torch.manual_seed(0)
    unet = ContextUNetSRModel(
        scale_factor=scale,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        time_embedding_dim=8,
        context_channels=8,
    ).eval()
    scheduler = DDIMScheduler(prediction_type="sample", clip_sample=False, timestep_spacing="trailing")
    return quiet(DDPMSRPipeline(unet, scheduler))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [make_flow, lambda scale: make_flow(scale, patch_size=1), make_diffusion])
@pytest.mark.parametrize("size", [(1, 1), (7, 4)])
def test_output_is_exactly_scale_times_the_input(scale, make, size):
    out = make(scale)(random_picture(*size), num_inference_steps=2).images[0]
    assert out.size == (size[0] * scale, size[1] * scale)


@pytest.mark.parametrize("scale", [2, 3, 4, 8])
@pytest.mark.parametrize("levels", [1, 3, 4])
def test_a_single_pixel_is_enough_for_any_depth(scale, levels):
    out = make_diffusion(scale, levels)(random_picture(1, 1), num_inference_steps=1).images[0]
    assert out.size == (scale, scale)


@pytest.mark.parametrize("scale", SCALES)
def test_tiled_equals_whole(scale):
    pipe, picture = make_flow(scale), random_picture(41, 20)
    options = {"num_inference_steps": 2, "output_type": "pt"}
    whole, tiled = (
        pipe(picture, tile=tile, generator=torch.Generator().manual_seed(0), **options).images for tile in (None, 10)
    )
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)  # torch rounds the positions i / 3 of its bicubic


@pytest.mark.parametrize("scale", SCALES)
def test_outputs_agree_with_their_input(scale):
    hr, other = 0.2 * torch.randn(2, 3, 10 * scale, 12 * scale, generator=torch.Generator().manual_seed(0))
    rows, columns = (torch.from_numpy(bicubic_matrix(size * scale, scale)).float() for size in (10, 12))
    lr = rows @ hr @ columns.T  # MATLAB's downscaling as a matrix
    consistent = make_consistent(other[None], lr[None], scale, "exact")[0]
    torch.testing.assert_close(rows @ consistent @ columns.T, lr, atol=1e-4, rtol=0)
    assert (consistent - other).abs().max() > 0.01


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("make", [make_flow, make_diffusion])
def test_evaluation_of_a_network_without_opinion_is_that_of_bicubic(scale, make, tmp_path):
    pipe = make(scale)  # its residual is set to 0
    for parameter in pipe.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    random_picture(90, 75).save(tmp_path / "a.png")
    (pair,) = load_pairs(tmp_path, None, scale)
    assert pair.hr.shape == (75 // scale * scale, 90 // scale * scale, 3)
    assert pair.lr.shape == (75 // scale, 90 // scale, 3)
    bicubic, flow = measure_steps(pipe, [pair], steps=[1])["rows"]
    assert flow["psnr_y"] == pytest.approx(bicubic["psnr_y"], abs=0.05)
    assert flow["ssim_y"] == pytest.approx(bicubic["ssim_y"], abs=0.002)
