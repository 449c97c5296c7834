"""Which networks and schedulers fit each other: asked by the constructors, and by each call."""

import pytest
import torch
from conftest import make_pipeline, make_unet, random_picture
from diffusers import DDIMScheduler

from flowsr import (
    ContextUNetSRModel,
    DDPMSRPipeline,
    FlowMatchPipeline,
    FlowMatchSREulerScheduler,
    FlowMatchSRPipeline,
)

WRONG_FLOWS = {
    "source": {"source": "noise"},
    "path": {"path": "vp"},
    "prediction_type": {"prediction_type": "velocity"},
    "num_train_timesteps": {"num_train_timesteps": 100},
    "source_noise_std": {"source_noise_std": 0.2},
}
NOISE = {"source": "noise", "source_noise_std": 1.0, "prediction_type": "velocity"}


def make_generating_unet(**config):
    return make_unet(**{"lr_channels": None, "precondition": False, "patch_size": 1, "scale_factor": 1, **config})


@pytest.mark.parametrize("name", WRONG_FLOWS)
def test_a_preconditioned_network_takes_the_flow_of_its_formulas_alone(name):
    scheduler = FlowMatchSREulerScheduler(**WRONG_FLOWS[name])
    message = f"hold for a flow with {name}=.*got a scheduler with {name}=.*`precondition=False`"
    with pytest.raises(ValueError, match=message):
        FlowMatchSRPipeline(make_unet(), scheduler)
    pipe = make_pipeline()
    pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipe(random_picture(4, 4))
    FlowMatchSRPipeline(make_unet(precondition=False), scheduler)  # which has no such formulas


def test_its_noise_is_that_of_the_scheduler_whatever_that_is():
    scheduler = FlowMatchSREulerScheduler(source_noise_std=0.2)
    assert FlowMatchSRPipeline(make_unet(source_noise_std=0.2), scheduler).scheduler is scheduler


def test_a_diffusion_and_a_flow_do_not_take_each_others_parts():
    with pytest.raises(ValueError, match="formulas of this UNetSRModel hold for a flow"):
        DDPMSRPipeline(make_unet(), DDIMScheduler())
    with pytest.raises(ValueError, match="does not reverse a diffusion"):
        DDPMSRPipeline(make_unet(precondition=False), FlowMatchSREulerScheduler())
    for cls, unet in ((FlowMatchSRPipeline, make_unet()), (FlowMatchPipeline, make_generating_unet())):
        with pytest.raises(ValueError, match="A flow needs a FlowMatchSREulerScheduler.* got DDIMScheduler"):
            cls(unet, DDIMScheduler())


def test_a_generator_starts_from_noise_without_an_lr():
    with pytest.raises(ValueError, match="it needs `source='noise'`, got 'lr'"):
        FlowMatchPipeline(make_generating_unet(), FlowMatchSREulerScheduler(source="lr"))
    pipe = FlowMatchPipeline(make_generating_unet(), FlowMatchSREulerScheduler(**NOISE))
    pipe.scheduler = FlowMatchSREulerScheduler(source="lr")
    with pytest.raises(ValueError, match="it needs `source='noise'`, got 'lr'"):
        pipe()
    with pytest.raises(ValueError, match="FlowMatchPipeline generates: `lr_channels` must be None, got 3"):
        FlowMatchPipeline(make_unet(precondition=False), FlowMatchSREulerScheduler(**NOISE))
    with pytest.raises(ValueError, match="FlowMatchSRPipeline upscales: its network needs `lr_channels`"):
        FlowMatchSRPipeline(make_generating_unet(), FlowMatchSREulerScheduler(**NOISE))


def test_a_prior_and_its_flow_are_asked_by_the_constructor():
    with pytest.raises(ValueError, match="flow starts from 'lr'; leave `prior` out"):
        FlowMatchSRPipeline(make_unet(), FlowMatchSREulerScheduler(), prior=torch.nn.Identity())


def test_a_pipeline_may_be_loaded_in_parts(tmp_path):
    make_pipeline().save_pretrained(tmp_path)
    assert FlowMatchSRPipeline.from_pretrained(tmp_path, unet=None).unet is None
    unet = ContextUNetSRModel(block_out_channels=(8,), layers_per_block=1, time_embedding_dim=8, context_channels=8)
    DDPMSRPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path / "ddpm")
    assert DDPMSRPipeline.from_pretrained(tmp_path / "ddpm", scheduler=None).scheduler is None
