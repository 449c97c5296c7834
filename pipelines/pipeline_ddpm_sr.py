"""Super-resolution by denoising diffusion: DDIM, DDPM or any other scheduler of diffusers.

This file and those it imports from beside it travel with a checkpoint, so that it loads without flowsr installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .checks import check_diffusion, check_inputs
from .consistency import make_consistent
from .context import check_context, check_encoder, context_tokens
from .conventions import ConventionsMixin
from .pictures import group_by_size, read_images, stack_if_equal, write_group
from .sharing import SelfContainedMixin
from .tiles import predict


class DDPMSRPipeline(SelfContainedMixin, ConventionsMixin, DiffusionPipeline):
    r"""Upscales pictures by reversing a diffusion (Ho et al. 2020; Saharia et al. 2021 for super-resolution).

    Args:
        unet ([`ContextUNetSRModel`] or [`UNetSRModel`]): called as `unet(x_t, timestep, lr)`; sees the LR by
            cross-attention or beside the state. What it predicts is the scheduler's `prediction_type`.
        scheduler ([`~diffusers.DDIMScheduler`], [`~diffusers.DDPMScheduler`] or another of diffusers that reverses a
            diffusion): give it `timestep_spacing="trailing"`, so that few steps too start at the last timestep, at
            pure noise; "leading", the default of several, does not (Lin et al. 2024, section 3.3).
        image_encoder ([`~transformers.PreTrainedModel`], *optional*): a vision transformer, such as DINOv2 or CLIP's,
            that makes the context tokens of a network with `cross_attention_dim`, once for a whole picture.
        target (`"residual"`, `"image"`): what is diffused: the picture less its bicubic upsampling, or the picture.
        bicubic_coefficient (`-0.5` or `-0.75`): the cubic of that upsampling: MATLAB's and Pillow's, or torch's and
            OpenCV's.
        residual_std (`float`): what a residual is divided by before it is diffused. That of photos has a standard
            deviation of about 0.09; brought to about 1, as schedules expect, its detail forms over the whole
            diffusion and not in the last few steps (Karras et al. 2022, section 5, on sigma_data).
        image_mean, image_std (`list[float]`, *optional*), image_size (`int`, *optional*): how `image_encoder` wants
            its pictures (see [`context_tokens`]).

    Raises:
        ValueError: for settings that do not fit each other, naming them.
    """

    model_cpu_offload_seq = "image_encoder->unet"
    _optional_components = ["image_encoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        target: str = "residual",
        image_encoder: torch.nn.Module | None = None,
        bicubic_coefficient: float = -0.5,
        residual_std: float = 1.0,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        image_size: int | None = None,
    ):
        super().__init__()
        if target not in ("residual", "image"):
            raise ValueError(f"`target` must be 'residual' or 'image', got {target!r}.")
        if bicubic_coefficient not in (-0.5, -0.75):
            raise ValueError(f"`bicubic_coefficient` must be -0.5 or -0.75, got {bicubic_coefficient}.")
        if not residual_std > 0 or (target == "image" and residual_std != 1):
            raise ValueError(f"`residual_std` must be positive, and 1 for the target 'image', got {residual_std}.")
        check_encoder(unet, image_encoder, image_mean, image_std)
        self.register_modules(unet=unet, scheduler=scheduler, image_encoder=image_encoder)
        self.register_to_config(
            target=target, bicubic_coefficient=bicubic_coefficient, residual_std=residual_std, image_mean=image_mean,
            image_std=image_std, image_size=image_size,
        )  # fmt: skip
        self.num_evaluations = 0

    @property
    def scale_factor(self) -> int:
        """HR pixels per LR pixel, each way."""
        return self.unet.config.scale_factor

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        num_inference_steps: int = 50,
        eta: float = 0.0,
        consistency: Literal["exact", "soft"] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        tile: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Upscales; each output is exactly `scale_factor` times its input.

        Args:
            image: as for [`FlowMatchSRPipeline`]: PIL of any mode, arrays and tensors, or a list of these.
            num_inference_steps (`int`): steps of the scheduler, one network evaluation each (more for some, such as
                HeunDiscreteScheduler). `num_evaluations` holds the number afterwards.
            eta (`float` in [0, 1]): noise in each step of DDIM, from none to that of DDPM (Song et al. 2021, eq. 16).
            consistency, guidance_scale, num_images_per_prompt, generator, tile, return_dict, callback_on_step_end,
                callback_on_step_end_tensor_inputs: as for [`FlowMatchSRPipeline`].
            latents (`torch.Tensor` of shape `(outputs, c, scale * h, scale * w)`, *optional*): standard normal
                noise to start from instead of a draw.
            prompt_embeds (`torch.Tensor` of shape `(pictures, tokens, cross_attention_dim)`, *optional*): context
                tokens, of a caption for instance, instead of those of `image_encoder`.
            output_type: "pil", "np", "pt", or "latent": the final state, which for the target "residual" is that
                over `residual_std`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] with `images`, or the tuple `(images,)`.

        Raises:
            ValueError, TypeError: for input that cannot be right, before any work.
        """
        pictures = read_images(image)
        check_diffusion(self.scheduler, self.unet, num_inference_steps)
        takes = inspect.signature(self.scheduler.step).parameters
        if eta != 0 and "eta" not in takes:
            raise ValueError(f"`eta` is {eta}, but {type(self.scheduler).__name__} has none; leave it at 0.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1], got {eta}.")
        check_inputs(
            self, pictures, num_inference_steps, consistency, guidance_scale, num_images_per_prompt, generator,
            latents, tile, output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        check_context(self.unet, self.image_encoder, prompt_embeds, sum(len(picture.color) for picture in pictures))
        self._guidance_scale, self._interrupt = guidance_scale, False
        groups = group_by_size(pictures)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        self._num_timesteps = self.num_evaluations = len(self.scheduler.timesteps)

        images, done = [], 0
        with self.progress_bar(total=len(groups) * self._num_timesteps) as bar:
            for group in groups:
                # 1. The LR, its context, and the noise picture by picture. Some schedulers remember: each group starts
                # anew.
                self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
                lr = torch.cat([picture.color for picture in group]).to(self._execution_device)
                if prompt_embeds is None:
                    context = self.encode_image(lr)
                else:
                    context = prompt_embeds[done // num_images_per_prompt :][: len(lr)].to(lr)
                conditions = {}
                if context is not None:
                    conditions["encoder_hidden_states"] = context.repeat_interleave(num_images_per_prompt, dim=0)
                lr = lr.repeat_interleave(num_images_per_prompt, dim=0)
                lr_up = self.upsample(lr)
                mine = slice(done, done + len(lr))
                done += len(lr)
                draws = generator[mine] if isinstance(generator, list) else generator
                if latents is None:
                    each = draws if isinstance(draws, list) else [draws] * len(lr)
                    noise = [randn_tensor((1, *lr_up.shape[1:]), generator=g, device=lr.device) for g in each]
                    x_t = torch.cat(noise) * self.scheduler.init_noise_sigma
                else:
                    x_t = latents[mine].to(lr) * self.scheduler.init_noise_sigma
                options = {"eta": eta} if "eta" in takes else {}
                options |= {"generator": draws} if "generator" in takes else {}

                # 2. Denoising.
                for step, timestep in enumerate(self.scheduler.timesteps):
                    if self.interrupt:
                        break
                    self._current_timestep = timestep
                    state = self.scheduler.scale_model_input(x_t, timestep)
                    prediction = predict(self.unet, state, timestep, lr, tile, self.guidance_scale, conditions)
                    x_t = self.scheduler.step(prediction, timestep, x_t, **options, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        asked = {"latents": x_t} if callback_on_step_end_tensor_inputs else {}
                        x_t = callback_on_step_end(self, step, timestep, asked).pop("latents", x_t)
                    bar.update()

                # 3. The picture, its agreement with the LR, and back into the kind that came.
                if output_type == "latent":
                    images.extend(x_t)
                    continue
                hr = lr_up + self.config.residual_std * x_t if self.config.target == "residual" else x_t
                if consistency is not None:
                    hr = make_consistent(hr, lr, self.scale_factor, consistency)
                images += write_group(group, hr, num_images_per_prompt, output_type)

        images = stack_if_equal(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def upsample(self, lr: torch.Tensor) -> torch.Tensor:
        """The LR (`(n, c, h, w)`) by bicubic interpolation on the grid of the HR: what the residual is added to."""
        antialias = self.config.bicubic_coefficient == -0.5  # with it torch takes Pillow's cubic
        return F.interpolate(lr, scale_factor=float(self.scale_factor), mode="bicubic", antialias=antialias)

    def encode_image(self, lr: torch.Tensor) -> torch.Tensor | None:
        """Context tokens of pictures (`(n, 3, h, w)` in [-1, 1]); `None` without an encoder."""
        if self.image_encoder is None:
            return None
        config = self.config
        return context_tokens(self.image_encoder, lr, config.image_mean, config.image_std, config.image_size)
