"""What the pipelines share: the range of the data, checks before any work, the loop, and what diffusers expects."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .consistency import make_consistent
from .image_processor import Batch, InputImage, write_images
from .output_size import OutputSize
from .tiling import predict

# What fits what. The constructors ask, and each call, as a component can be swapped.


def encodes(unet: torch.nn.Module) -> bool:
    """Whether a network has an encoder of its own, which sees the LR alone and gives the mean of the source."""
    return hasattr(unet, "encode")


def assumed_flow(unet: torch.nn.Module) -> dict | None:
    """Settings of the scheduler for which the formulas of a network hold; `None` where it has no such formulas."""
    if not encodes(unet) and not getattr(unet.config, "precondition", False):
        return None
    return {
        "source": "prior" if encodes(unet) else "lr",
        "path": "linear",
        "prediction_type": "sample",
        "num_train_timesteps": 1000,
        "source_noise_std": unet.config.source_noise_std,
    }


def check_task(pipe: DiffusionPipeline) -> None:
    """Raises a ValueError for a network that upscales in a pipeline that generates, or the other way round."""
    upscales = pipe._upscales
    channels = getattr(pipe.unet.config, "lr_channels", 3 if upscales else None)
    if upscales != (channels is not None):
        wanted = "upscales: its network needs `lr_channels`" if upscales else "generates: `lr_channels` must be None"
        raise ValueError(f"{type(pipe).__name__} {wanted}, got {channels}.")


def check_flow(pipe: DiffusionPipeline) -> None:
    """Raises a ValueError where network, scheduler and prior of a pipeline for flows do not fit each other."""
    unet, scheduler, prior = pipe.unet, pipe.scheduler, getattr(pipe, "prior", None)
    if unet is None or scheduler is None:  # loaded in parts
        return
    check_task(pipe)
    if not hasattr(scheduler, "sample_source"):
        raise ValueError(
            f"A flow needs a FlowMatchSREulerScheduler, which knows its source; got {type(scheduler).__name__}, "
            "which is for DDPMSRPipeline if it reverses a diffusion."
        )
    wanted, source = assumed_flow(unet) or {}, scheduler.config.source
    wrong = [name for name, value in wanted.items() if scheduler.config[name] != value]
    if wrong:
        named = [", ".join(f"{name}={config[name]!r}" for name in wrong) for config in (wanted, scheduler.config)]
        way_out = "" if encodes(unet) else ", or take a network with `precondition=False`"
        raise ValueError(
            f"The formulas of this {type(unet).__name__} hold for a flow with {named[0]}, got a scheduler with "
            f"{named[1]}; change the scheduler{way_out}."
        )
    if source != "noise" and not pipe._upscales:
        raise ValueError(f"{type(pipe).__name__} starts from noise: it needs `source='noise'`, got {source!r}.")
    if prior is not None and (source != "prior" or encodes(unet)):
        start = "its network's own estimate" if encodes(unet) else repr(source)
        raise ValueError(f"This pipeline has a `prior`, but its flow starts from {start}; leave `prior` out.")


def check_diffusion(pipe: DiffusionPipeline) -> None:
    """Raises a ValueError for a scheduler that cannot reverse the diffusion that a network was trained on."""
    unet, scheduler = pipe.unet, pipe.scheduler
    if unet is None or scheduler is None:  # loaded in parts
        return
    check_task(pipe)
    name, config = type(scheduler).__name__, scheduler.config
    predicts = config.get("prediction_type")
    if (
        not hasattr(scheduler, "alphas_cumprod")
        or config.get("use_flow_sigmas")
        or predicts not in ("epsilon", "v_prediction", "sample")
    ):
        raise ValueError(
            f"{name} (prediction_type {predicts!r}) does not reverse a diffusion with betas; take DDIMScheduler, "
            "DDPMScheduler, DPMSolverMultistepScheduler or another that does. Flows go with FlowMatchSRPipeline."
        )
    arguments = inspect.signature(scheduler.step).parameters.values()
    needed = [a.name for a in arguments if a.default is a.empty and a.kind is not a.VAR_KEYWORD]
    if needed != ["model_output", "timestep", "sample"] or "Inverse" in name:
        raise ValueError(
            f"{name} is made for another task than going from noise to an image (its step takes {needed}); take "
            "DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler or another for sampling."
        )
    if "learned" in (config.get("variance_type") or "") and unet.config.out_channels == unet.config.in_channels:
        raise ValueError(
            f"{name} expects a learned variance (`variance_type={config.variance_type!r}`), which this network does "
            "not predict; set `variance_type='fixed_small'`."
        )
    if assumed_flow(unet) is not None:
        raise ValueError(
            f"The formulas of this {type(unet).__name__} hold for a flow, not for the diffusion of {name}; take "
            "FlowMatchSRPipeline, or a UNetSRModel with `precondition=False`."
        )


def check_whole(name: str, value: int) -> None:
    """Raises a ValueError for what is no whole number from 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a whole number from 1, got {value!r}.")


