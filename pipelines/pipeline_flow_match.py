"""Images from noise by flow matching, optionally of a class.

This file and those it imports from beside it travel with a checkpoint, so that it loads without flowsr installed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .base import PipelineMixin, check_finite, check_flow, check_whole
from .conditioning import read_class_labels
from .flow import FlowMixin, check_solver
from .image_processor import stack_if_equal, write_images
from .sharing import SelfContainedMixin


class FlowMatchPipeline(SelfContainedMixin, FlowMixin, PipelineMixin, DiffusionPipeline):
    r"""Generates images along a learned flow from noise (Lipman et al. 2023; Liu et al. 2022, rectified flow).

    Args:
        unet ([`UNetSRModel`] with `lr_channels=None`): called as `unet(x_t, timestep, class_labels=...)`.
        scheduler ([`FlowMatchSREulerScheduler`]): with `source="noise"`.
        sample_size (`list[int]`): height and width that the network was trained for, in pixels.
        data_range (`list[float]`): black and white as network and flow see them.

    Raises:
        ValueError: where network and scheduler do not fit each other.
    """

    model_cpu_offload_seq = "unet"

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        sample_size: list[int] = [32, 32],
        data_range: list[float] = [-1.0, 1.0],
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(sample_size=list(sample_size), data_range=list(data_range))
        check_flow(self)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        num_inference_steps: int = 20,
        solver: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "euler",
        rtol: float = 1e-4,
        atol: float = 1e-4,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Generates `batch_size` images, or one per class label.

        Args:
            batch_size (`int`, *optional*): number of images; by default that of `class_labels`, or 1.
            class_labels (`int`, list or tensor of these, *optional*): 0..num_class_embeds - 1; without, a network that
                knows classes generates of no class.
            num_inference_steps (`int`): steps of the fixed-step solvers.
            solver: "euler" takes one network evaluation a step, "midpoint" and "heun" two, "rk4" four; "dopri5" as
                many as `rtol` and `atol` need. `num_evaluations` holds the number afterwards.
            guidance_scale (`float`): classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w), for a network
                trained with `condition_dropout`.
            generator: of the noise, also a list of one per image.
            latents (`torch.Tensor` of shape `(images, c, h, w)`, *optional*): the source to start from.
            output_type: "pil"; "np" `(n, h, w, c)` or "pt" `(n, c, h, w)` in [0, 1]; "latent", the state as it ends.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})` after each step of "euler"; may return
                new latents. `pipe._interrupt = True` within it stops there.

        Raises:
            ValueError: for arguments that cannot be right, before any work.
        """
        check_flow(self)
        check_solver(solver, rtol, atol, callback_on_step_end)
        labelled = len(class_labels) if np.ndim(class_labels) else None
        count = batch_size if batch_size is not None else 1 if labelled is None else labelled
        if labelled == 0:
            raise ValueError("Nothing to do: `class_labels` is empty.")
        check_whole("batch_size", count)
        labels = read_class_labels(self.unet, class_labels, count, self._execution_device)
        if guidance_scale != 1 and class_labels is None:
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but there is no class to be guided to.")
        self.check_call(
            count, {tuple(self.config.sample_size)}, num_inference_steps, guidance_scale, generator, latents,
            output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip

        # 1. The source.
        device = self._execution_device
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.begin_batch()
        if latents is None:
            x_t = self.prepare_source(count, generator)
        else:
            x_t = latents.to(device, torch.float32)

        # 2. Along the flow.
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = num_inference_steps
        with self.progress_bar(total=num_inference_steps) as bar:
            x_t = self.follow_flow(
                partial(self.evaluate, conditions=self.conditions(labels)), x_t, solver, rtol, atol, bar,
                callback_on_step_end, callback_on_step_end_tensor_inputs,
            )  # fmt: skip
        check_finite(x_t, self.unet)

        # 3. Images.
        if output_type == "latent":
            images = x_t
        else:
            low, high = self.config.data_range
            images = stack_if_equal(write_images((x_t - low).cpu() / (high - low), output_type), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def conditions(self, class_labels: torch.Tensor | None = None) -> dict:
        """What the network is called with beside state and timestep.

        Args:
            class_labels (`torch.LongTensor` of shape `(n,)`, *optional*): in 0..num_class_embeds, the last meaning
                "no class".
        """
        return {} if class_labels is None else {"class_labels": class_labels}

    def prepare_source(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sample_size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Draws where the flow starts: `(batch_size, c, *sample_size)`, by default of the size in the config."""
        shape = (batch_size, self.unet.config.in_channels, *(sample_size or self.config.sample_size))
        return self.scheduler.sample_source(torch.zeros(shape, device=self._execution_device), generator=generator)
