"""A flow that starts from another model's estimate."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import make_pipeline, make_unet, random_picture, run_without_flowsr, seeded
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline
from flowsr.pipelines.conditioning import estimate


def make_swin2sr(upscale: int = 4) -> Swin2SRForImageSuperResolution:
    torch.manual_seed(0)
    config = Swin2SRConfig(
        embed_dim=8, depths=[2], num_heads=[2], window_size=4, image_size=16, upscale=upscale,
        upsampler="pixelshuffledirect",
    )  # fmt: skip
    return Swin2SRForImageSuperResolution(config).eval()


def make_pmrf() -> FlowMatchSRPipeline:
    scheduler = FlowMatchSREulerScheduler(source="prior")
    pipe = FlowMatchSRPipeline(make_unet(precondition=False), scheduler, prior=make_swin2sr())
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Nearest(ModelMixin, ConfigMixin):
    """A prior of diffusers' kind: each pixel becomes a square."""

    @register_to_config
    def __init__(self, scale: int = 4):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(()))

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        assert 0 <= lr.min() <= lr.max() <= 1
        return F.interpolate(self.gain * lr, scale_factor=float(self.config.scale), mode="nearest")


@torch.no_grad()
def test_the_estimate_is_what_the_prior_says_of_pixels_in_0_to_1():
    prior, lr = make_swin2sr(), torch.rand(2, 3, 8, 12, generator=seeded())
    expected = prior(pixel_values=lr).reconstruction
    torch.testing.assert_close(estimate(prior, lr * 2 - 1, 4), expected * 2 - 1)
    assert torch.equal(estimate(Nearest(), lr * 2 - 1, 4)[..., ::4, ::4], (lr * 2 - 1 + 1) / 2 * 2 - 1)


@torch.no_grad()
@pytest.mark.parametrize("size", [(1, 1), (5, 3), (9, 4)])
def test_any_size_becomes_exactly_scale_times_as_large(size):
    assert estimate(make_swin2sr(), torch.zeros(1, 3, *size), 4).shape == (1, 3, 4 * size[0], 4 * size[1])
    assert make_pmrf()(random_picture(*size), 2).images[0].size == (4 * size[0], 4 * size[1])


@torch.no_grad()
def test_a_prior_of_another_scale_is_refused():
    with pytest.raises(ValueError, match=r"4 times as large, of shape \(1, 3, 16, 16\).*another scale"):
        estimate(make_swin2sr(upscale=2), torch.zeros(1, 3, 4, 4), 4)


@torch.no_grad()
@pytest.mark.parametrize("data_range", [[-1.0, 1.0], [0.0, 1.0]])
def test_the_flow_starts_from_the_estimate(data_range):
    pipe = make_pmrf()
    pipe.register_to_config(data_range=data_range)
    lr = torch.rand(1, 3, 5, 6, generator=seeded(3))
    given = pipe(lr, 3, generator=seeded(), output_type="pt").images
    low, high = data_range
    start = (estimate(pipe.prior, lr * 2 - 1, 4) + 1) / 2 * (high - low) + low
    source = pipe.scheduler.sample_source(torch.zeros_like(start), start, generator=seeded())
    torch.testing.assert_close(pipe(lr, 3, latents=source, output_type="pt").images, given, atol=1e-5, rtol=0)


def test_several_outputs_share_one_estimate():
    pipe, calls = make_pmrf(), []
    handle = pipe.prior.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    images = pipe([random_picture(6, 5, seed=i) for i in range(2)], 1, num_images_per_prompt=3).images
    handle.remove()
    assert len(images) == 6
    assert calls == [2]


def test_tiles_give_the_whole_picture_also_with_a_prior():
    pipe, lr = make_pmrf(), torch.rand(1, 3, 26, 30, generator=seeded())
    whole, tiled = (pipe(lr, 2, generator=seeded(), tile=t, output_type="pt").images for t in (None, 12))
    torch.testing.assert_close(tiled, whole, atol=1e-5, rtol=0)


def test_a_prior_and_its_flow_belong_together():
    picture = random_picture(4, 4)
    with pytest.raises(ValueError, match="load the pipeline with `prior=`"):
        make_pipeline({"source": "prior"}, precondition=False)(picture)
    with pytest.raises(ValueError, match="flow starts from 'lr'"):
        FlowMatchSRPipeline(make_unet(), FlowMatchSREulerScheduler(), prior=Nearest())(picture)
    start = torch.zeros(1, 3, 16, 16)
    assert make_pipeline({"source": "prior"}, precondition=False)(picture, latents=start).images[0].size == (16, 16)


def test_optional_in_saved_pipelines_and_replaceable(tmp_path):
    pipe, lr = make_pmrf(), torch.rand(1, 3, 5, 6, generator=seeded(3))
    pipe.save_pretrained(tmp_path / "with")
    loaded = FlowMatchSRPipeline.from_pretrained(tmp_path / "with", disable_mmap=True)
    assert isinstance(loaded.prior, Swin2SRForImageSuperResolution)
    outs = [p(lr, 2, generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
    torch.testing.assert_close(*outs)
    assert FlowMatchSRPipeline.from_pretrained(tmp_path / "with", prior=None).prior is None
    pipe.prior = None
    pipe.save_pretrained(tmp_path / "without")
    assert FlowMatchSRPipeline.from_pretrained(tmp_path / "without").prior is None
    replaced = FlowMatchSRPipeline.from_pretrained(tmp_path / "without", prior=make_swin2sr())
    torch.testing.assert_close(replaced(lr, 2, generator=seeded(), output_type="pt").images, outs[0])


def test_it_travels_with_its_prior_and_as_a_custom_pipeline(tmp_path):
    pipe = make_pmrf()
    pipe.save_pretrained(tmp_path / "folder")
    expected = pipe(torch.full((3, 4, 5), 0.5), generator=seeded(), output_type="pt").images
    torch.save(expected, tmp_path / "expected.pt")
    weights = shutil.copytree(tmp_path / "folder", tmp_path / "weights", ignore=shutil.ignore_patterns("pipeline*.py"))
    index = json.loads((weights / "model_index.json").read_text())
    (weights / "model_index.json").write_text(json.dumps({**index, "_class_name": "DiffusionPipeline"}))
    script = """
import torch
from diffusers import DiffusionPipeline
for folder, options in (("folder", {}), ("weights", {"custom_pipeline": "folder"})):
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, disable_mmap=True, **options)
    assert type(pipe).__name__ == "FlowMatchSRPipeline"
    out = pipe(torch.full((3, 4, 5), 0.5), generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(out, torch.load("expected.pt"))
print("loaded with", type(pipe.prior).__name__)
"""
    assert "loaded with Swin2SRForImageSuperResolution" in run_without_flowsr(script, tmp_path)
