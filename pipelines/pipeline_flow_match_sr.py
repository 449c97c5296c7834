"""Interim."""
from __future__ import annotations
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class FlowMatchSRPipeline(DiffusionPipeline):
    model_cpu_offload_seq = "unet"
    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, image, num_inference_steps=4, generator=None, output_type="pt"):
        lr = image * 2 - 1
        lr_up = F.interpolate(lr, scale_factor=self.unet.config.scale_factor, mode="bicubic", antialias=True)
        x = self.scheduler.sample_source(lr_up, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t, lr).sample, t, x).prev_sample
        from types import SimpleNamespace
        return SimpleNamespace(images=((x + 1) / 2).clamp(0, 1))
