"""Pictures from noise by flow matching, optionally of a class.

This file and those it imports from beside it travel with a checkpoint, so that it loads without flowsr installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import check_callback_inputs, check_flow, check_guidance, read_class_labels
from .conventions import ConventionsMixin, cache_context
from .sharing import SelfContainedMixin
from .solvers import SMALLEST_SIGMA, check_solver, integrate


class FlowMatchPipeline(SelfContainedMixin, ConventionsMixin, DiffusionPipeline):
    r"""Generates pictures along a learned flow from noise (Lipman et al. 2023; Liu et al. 2022, rectified flow).

    Args:
        unet ([`UNetSRModel`] with `lr_channels=None`): called as `unet(x_t, timestep, class_labels=...)`.
        scheduler ([`FlowMatchSREulerScheduler`] with `source="noise"`).
        sample_size (`list[int]`): height and width that the network was trained for, in pixels.
        data_range (`list[float]`): black and white as network and flow see them.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

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
        self.num_evaluations = 0

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
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
        """Generates `batch_size` pictures, or one per class label.

        Args:
            batch_size (`int`): number of pictures, where `class_labels` does not number them.
            class_labels (`int`, list or tensor of these, *optional*): 0..num_class_embeds - 1; without, a network that
                knows classes generates of no class.
            num_inference_steps (`int`): steps of the fixed-step solvers.
            solver: "euler" takes one network evaluation a step, "midpoint" and "heun" two, "rk4" four; "dopri5" as
                many as `rtol` and `atol` need. `num_evaluations` holds the number afterwards.
            guidance_scale (`float`): classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w), for a network
                trained with `condition_dropout`.
            generator: of the noise, also a list of one per picture.
            latents (`torch.Tensor` of shape `(pictures, c, h, w)`, *optional*): the source to start from.
            output_type: "pil"; "np" `(n, h, w, c)` or "pt" `(n, c, h, w)` in [0, 1]; "latent", the state as it ends.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})` after each step of "euler"; may return
                new latents. `pipe._interrupt = True` within it stops there.

        Raises:
            ValueError: for arguments that cannot be right, before any work.
        """
        check_flow(self.scheduler)
        config = self.unet.config
        count = len(class_labels) if np.ndim(class_labels) else batch_size
        if count < 1 or num_inference_steps < 1:
            raise ValueError(f"Nothing to do: {count} pictures in {num_inference_steps} steps.")
        given = read_class_labels(self.unet, class_labels, count, self._execution_device)
        if guidance_scale != 1 and class_labels is None:
            raise ValueError(f"`guidance_scale` is {guidance_scale}, but there is no class to be guided to.")
        check_guidance(self.unet, guidance_scale)
        check_solver(solver, callback_on_step_end)
        check_callback_inputs(self, callback_on_step_end_tensor_inputs)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        shape = (count, config.in_channels, *self.config.sample_size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape}, got {tuple(latents.shape)}.")

        # 1. The source.
        device = self._execution_device
        self._guidance_scale, self._interrupt = guidance_scale, False
        if latents is None:
            x_t = self.scheduler.sample_source(torch.zeros(shape, device=device), generator=generator)
        else:
            x_t = latents.to(device, torch.float32)
        none = None if given is None else torch.full_like(given, config.num_class_embeds)

        # 2. Along the flow.
        def predict(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            self._current_timestep = timestep
            with cache_context(self.unet):
                prediction = self.unet(x, timestep, class_labels=given, return_dict=False)[0]
            if self.guidance_scale != 1:
                without = self.unet(x, timestep, class_labels=none, return_dict=False)[0]
                prediction = without + self.guidance_scale * (prediction - without)
            return prediction

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = num_inference_steps
        if solver == "euler":
            for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
                if self.interrupt:
                    break
                x_t = self.scheduler.step(predict(x_t, timestep), timestep, x_t, return_dict=False)[0]
                if callback_on_step_end is not None:
                    asked = {"latents": x_t} if callback_on_step_end_tensor_inputs else {}
                    x_t = callback_on_step_end(self, step, timestep, asked).pop("latents", x_t)
            self.num_evaluations = num_inference_steps
        else:

            def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                if self.scheduler.config.prediction_type == "sample":
                    sigma = sigma.clamp(min=SMALLEST_SIGMA)
                timestep = sigma * self.scheduler.config.num_train_timesteps
                return self.scheduler.predict_velocity(predict(x, timestep), x, timestep)

            x_t, self.num_evaluations = integrate(velocity, x_t, self.scheduler.sigmas, solver, rtol, atol)

        # 3. Pictures.
        images = x_t
        if output_type != "latent":
            low, high = self.config.data_range
            images = ((x_t - low) / (high - low)).clamp(0, 1).cpu()
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            levels = (images * 255).round().astype(np.uint8)
            images = [PIL.Image.fromarray(one.squeeze(-1) if one.shape[-1] == 1 else one) for one in levels]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
