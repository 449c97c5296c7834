"""Super-resolution by denoising diffusion: DDIM, DDPM or any other scheduler of diffusers.

This file and those it imports from beside it travel with a checkpoint, so that it loads without flowsr installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from .base import SRPipelineMixin, check_diffusion
from .conditioning import check_context, check_encoder, context_tokens, repeat
from .image_processor import batches, read_images, stack_if_equal
from .sharing import SelfContainedMixin


class DDPMSRPipeline(SelfContainedMixin, SRPipelineMixin, DiffusionPipeline):
    r"""Upscales images by reversing a diffusion (Ho et al. 2020; Saharia et al. 2021 for super-resolution).

    Args:
        unet ([`ContextUNetSRModel`] or [`UNetSRModel`]): called as `unet(x_t, timestep, lr)`; sees the LR by
            cross-attention or beside the state. What it predicts is the scheduler's `prediction_type`.
        scheduler ([`~diffusers.DDIMScheduler`] or another of diffusers that reverses a diffusion): give it
            `timestep_spacing="trailing"`, so that few steps too start at the last timestep, at pure noise; "leading",
            the default of several, does not (Lin et al. 2024, section 3.3).
        image_encoder ([`~transformers.PreTrainedModel`], *optional*): a vision transformer, such as DINOv2 or CLIP's,
            that makes the context tokens of a network with `cross_attention_dim`, once for a whole image.
        target (`"residual"`, `"image"`): what is diffused: the image less its bicubic upsampling, or the image.
        bicubic_coefficient (`-0.5` or `-0.75`): the cubic of that upsampling: MATLAB's and Pillow's, or torch's and
            OpenCV's.
        residual_std (`float`): what a residual is divided by before it is diffused. That of photos has a standard
            deviation of about 0.09; brought to about 1, as schedules expect, its detail forms over the whole
            diffusion and not in the last few steps (Karras et al. 2022, section 5, on sigma_data).
        image_mean, image_std (`list[float]`, *optional*), image_size (`int`, *optional*): how `image_encoder` wants
            its images (see [`context_tokens`]).

    Raises:
        ValueError: for settings that do not fit each other, naming them.
    """

    model_cpu_offload_seq = "image_encoder->unet"
    _optional_components = ["image_encoder"]

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
        self.register_modules(unet=unet, scheduler=scheduler, image_encoder=image_encoder)
        self.register_to_config(
            target=target, bicubic_coefficient=bicubic_coefficient, residual_std=residual_std, image_mean=image_mean,
            image_std=image_std, image_size=image_size,
        )  # fmt: skip
        check_diffusion(self)
        check_encoder(unet, image_encoder, image_mean, image_std)

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
        outscale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Upscales; each output is exactly `scale_factor` times its input, or of the size that is asked for.

        Args:
            image: as for [`FlowMatchSRPipeline`]: PIL of any mode, arrays and tensors, or a list of these.
            num_inference_steps (`int`): steps of the scheduler, one network evaluation each (more for some, such as
                HeunDiscreteScheduler). `num_evaluations` holds the number afterwards.
            eta (`float` in [0, 1]): noise in each step of DDIM, from none to that of DDPM (Song et al. 2021, eq. 16).
            consistency, guidance_scale, num_images_per_prompt, generator, tile: as for [`FlowMatchSRPipeline`].
            outscale, height, width, return_dict: as there.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as there.
            latents (`torch.Tensor` of shape `(outputs, c, scale * h, scale * w)`, *optional*): standard normal
                noise to start from instead of a draw.
            prompt_embeds (`torch.Tensor` of shape `(images, tokens, cross_attention_dim)`, *optional*): context
                tokens, of a caption for instance, instead of those of `image_encoder`.
            output_type: "pil", "np", "pt", or "latent": the final state, which for the target "residual" is that
                over `residual_std`.

        Returns:
            [`~pipelines.ImagePipelineOutput`] with `images`, or the tuple `(images,)`.

        Raises:
            ValueError, TypeError: for input that cannot be right, before any work.
        """
        images = read_images(image)
        size = self.output_size(outscale, height, width, output_type)
        check_diffusion(self)
        step_takes = inspect.signature(self.scheduler.step).parameters
        if eta != 0 and "eta" not in step_takes:
            raise ValueError(f"`eta` is {eta}, but {type(self.scheduler).__name__} has none; leave it at 0.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must lie in [0, 1], got {eta}.")
        self.check_inputs(
            images, consistency, num_images_per_prompt, tile, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, generator=generator, latents=latents, output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        if num_inference_steps > self.scheduler.config.num_train_timesteps:
            raise ValueError(
                f"`num_inference_steps` must not exceed the {self.scheduler.config.num_train_timesteps} steps of the "
                f"diffusion, got {num_inference_steps}."
            )
        check_context(self.unet, self.image_encoder, prompt_embeds, len(images))
        device = self._execution_device
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)
        batched, outputs = batches(images, num_images_per_prompt), []
        with self.progress_bar(total=len(batched) * self._num_timesteps) as bar:
            for batch in batched:
                # 1. The LR, what the network sees beside the state, and the noise.
                self.begin_batch()
                self.scheduler.set_timesteps(num_inference_steps, device=device)  # some schedulers remember
                lr = batch.lr(device)
                conditions = self.conditions(lr, None if prompt_embeds is None else prompt_embeds[batch.inputs])
                conditions = repeat(conditions, num_images_per_prompt)
                generators = generator[batch.outputs] if isinstance(generator, list) else generator
                if latents is None:
                    noise = self.prepare_source(lr, generators, num_images_per_prompt)
                else:
                    noise = latents[batch.outputs].to(lr)

                # 2. Denoising.
                evaluate = partial(self.evaluate, conditions=conditions, tile=tile)
                step_kwargs = {"eta": eta, "generator": generators}
                x_t = self.denoise(
                    evaluate, noise * self.scheduler.init_noise_sigma, self.scheduler.timesteps, bar,
                    callback_on_step_end, callback_on_step_end_tensor_inputs,
                    **{name: value for name, value in step_kwargs.items() if name in step_takes},
                )  # fmt: skip

                # 3. The image, its agreement with the LR, and back into the kind that came.
                outputs += self.write(batch, x_t, conditions["lr"], consistency, output_type, size)

        self.maybe_free_model_hooks()
        outputs = stack_if_equal(outputs, output_type)
        return ImagePipelineOutput(images=outputs) if return_dict else (outputs,)

    def conditions(self, lr: torch.Tensor, prompt_embeds: torch.Tensor | None = None) -> dict:
        """What the network is called with beside state and timestep.

        Args:
            lr (`torch.Tensor` of shape `(n, 3, h, w)`, in [-1, 1]).
            prompt_embeds (`torch.Tensor` of shape `(n, tokens, cross_attention_dim)`, *optional*): instead of the
                tokens of `image_encoder`.
        """
        context = self.encode_image(lr) if prompt_embeds is None else prompt_embeds.to(lr)
        return {"lr": lr} if context is None else {"lr": lr, "encoder_hidden_states": context}

    def prepare_source(
        self,
        lr: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
    ) -> torch.Tensor:
        """Draws the standard normal noise of a diffusion, output by output.

        Args:
            lr (`torch.Tensor` of shape `(n, 3, h, w)`).
            generator: also a list of one per output.

        Returns:
            `torch.Tensor` of shape `(n * num_images_per_prompt, c, scale * h, scale * w)`.
        """
        sides = (side * self.scale_factor for side in lr.shape[-2:])
        one, count = (1, self.unet.config.in_channels, *sides), len(lr) * num_images_per_prompt
        each = generator if isinstance(generator, list) else [generator] * count
        return torch.cat([randn_tensor(one, generator=g, device=lr.device, dtype=lr.dtype) for g in each])

    def to_target(self, hr: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        """What is diffused of an image (`(n, c, scale * h, scale * w)` in [-1, 1]) with its LR (`(n, c, h, w)`)."""
        return (hr - self.upsample(lr)) / self.config.residual_std if self.config.target == "residual" else hr

    def decode(self, x_t: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        """The image of which `to_target` is `x_t`."""
        return self.upsample(lr) + self.config.residual_std * x_t if self.config.target == "residual" else x_t

    def upsample(self, lr: torch.Tensor) -> torch.Tensor:
        """The LR (`(n, c, h, w)`) by bicubic interpolation on the grid of the HR: what the residual is added to."""
        return super().upsample(lr, antialias=self.config.bicubic_coefficient == -0.5)

    def encode_image(self, lr: torch.Tensor) -> torch.Tensor | None:
        """Context tokens of images (`(n, 3, h, w)` in [-1, 1]); `None` without an encoder."""
        if self.image_encoder is None:
            return None
        config = self.config
        return context_tokens(self.image_encoder, lr, config.image_mean, config.image_std, config.image_size)
