"""Super-resolution by flow matching: low-resolution pictures in, pictures `scale` times as large out.

This file and those it imports from beside it travel with a checkpoint, so that it loads without flowsr installed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .checks import check_flow, check_inputs, read_class_labels
from .consistency import make_consistent
from .conventions import ConventionsMixin
from .pictures import group_by_size, read_images, stack_if_equal, write_group
from .prior import estimate
from .sharing import SelfContainedMixin
from .solvers import SMALLEST_SIGMA, check_solver, integrate
from .tiles import predict


class FlowMatchSRPipeline(SelfContainedMixin, ConventionsMixin, DiffusionPipeline):
    r"""Upscales pictures along a learned flow from the (noisy) upsampled LR, or from noise, to the image.

    Args:
        unet ([`UNetSRModel`]): called as `unet(x_t, timestep, lr)`.
        scheduler ([`FlowMatchSREulerScheduler`]): draws the source and steps along the flow.
        data_range (`list[float]`): black and white as network and flow see them; saved with the pipeline.
        prior (`torch.nn.Module`, *optional*): gives the estimate that the flow starts from, for a scheduler with
            `source="prior"` (posterior-mean rectified flow, Ohayon et al. 2024): a transformers image-to-image model
            such as `Swin2SRForImageSuperResolution`, or a `ModelMixin`; see [`estimate`] for what it is asked.

    Example:

        >>> from flowsr import FlowMatchSRPipeline, bundled
        >>> pipe = FlowMatchSRPipeline.from_pretrained(bundled("x4"))
        >>> pipe(image).images[0].save("large.png")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "prior->unet"
    _optional_components = ["prior"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        data_range: list[float] = [-1.0, 1.0],
        prior: torch.nn.Module | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, prior=prior)
        self.register_to_config(data_range=list(data_range))
        self.num_evaluations = 0

    @property
    def scale_factor(self) -> int:
        """HR pixels per LR pixel, each way."""
        return self.unet.config.scale_factor

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        num_inference_steps: int = 4,
        sigmas: list[float] | None = None,
        fidelity: float = 0.0,
        solver: Literal["euler", "midpoint", "heun", "rk4", "dopri5"] = "euler",
        rtol: float = 1e-3,
        atol: float = 1e-3,
        consistency: Literal["exact", "soft"] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        tile: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        class_labels: int | list[int] | torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Upscales; each output is exactly `scale_factor` times its input.

        Args:
            image: PIL picture of any mode (given back in that mode, with alpha, ICC profile and EXIF); array `(h, w)`,
                `(h, w, c)` or `(n, h, w, c)` of uint8, uint16 or float in [0, 1]; tensor `(c, h, w)` or `(n, c, h, w)`
                of uint8 or float in [0, 1]; 1 to 4 channels, 2 and 4 with alpha; or a list of these, from 1x1 on.
            num_inference_steps (`int`): steps along the flow, one network evaluation each.
            sigmas (`list[float]`, *optional*): starts of the steps instead, falling within (0, 1].
            fidelity (`float` in [0, 1]): 0 goes all the way to a vivid sample; 1 answers at once with the most
                faithful picture (one evaluation whatever `num_inference_steps`); between them the flow is followed
                down to sigma = `fidelity`, and the estimate there is the answer. Below 1 / `num_inference_steps` it
                equals 0.
            solver: "euler" takes one network evaluation a step, "midpoint" and "heun" two, "rk4" four; "dopri5" takes
                as many as `rtol` and `atol` need (see [`integrate`]). `num_evaluations` holds the number afterwards.
            consistency: "exact" makes the output downscale (bicubic) to the input: for clean pictures that were
                downscaled; "soft" does so for colour and tone alone: for camera pictures and JPEGs.
            guidance_scale (`float`): classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w) on the LR.
            num_images_per_prompt (`int`): outputs per picture, next to each other.
            generator: of the source noise, also a list of one per output.
            latents (`torch.Tensor` of shape `(outputs, c, scale * h, scale * w)`, *optional*): initial state to start
                from instead of a draw, in the data range of the checkpoint.
            tile (`int`, *optional*): work in tiles of this many LR pixels, to bound the memory of the network. Where
                it has no normalisation over positions and no attention, the result is that of the whole picture; other
                networks are blended over an overlap of `tile` / 4, which is close but not the same. A prior always
                sees the whole picture, so that its estimate is the same with tiles; its memory is not bounded.
            output_type: "pil"; "np" `(n, h, w, c)` or "pt" `(n, c, h, w)` in [0, 1] (a list where sizes differ);
                "latent", the final state in the data range of the checkpoint, before clamping and consistency.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})` after each step; may return new latents.
                `pipe._interrupt = True` within it stops there.
            class_labels (`int`, list or tensor of these, *optional*): of all pictures or of each,
                0..num_class_embeds - 1, for a network that knows classes; without, no class.

        Returns:
            [`~pipelines.ImagePipelineOutput`] with `images`, or the tuple `(images,)`.

        Raises:
            ValueError, TypeError: for input that cannot be right, before any work.
        """
        pictures = read_images(image)
        check_flow(self.scheduler)
        check_solver(solver, callback_on_step_end)
        if not 0 <= fidelity <= 1:
            raise ValueError(f"`fidelity` must lie in [0, 1] (0 vivid, 1 faithful), got {fidelity}.")
        if sigmas is not None and fidelity != 0:
            raise ValueError(
                "Give `sigmas` or `fidelity`, not both: `fidelity` chooses the grid that `sigmas` replaces."
            )
        source = self.scheduler.config.source
        if latents is None and source == "prior" and self.prior is None:
            raise ValueError(
                "This flow starts from a prior's estimate: load the pipeline with `prior=`, or pass that estimate and "
                "noise as `latents`."
            )
        if self.prior is not None and source != "prior":
            raise ValueError(f"This pipeline has a `prior`, but its flow starts from {source!r}; leave `prior` out.")
        check_inputs(
            self, pictures, num_inference_steps, consistency, guidance_scale, num_images_per_prompt, generator,
            latents, tile, output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        inputs = sum(len(picture.color) for picture in pictures)
        labels = read_class_labels(self.unet, class_labels, inputs, self._execution_device)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.set_sigmas(num_inference_steps, sigmas, fidelity)
        groups = group_by_size(pictures)
        self._num_timesteps = len(self.scheduler.timesteps)

        images, done = [], 0
        with self.progress_bar(total=len(groups) * self._num_timesteps) as bar:
            for group in groups:
                # 1. The LR, and the start of the flow.
                color = torch.cat([picture.color for picture in group]).to(self._execution_device)
                lr = self.to_data_range(color).repeat_interleave(num_images_per_prompt, dim=0)
                mine = slice(done, done + len(lr))
                conditions = {}
                if labels is not None:
                    conditions["class_labels"] = labels.repeat_interleave(num_images_per_prompt)[mine]
                done += len(lr)
                if latents is None:
                    lr_up = F.interpolate(lr, scale_factor=float(self.scale_factor), mode="bicubic", antialias=True)
                    start = None
                    if self.prior is not None:
                        start = self.to_data_range(estimate(self.prior, color, self.scale_factor))
                        start = start.repeat_interleave(num_images_per_prompt, dim=0)
                    draw = generator[mine] if isinstance(generator, list) else generator
                    x_t = self.scheduler.sample_source(lr_up, start, generator=draw)
                else:
                    x_t = latents[mine].to(lr)

                # 2. Along the flow.
                def velocity(x: torch.Tensor, sigma: torch.Tensor, lr=lr, conditions=conditions) -> torch.Tensor:
                    if self.scheduler.config.prediction_type == "sample":
                        sigma = sigma.clamp(min=SMALLEST_SIGMA)
                    self._current_timestep = timestep = sigma * self.scheduler.config.num_train_timesteps
                    prediction = predict(self.unet, x, timestep, lr, tile, self.guidance_scale, conditions)
                    return self.scheduler.predict_velocity(prediction, x, timestep)

                timesteps, self.num_evaluations = self.scheduler.timesteps, len(self.scheduler.timesteps)
                if solver != "euler":
                    jumps = fidelity >= 1 / num_inference_steps  # at sigma = fidelity, to the image estimate
                    grid = self.scheduler.sigmas[:-1] if jumps else self.scheduler.sigmas
                    timesteps = timesteps[-1:] if jumps else timesteps[:0]
                    x_t, evaluations = integrate(velocity, x_t, grid, solver, rtol, atol)
                    self.num_evaluations = evaluations + len(timesteps)
                for step, timestep in enumerate(timesteps):
                    if self.interrupt:
                        break
                    self._current_timestep = timestep
                    prediction = predict(self.unet, x_t, timestep, lr, tile, self.guidance_scale, conditions)
                    x_t = self.scheduler.step(prediction, timestep, x_t, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        asked = {"latents": x_t} if callback_on_step_end_tensor_inputs else {}
                        x_t = callback_on_step_end(self, step, timestep, asked).pop("latents", x_t)
                    bar.update()

                # 3. Agreement with the LR, and back into the kind of picture that came.
                if output_type == "latent":
                    images.extend(x_t)
                    continue
                x_t, lr = self.from_data_range(x_t), self.from_data_range(lr)
                if consistency is not None:
                    x_t = make_consistent(x_t, lr, self.scale_factor, consistency)
                images += write_group(group, x_t, num_images_per_prompt, output_type)

        images = stack_if_equal(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def set_sigmas(self, num_inference_steps: int, sigmas: list[float] | None, fidelity: float) -> None:
        """Sets the grid of the scheduler: evenly from 1 to `fidelity`, whence the last step jumps to the image."""
        if sigmas is None:
            last = max(fidelity, 1 / num_inference_steps)
            sigmas = [1.0] if last == 1 else np.linspace(1, last, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)

    def to_data_range(self, x: torch.Tensor) -> torch.Tensor:
        """[-1, 1] -> the data range of the checkpoint."""
        low, high = self.config.data_range
        return x if (low, high) == (-1, 1) else (x + 1) / 2 * (high - low) + low

    def from_data_range(self, x: torch.Tensor) -> torch.Tensor:
        """The data range of the checkpoint -> [-1, 1]."""
        low, high = self.config.data_range
        return x if (low, high) == (-1, 1) else (x - low) / (high - low) * 2 - 1