def check_consistency(consistency: str | None) -> None:
    """Raises a ValueError for a kind of agreement that there is not."""
    if consistency not in ("exact", "soft", None):
        raise ValueError(f"`consistency` must be 'exact', 'soft' or None, got {consistency!r}.")


class PipelineMixin:
    """For a `DiffusionPipeline` with a `unet` and a `scheduler`."""

    _callback_tensor_inputs = ["latents"]
    _upscales: bool = False  # remote code is loaded anew for each repository, so that `isinstance` would not tell
    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _interrupt: bool = False
    num_evaluations: int = 0

    @property
    def guidance_scale(self) -> float:
        """Of the next step: a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The timestep of the present evaluation; caches such as pyramid attention broadcast ask for it."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> DiffusionPipeline:
        """As in diffusers: a pipeline that shares the components of another, whatever network that has.

        diffusers takes a component over where its class is the one annotated; the files here annotate base classes,
        because they must load without each other.
        """
        expected, _ = cls._get_signature_keys(cls)
        shared = {name: component for name, component in pipeline.components.items() if name in expected}
        return super().from_pipe(pipeline, **{**shared, **kwargs})

    def to_data_range(self, x: torch.Tensor) -> torch.Tensor:
        """[-1, 1] -> the data range of the checkpoint."""
        low, high = getattr(self.config, "data_range", (-1, 1))
        return x if (low, high) == (-1, 1) else (x + 1) / 2 * (high - low) + low

    def from_data_range(self, x: torch.Tensor) -> torch.Tensor:
        """The data range of the checkpoint -> [-1, 1]."""
        low, high = getattr(self.config, "data_range", (-1, 1))
        return x if (low, high) == (-1, 1) else (x - low) / (high - low) * 2 - 1

    def check_call(
        self,
        outputs: int,
        sizes: set[tuple[int, int]],
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str] | None,
    ) -> None:
        """Raises a ValueError that says what was found, what is wanted and the way out.

        Args:
            outputs (`int`), sizes: number of the output images, and their different heights and widths in pixels.
        """
        check_whole("num_inference_steps", num_inference_steps)
        if not isinstance(guidance_scale, (int, float)) or not math.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, got {guidance_scale!r}.")
        if guidance_scale != 1 and not getattr(self.unet.config, "condition_dropout", 0):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this network was trained without condition dropout; leave "
                "it at 1, or train with `condition_dropout`."
            )
        if guidance_scale != 1 and getattr(self.unet, "is_cache_enabled", False):
            raise ValueError(
                "A cache (`unet.enable_cache`) reuses what the evaluation before has seen, which guidance makes in "
                "turn with and without the condition: leave `guidance_scale` at 1, or call `unet.disable_cache()`."
            )
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        generators = generator if isinstance(generator, list) else [generator]
        if not all(each is None or isinstance(each, torch.Generator) for each in generators):
            raise ValueError(
                "`generator` must be a torch.Generator or a list of them, got "
                f"{generator!r}; a seed becomes one by `torch.Generator().manual_seed(seed)`."
            )
        if isinstance(generator, list) and len(generator) != outputs:
            raise ValueError(f"`generator` must hold one generator per output, got {len(generator)} for {outputs}.")
        if latents is not None:
            wanted = [(outputs, self.unet.config.in_channels, *size) for size in sizes]
            if [tuple(latents.shape)] != wanted:
                raise ValueError(
                    f"`latents` must be the initial state of every output, of shape {wanted[0]}, got "
                    f"{tuple(latents.shape)}; images of different sizes cannot share one."
                )
            if not torch.isfinite(latents).all():
                raise ValueError("`latents` hold NaN or infinity.")
        if self._execution_device.type == "cpu" and self.unet.dtype == torch.float16:
            raise ValueError(
                "float16 is thousands of times slower than float32 on a CPU; use pipe.to(torch.bfloat16) or "
                "pipe.to(torch.float32)."
            )

    def begin_batch(self) -> None:
        """Starts a batch: forgets the evaluations before, and what caches of diffusers hold of other images."""
        self.num_evaluations = 0
        if getattr(self.unet, "is_cache_enabled", False):
            self.unet._reset_stateful_cache()

    def evaluate(
        self, x_t: torch.Tensor, timestep: torch.Tensor, conditions: dict, tile: int | None = None
    ) -> torch.Tensor:
        """What the network predicts at one state, under the present guidance; counted in `num_evaluations`.

        At sigma = 1 a network that encodes the LR answers with the mean of its encoding, which costs nothing.
        """
        self._current_timestep = timestep
        encoding = conditions.get("encoding")
        if encoding is not None and timestep == self.scheduler.config.num_train_timesteps:
            return encoding.mean.to(x_t)
        self.num_evaluations += 1
        return predict(self.unet, x_t, timestep, conditions, tile, self.guidance_scale)

    def denoise(
        self,
        evaluate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        bar,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None,
        callback_on_step_end_tensor_inputs: list[str] | None,
        **step_kwargs,
    ) -> torch.Tensor:
        """The loop of every pipeline: from a state along `timesteps` by the scheduler's steps.

        Args:
            evaluate: the network's prediction, of state and timestep.
            bar: progress bar of diffusers, moved by one each step.
            step_kwargs: further arguments of `scheduler.step`.
        """
        for step, timestep in enumerate(timesteps):
            if self.interrupt:
                break
            prediction = evaluate(self.scheduler.scale_model_input(x_t, timestep), timestep)
            x_t = self.scheduler.step(prediction, timestep, x_t, **step_kwargs, return_dict=False)[0]
            if callback_on_step_end is not None:
                callback_kwargs = {"latents": x_t} if callback_on_step_end_tensor_inputs else {}
                answer = callback_on_step_end(self, step, timestep, callback_kwargs)
                if not isinstance(answer, dict):
                    raise ValueError(
                        "`callback_on_step_end` must return a dict, such as the one it is given as its fourth "
                        f"argument or {{}}, got {answer!r}."
                    )
                x_t = answer.get("latents", x_t)
            bar.update()
        return x_t


def check_finite(x_t: torch.Tensor, unet: torch.nn.Module) -> None:
    """Raises a ValueError for a final state that holds NaN or infinity, before it becomes a black image."""
    if not torch.isfinite(x_t).all():
        raise ValueError(
            f"The network answered NaN or infinity: its weights are broken, or {unet.dtype} is too coarse for them; "
            "try pipe.to(torch.float32), or another checkpoint."
        )


class SRPipelineMixin(PipelineMixin):
    """For the pipelines that upscale."""

    _upscales = True

    @property
    def scale_factor(self) -> int:
        """HR pixels per LR pixel, each way."""
        return self.unet.config.scale_factor

    def check_inputs(
        self,
        images: list[InputImage],
        consistency: str | None,
        num_images_per_prompt: int,
        tile: int | None,
        **call,
    ) -> None:
        """As `check_call`, whose further arguments are in `call`."""
        check_consistency(consistency)
        check_whole("num_images_per_prompt", num_images_per_prompt)
        if tile is not None:
            check_whole("tile (LR pixels)", tile)
        if tile is not None and getattr(self.unet, "is_cache_enabled", False):
            raise ValueError(
                "A cache (`unet.enable_cache`) reuses what the evaluation before has seen, which must be of the same "
                "image: leave `tile` None, or call `unet.disable_cache()`."
            )
        sizes = {tuple(side * self.scale_factor for side in image.color.shape[-2:]) for image in images}
        self.check_call(len(images) * num_images_per_prompt, sizes, **call)

    def upsample(self, lr: torch.Tensor, antialias: bool = True) -> torch.Tensor:
        """LR (`(n, c, h, w)`) on the grid of the HR by bicubic interpolation; `antialias` takes Pillow's cubic."""
        return F.interpolate(lr, scale_factor=float(self.scale_factor), mode="bicubic", antialias=antialias)

    def decode(self, x_t: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
        """The image in [-1, 1] that a final state means; `lr` as in `conditions`."""
        return self.from_data_range(x_t)

    def output_size(
        self, outscale: float | None, height: int | None, width: int | None, output_type: str
    ) -> OutputSize:
        """Raises a ValueError for what is no size, and for a latent, which has one size alone."""
        size = OutputSize(self.scale_factor, outscale, height, width)
        if output_type == "latent" and size != OutputSize(self.scale_factor):
            raise ValueError(
                "`outscale`, `height` and `width` resize a finished image; leave them with `output_type='latent'`."
            )
        return size

    def pixels(self, x_t: torch.Tensor, lr: torch.Tensor, consistency: str | None) -> torch.Tensor:
        """Final states as images `(outputs, 3, scale * h, scale * w)`, in [0, 1] or little beyond; see `write`."""
        hr = self.decode(x_t, lr)
        if consistency is not None:
            hr = make_consistent(hr, self.from_data_range(lr), self.scale_factor, consistency)
        return (hr.float() + 1) / 2

    def write(
        self,
        batch: Batch,
        x_t: torch.Tensor,
        lr: torch.Tensor,
        consistency: str | None,
        output_type: str,
        size: OutputSize,
    ) -> list:
        """The outputs of a batch, in the kinds of its images and those of one image next to each other.

        Args:
            x_t (`torch.Tensor` of shape `(outputs, 3, scale * h, scale * w)`): the final states.
            lr (`torch.Tensor` of shape `(outputs, 3, h, w)`): as in `conditions`.
            size ([`OutputSize`]): to be resized to, once the image agrees with its LR.
        """
        check_finite(x_t, self.unet)
        if output_type == "latent":
            return list(x_t)
        outputs = self.pixels(x_t, lr, consistency).split(len(x_t) // len(batch.images))
        size = size.of(*lr.shape[-2:])
        return [
            made for image, each in zip(batch.images, outputs) for made in write_images(each, output_type, image, size)
        ]
