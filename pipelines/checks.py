"""What no super-resolution pipeline of this library can do is refused here, before any work."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .pictures import Picture


def check_callback_inputs(pipe: DiffusionPipeline, names: list[str] | None) -> None:
    """Raises a ValueError for tensors that a callback cannot have."""
    unknown = set(names or []) - set(pipe._callback_tensor_inputs)
    if unknown:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must be in {pipe._callback_tensor_inputs}, got {sorted(unknown)}."
        )


def read_class_labels(
    unet: torch.nn.Module, class_labels: int | list[int] | torch.Tensor | None, count: int, device: torch.device
) -> torch.Tensor | None:
    """Class indices of `count` pictures, `(count,)`; no class where there is no label; `None` for a network without.

    Raises:
        ValueError: for labels that the network does not know, or more or fewer than there are pictures.
    """
    classes = getattr(unet.config, "num_class_embeds", None)
    if classes is None:
        if class_labels is not None:
            raise ValueError("`class_labels` were given, but this network knows no classes.")
        return None
    labels = list(class_labels) if np.ndim(class_labels) else [class_labels] * count
    if len(labels) != count:
        raise ValueError(f"`class_labels` must hold one label per picture, got {len(labels)} for {count}.")
    wrong = [label for label in labels if label is not None and label not in range(classes)]
    if wrong:
        raise ValueError(f"`class_labels` must be whole numbers in 0..{classes - 1}, got {wrong}.")
    return torch.tensor([classes if label is None else int(label) for label in labels], device=device)


def check_guidance(unet: torch.nn.Module, guidance_scale: float) -> None:
    """Raises a ValueError where there is nothing that guidance could lead away from."""
    if guidance_scale != 1 and not getattr(unet.config, "condition_dropout", 0):
        raise ValueError(
            f"`guidance_scale` is {guidance_scale}, but this network was trained without condition dropout; leave "
            "it at 1, or train with `condition_dropout`."
        )
    if guidance_scale != 1 and getattr(unet, "is_cache_enabled", False):
        raise ValueError(
            "A cache (`unet.enable_cache`) reuses what the evaluation before has seen, which guidance makes in turn "
            "with and without the condition: leave `guidance_scale` at 1, or call `unet.disable_cache()`."
        )


def check_flow(scheduler: SchedulerMixin) -> None:
    """Raises a ValueError for a scheduler that does not know where a flow starts."""
    if not hasattr(scheduler, "sample_source"):
        raise ValueError(
            f"A flow needs a FlowMatchSREulerScheduler, which knows its source; got {type(scheduler).__name__}, "
            "which is for DDPMSRPipeline if it reverses a diffusion."
        )


def check_inputs(
    pipe: DiffusionPipeline,
    pictures: list[Picture],
    num_inference_steps: int,
    consistency: str | None,
    guidance_scale: float,
    num_images_per_prompt: int,
    generator: torch.Generator | list[torch.Generator] | None,
    latents: torch.Tensor | None,
    tile: int | None,
    output_type: str,
    callback_on_step_end_tensor_inputs: list[str] | None,
) -> None:
    """Raises a ValueError that says what was found, what is wanted and the way out."""
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` must be a whole number from 1, got {num_inference_steps!r}.")
    if consistency not in ("exact", "soft", None):
        raise ValueError(f"`consistency` must be 'exact', 'soft' or None, got {consistency!r}.")
    check_guidance(pipe.unet, guidance_scale)
    if num_images_per_prompt < 1:
        raise ValueError(f"`num_images_per_prompt` must be at least 1, got {num_images_per_prompt}.")
    if tile is not None and (not isinstance(tile, int) or tile < 1):
        raise ValueError(f"`tile` must be a number of LR pixels from 1, or None, got {tile!r}.")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
    check_callback_inputs(pipe, callback_on_step_end_tensor_inputs)
    count = sum(len(picture.color) for picture in pictures) * num_images_per_prompt
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"`generator` must hold one generator per output, got {len(generator)} for {count}.")
    if latents is not None:
        sizes = {tuple(side * pipe.scale_factor for side in picture.color.shape[-2:]) for picture in pictures}
        wanted = [(count, pipe.unet.config.in_channels, *size) for size in sizes]
        if [tuple(latents.shape)] != wanted:
            raise ValueError(
                f"`latents` must be the initial state of every output, of shape {wanted[0]}, got "
                f"{tuple(latents.shape)}; pictures of different sizes cannot share one."
            )
    several = len({picture.color.shape[-2:] for picture in pictures}) > 1
    if getattr(pipe.unet, "is_cache_enabled", False) and (tile is not None or several):
        raise ValueError(
            "A cache (`unet.enable_cache`) reuses what the evaluation before has seen, which must be of the same "
            "picture: leave `tile` None and pass pictures of one size, or call `unet.disable_cache()`."
        )
    if pipe._execution_device.type == "cpu" and pipe.unet.dtype == torch.float16:
        raise ValueError(
            "float16 is thousands of times slower than float32 on a CPU; use pipe.to(torch.bfloat16) or "
            "pipe.to(torch.float32)."
        )


def check_diffusion(scheduler: SchedulerMixin, unet: torch.nn.Module, num_inference_steps: int) -> None:
    """Raises a ValueError for a scheduler that cannot reverse the diffusion that a network was trained on."""
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
            f"{name} is made for another task than going from noise to a picture (its step takes {needed}); take "
            "DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler or another for sampling."
        )
    if "learned" in (config.get("variance_type") or "") and unet.config.out_channels == unet.config.in_channels:
        raise ValueError(
            f"{name} expects a learned variance (`variance_type={config.variance_type!r}`), which this network does "
            "not predict; set `variance_type='fixed_small'`."
        )
    if isinstance(num_inference_steps, int) and num_inference_steps > config.num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must not exceed the {config.num_train_timesteps} steps of the diffusion, got "
            f"{num_inference_steps}."
        )
