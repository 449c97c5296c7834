"""Pipelines from the configs of their components, as training settings hold them."""

from __future__ import annotations

import inspect

from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from transformers import AutoModel, AutoModelForImageToImage

import flowsr
from flowsr.loading import class_named, load

# Components of transformers, which a pipeline's config names by folder or repository.
LOADERS = {"prior": AutoModelForImageToImage, "image_encoder": AutoModel}


def pipeline_from(pipeline: dict, unet: dict, scheduler: dict, pretrained: str | None = None) -> DiffusionPipeline:
    """A fresh pipeline; or that of a checkpoint, whose configs then replace those given.

    Args:
        pipeline, unet, scheduler (`dict`): what the class in `_class_name` is made with; [`FlowMatchSRPipeline`],
            [`UNetSRModel`] and [`FlowMatchSREulerScheduler`] (for diffusion DDIM's) where none is named. A `prior` or
            `image_encoder` of the pipeline is the folder or repository of a model of transformers.
        pretrained (`str`, *optional*): the checkpoint to start from, as for [`~flowsr.loading.load`].

    Raises:
        ValueError: for unknown classes and settings, naming those that exist.
    """
    if pretrained:
        return load(pretrained)

    def class_of(name: str, config: dict, default: str, base: type) -> type:
        try:
            return class_named(config.get("_class_name", default), base)
        except ValueError as error:
            raise ValueError(f"`{name}`: {error}") from None

    cls = class_of("pipeline", pipeline, "FlowMatchSRPipeline", DiffusionPipeline)
    steps = "DDIMScheduler" if cls is flowsr.DDPMSRPipeline else "FlowMatchSREulerScheduler"
    unet_class = class_of("unet", unet, "UNetSRModel", ModelMixin)
    scheduler_class = class_of("scheduler", scheduler, steps, SchedulerMixin)
    components = {
        "unet": build(unet_class, unet, "unet"),
        "scheduler": build(scheduler_class, scheduler, "scheduler"),
    }
    for name, loader in LOADERS.items():
        if name in pipeline:
            components[name] = loader.from_pretrained(pipeline[name])
    return build(cls, {**pipeline, **components}, "pipeline")


def build(cls: type, config: dict, name: str):
    """A component from its config; unknown keys are named, with those that exist."""
    config = {key: value for key, value in config.items() if key != "_class_name"}
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"`{name}` has unknown settings {unknown}; {cls.__name__} knows {known}.")
    return cls(**config)
