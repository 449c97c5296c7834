"""Super-resolution by flow matching: low-resolution images in, images `scale` times as large out.

This file and those it imports from beside it travel with a checkpoint, so that it loads without flowsr installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import PIL.Image
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .base import SRPipelineMixin, check_consistency, check_flow, check_whole, encodes
from .conditioning import estimate, read_class_labels, repeat
from .consistency import reach
from .fidelity import StopMap, check_fidelity, read_fidelity
from .flow import FlowMixin, check_solver
from .image_processor import batches, read_images, stack_if_equal, write_images
from .output_size import resize
from .sharing import SelfContainedMixin
from .tiling import encode, lr_multiple


@dataclass
class FlowMatchSROutput(ImagePipelineOutput):
    """What a call gives; the last two only with `output_uncertainty=True`.

    Attributes:
        images: the outputs.
        mean: of the outputs of each image, in the same kind.
        uncertainty (`np.ndarray` of shape `(images, H, W)`, or a list of `(H, W)` where sizes differ): for each pixel
            the standard deviation to be expected of the mean's colours from the truth, where white is 1.
    """

    mean: list | np.ndarray | torch.Tensor | None = None
    uncertainty: list | np.ndarray | None = None


def spread(samples: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
    """Mean `(1, c, h, w)` and standard deviation `(h, w)` of samples `(n, c, h, w)`, the latter over all colours."""
    deviation = samples.var(dim=0).mean(dim=0).sqrt()
    return samples.mean(dim=0, keepdim=True), deviation.cpu().numpy()


class FlowMatchSRPipeline(SelfContainedMixin, FlowMixin, SRPipelineMixin, DiffusionPipeline):
    r"""Upscales images along a learned flow from the (noisy) upsampled LR, or from noise, to the image.

    Args:
        unet ([`UNetSRModel`] or [`EncodedSRModel`]): called as `unet(x_t, timestep, lr)`. A network with an encoder
            (`encode(lr)`) runs that once for an image, and its head at each step but the first.
        scheduler ([`FlowMatchSREulerScheduler`]): draws the source and steps along the flow.
        data_range (`list[float]`): black and white as network and flow see them; saved with the pipeline.
        prior (`torch.nn.Module`, *optional*): gives the estimate that the flow starts from, for a scheduler with
            `source="prior"` (posterior-mean rectified flow, Ohayon et al. 2024): a transformers image-to-image model
            such as `Swin2SRForImageSuperResolution`, or a `ModelMixin`; see [`estimate`] for how it is called. None
            where the network has an encoder, which gives that estimate.
        uncertainty_factor (`float`): what the standard deviation of samples is multiplied by to be that of the error.
            Samples of a network lie closer together than the truth lies to them; the factor is measured once for a
            checkpoint (benchmarks/uncertainty.py).

    Raises:
        ValueError: where network, scheduler and prior do not fit each other.

    Example:

        >>> from flowsr import FlowMatchSRPipeline, bundled
        >>> pipe = FlowMatchSRPipeline.from_pretrained(bundled("x4"))
        >>> pipe(image).images[0].save("large.png")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "prior->unet"
    _optional_components = ["prior"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        data_range: list[float] = [-1.0, 1.0],
        prior: torch.nn.Module | None = None,
        uncertainty_factor: float = 1.0,
    ):
        super().__init__()
        if not isinstance(uncertainty_factor, (int, float)) or not 0 < uncertainty_factor < math.inf:
            raise ValueError(f"`uncertainty_factor` must be a positive number, got {uncertainty_factor!r}.")
        self.register_modules(unet=unet, scheduler=scheduler, prior=prior)
        self.register_to_config(data_range=list(data_range), uncertainty_factor=uncertainty_factor)
        check_flow(self)

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        num_inference_steps: int = 4,
        sigmas: list[float] | None = None,
        fidelity: float | np.ndarray | torch.Tensor | PIL.Image.Image = 0.0,
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
        corner: tuple[int, int] = (0, 0),
        outscale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        output_uncertainty: bool = False,
    ) -> FlowMatchSROutput | tuple:
        """Upscales; each output is exactly `scale_factor` times its input, or of the size that is asked for.

        Args:
            image: PIL image of any mode (given back in that mode, with alpha, ICC profile and EXIF); array `(h, w)`,
                `(h, w, c)` or `(n, h, w, c)` of uint8, uint16 or float in [0, 1]; tensor `(c, h, w)` or `(n, c, h, w)`
                of uint8 or float in [0, 1]; 1 to 4 channels, 2 and 4 with alpha; or a list of these, from 1x1 on.
            num_inference_steps (`int`): steps along the flow, one network evaluation each; for a network with an
                encoder, that and one evaluation of its head for each step but the first.
            sigmas (`list[float]`, *optional*): starts of the steps instead, falling within (0, 1].
            fidelity (`float` in [0, 1]): 0 goes all the way to a vivid sample; 1 answers at once with the most
                faithful image (one evaluation, or the encoder alone, whatever `num_inference_steps`); between them the
                flow is followed down to sigma = `fidelity`, and the estimate there is the answer. Below
                1 / `num_inference_steps` it equals 0. A map with the height and width of the image, an array or tensor
                `(h, w)` or a PIL image of mode "L" with 255 for 1, is a dial for each pixel of the LR: the whole flow
                is followed, and each pixel takes the estimate at sigma = its fidelity (see [`StopMap`]).
            solver: "euler" takes one network evaluation a step, "midpoint" and "heun" two, "rk4" four; "dopri5" takes
                as many as `rtol` and `atol` need (see [`integrate`]). `num_evaluations` holds the number afterwards:
                that of the last batch, without encoders and the free answers at sigma = 1, guidance counted once.
            consistency: "exact" makes the output downscale (bicubic) to the input: for clean images that were
                downscaled; "soft" does so for colour and tone alone: for camera images and JPEGs.
            guidance_scale (`float`): classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w) on the LR.
            num_images_per_prompt (`int`): outputs per image, next to each other, from one encoding.
            generator: of the source noise, also a list of one per output.
            latents (`torch.Tensor` of shape `(outputs, c, scale * h, scale * w)`, *optional*): initial state to start
                from instead of a draw, in the data range of the checkpoint.
            tile (`int`, *optional*): work in tiles of this many LR pixels, to bound the memory of the network. Where
                it has no normalisation over positions and no attention, the result is that of the whole image; other
                networks are blended over an overlap of `tile` / 4, which is close but not the same. A prior always
                sees the whole image, so that its estimate is the same with tiles; its memory is not bounded.
            output_type: "pil"; "np" `(n, h, w, c)` or "pt" `(n, c, h, w)` in [0, 1] (a list where sizes differ);
                "latent", the final state in the data range of the checkpoint, before clamping and consistency.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})` after each step; may return new latents.
                `pipe._interrupt = True` within it stops there.
            class_labels (`int`, list or tensor of these, *optional*): of all images or of each,
                0..num_class_embeds - 1, for a network that knows classes; without, no class.
            corner (`tuple[int, int]`): row and column in LR pixels of the first pixel of each image, which is a part
                of a larger one. Beyond `halo` pixels from where it was cut, the output is that of the larger image.
            outscale (`float`, *optional*), height, width (`int`, *optional*): size of the outputs: that many output
                pixels per input pixel, or that many pixels; one side alone keeps the proportions. The finished image
                of `scale_factor` times the input is resized by Lanczos' kernel, antialiased; beyond `scale_factor`
                that adds pixels and no detail.
            output_uncertainty (`bool`): also give the mean of the outputs of each image, and its uncertainty pixel by
                pixel: the standard deviation of these outputs times `uncertainty_factor`. Take eight outputs
                (`num_images_per_prompt=8`) or more.

        Returns:
            [`FlowMatchSROutput`] with `images`, or the tuple `(images,)`; with `output_uncertainty` also `mean` and
            `uncertainty`.

        Raises:
            ValueError, TypeError: for input that cannot be right, before any work.
        """
        images = read_images(image)
        size = self.output_size(outscale, height, width, output_type)
        check_flow(self)
        check_solver(solver, rtol, atol, callback_on_step_end)
        fidelity = read_fidelity(fidelity, {tuple(each.color.shape[-2:]) for each in images})
        mapped = isinstance(fidelity, torch.Tensor)
        if mapped and solver != "euler":
            raise ValueError(f"A map of `fidelity` goes with the steps of solver 'euler' alone, got {solver!r}.")
        lowest = 0.0 if mapped else fidelity  # how far the flow is followed
        if sigmas is not None and (mapped or fidelity != 0):
            raise ValueError(
                "Give `sigmas` or `fidelity`, not both: `fidelity` chooses the grid that `sigmas` replaces."
            )
        if not all(isinstance(side, (int, np.integer)) and side >= 0 for side in corner) or len(corner) != 2:
            raise ValueError(
                f"`corner` must be a row and a column in LR pixels, whole numbers from 0, got {corner!r}."
            )
        if tuple(corner) != (0, 0):
            self.halo(consistency=consistency)  # whether there can be parts of images at all
        if (
            latents is None
            and self.scheduler.config.source == "prior"
            and self.prior is None
            and not encodes(self.unet)
        ):
            raise ValueError(
                "This flow starts from a prior's estimate: load the pipeline with `prior=`, or pass that estimate and "
                "noise as `latents`."
            )
        self.check_inputs(
            images, consistency, num_images_per_prompt, tile, num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale, generator=generator, latents=latents, output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        if output_uncertainty and (num_images_per_prompt < 2 or output_type == "latent" or lowest == 1):
            raise ValueError(
                "`output_uncertainty` compares finished samples: it needs `num_images_per_prompt` from 2, better 8, a "
                f"`fidelity` below 1 and no 'latent', got {num_images_per_prompt}, {fidelity} and {output_type!r}."
            )
        device = self._execution_device
        labels = read_class_labels(self.unet, class_labels, len(images), device)
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.set_sigmas(num_inference_steps, sigmas, lowest)
        self._num_timesteps = len(self.scheduler.timesteps)
        batched, outputs, means, deviations = batches(images, num_images_per_prompt), [], [], []
        with self.progress_bar(total=len(batched) * self._num_timesteps) as bar:
            for batch in batched:
                # 1. The LR, what the network sees beside the state, and the source.
                self.begin_batch()
                lr = batch.lr(device)
                encoding = self.encode(lr, tile)
                conditions = self.conditions(lr, None if labels is None else labels[batch.inputs], encoding)
                conditions = repeat(conditions, num_images_per_prompt)
                if latents is None:
                    prior_estimate = None if encoding is None else encoding.mean
                    generators = generator[batch.outputs] if isinstance(generator, list) else generator
                    x_t = self.prepare_source(lr, generators, num_images_per_prompt, prior_estimate, corner)
                else:
                    x_t = latents[batch.outputs].to(lr)

                # 2. Along the flow.
                evaluate = partial(self.evaluate, conditions=conditions, tile=tile)
                stop = StopMap(fidelity.to(device), self.scale_factor, self.scheduler) if mapped else None
                x_t = self.follow_flow(
                    stop.watch(evaluate) if mapped else evaluate, x_t, solver, rtol, atol, bar, callback_on_step_end,
                    callback_on_step_end_tensor_inputs,
                    jump=lowest >= 1 / num_inference_steps,
                )  # fmt: skip
                x_t = stop.image if mapped else x_t

                # 3. Agreement with the LR, and back into the kind of image that came.
                outputs += self.write(batch, x_t, conditions["lr"], consistency, output_type, size)
                if output_uncertainty:
                    whole = size.of(*lr.shape[-2:])
                    made = resize(self.pixels(x_t, conditions["lr"], consistency).clamp(0, 1), whole)
                    for source, samples in zip(batch.images, made.split(num_images_per_prompt)):
                        mean, deviation = spread(samples)
                        means += write_images(mean, output_type, source, whole)
                        deviations.append(self.config.uncertainty_factor * deviation)

        self.maybe_free_model_hooks()
        outputs = stack_if_equal(outputs, output_type)
        if not output_uncertainty:
            return FlowMatchSROutput(images=outputs) if return_dict else (outputs,)
        found = (outputs, stack_if_equal(means, output_type), stack_if_equal(deviations, "np"))
        return FlowMatchSROutput(*found) if return_dict else found

    def set_sigmas(self, num_inference_steps: int, sigmas: list[float] | None, fidelity: float) -> None:
        """Sets the grid of the scheduler: `sigmas`, or that of `grid`."""
        sigmas = self.grid(num_inference_steps, fidelity) if sigmas is None else sigmas
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)

    def grid(self, num_inference_steps: int, fidelity: float) -> list[float]:
        """Starts of the steps: evenly from 1 to `fidelity`, whence the last step jumps to the image."""
        last = max(fidelity, 1 / num_inference_steps)
        return [1.0] if last == 1 else np.linspace(1, last, num_inference_steps).tolist()

    def halo(
        self,
        num_inference_steps: int = 4,
        fidelity: float = 0.0,
        consistency: Literal["exact", "soft"] | None = None,
    ) -> int:
        """LR pixels around a part of an image on which its output depends, each way, by Euler's steps.

        What is cut out of an image with so much around it, as far as there is, is upscaled as in the whole image:

        >>> part = image[y - halo : y + side + halo, x - halo : x + side + halo]  # doctest: +SKIP
        >>> pipe(part, corner=(y - halo, x - halo), generator=seeded)  # doctest: +SKIP

        A multiple of what the network needs of the sides of an LR, as corners and sides of parts must be too.

        Raises:
            ValueError: for a network, a source or a kind of noise by which every pixel depends on the whole image.
        """
        check_whole("num_inference_steps", num_inference_steps)
        check_fidelity(fidelity)
        check_consistency(consistency)
        field, source, scale = self.unet.receptive_field, self.scheduler.config.source, self.scale_factor
        if field is None:
            raise ValueError(
                f"This {type(self.unet).__name__} normalises over positions or attends to all of them: each pixel "
                "depends on the whole image, and no part can be upscaled by itself. `tile` blends its parts."
            )
        if self.scheduler.config.noise != "positional":
            raise ValueError(
                "The source noise of this scheduler is one sequence over the whole image; take "
                "`FlowMatchSREulerScheduler.from_config(pipe.scheduler.config, noise='positional')`."
            )
        if source == "prior" and not encodes(self.unet):
            raise ValueError("A prior sees the whole image; no part can be upscaled by itself.")
        evaluations = len(self.grid(num_inference_steps, fidelity))
        if encodes(self.unet):
            pixels = self.unet.encoder_receptive_field + (evaluations - 1) * self.unet.head_receptive_field
        else:
            pixels = evaluations * field + 2 * scale  # the source: bicubic upsampling
        side = math.ceil(pixels / scale) + reach(scale, consistency)
        return math.ceil(side / lr_multiple(self.unet)) * lr_multiple(self.unet)

    def encode(self, lr: torch.Tensor, tile: int | None = None):
        """Encodes the LR for all steps, where the network has an encoder; else `None`.

        Args:
            lr (`torch.Tensor` of shape `(n, 3, h, w)`, in [-1, 1]).
            tile (`int`, *optional*): side of a tile in LR pixels; the encoding is the same.

        Returns:
            [`SREncoding`]: `features` `(n, c, h, w)` and `mean` `(n, 3, scale * h, scale * w)` in the data range.
        """
        return encode(self.unet, self.to_data_range(lr), tile) if encodes(self.unet) else None

    def conditions(self, lr: torch.Tensor, class_labels: torch.Tensor | None = None, encoding=None) -> dict:
        """What the network is called with beside state and timestep.

        Args:
            lr (`torch.Tensor` of shape `(n, 3, h, w)`, in [-1, 1]).
            class_labels (`torch.LongTensor` of shape `(n,)`, *optional*): in 0..num_class_embeds, the last meaning
                "no class".
            encoding ([`SREncoding`], *optional*): of `encode`.
        """
        found = {"lr": self.to_data_range(lr), "class_labels": class_labels, "encoding": encoding}
        return {name: value for name, value in found.items() if value is not None}

    def prepare_source(
        self,
        lr: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        prior_estimate: torch.Tensor | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        """Draws where the flow starts.

        Args:
            lr (`torch.Tensor` of shape `(n, 3, h, w)`, in [-1, 1]).
            generator: of the noise, also a list of one per output.
            num_images_per_prompt (`int`): draws per LR, next to each other.
            prior_estimate (`torch.Tensor` of shape `(n, 3, scale * h, scale * w)`, *optional*): the mean for a
                scheduler with `source="prior"`, in the data range; by default that of the prior or of the network.
            corner: as in the call, in LR pixels.

        Returns:
            `torch.Tensor` of shape `(n * num_images_per_prompt, 3, scale * h, scale * w)`, in the data range.
        """
        if self.scheduler.config.source == "prior" and prior_estimate is None:
            if encodes(self.unet):
                prior_estimate = self.encode(lr).mean
            else:
                prior_estimate = self.to_data_range(estimate(self.prior, lr, self.scale_factor))
        lr_up = self.upsample(self.to_data_range(lr)) if prior_estimate is None else prior_estimate
        lr_up = lr_up.repeat_interleave(num_images_per_prompt, dim=0)
        place = tuple(side * self.scale_factor for side in corner)
        return self.scheduler.sample_source(lr_up, None if prior_estimate is None else lr_up, generator, place)
