"""Pipelines from the configs of their components, as training settings hold them."""

from __future__ import annotations

import inspect

import diffusers
from diffusers import DiffusionPipeline
from transformers import AutoModel, AutoModelForImageToImage

import flowsr

# Components of transformers, which a pipeline's config names by folder or repository.
LOADERS = {"prior": AutoModelForImageToImage, "image_encoder": AutoModel}


def pipeline_from(pipeline: dict, unet: dict, scheduler: dict, pretrained: str | None = None) -> DiffusionPipeline:
    """A fresh pipeline; or that of a folder or repository, whose configs then replace those given.

    Args:
        pipeline, unet, scheduler (`dict`): what the class in `_class_name` is made with; [`FlowMatchSRPipeline`],
            [`UNetSRModel`] and [`FlowMatchSREulerScheduler`] (for diffusion DDIM's) where none is named. A `prior` or
            `image_encoder` of the pipeline is the folder or repository of a model of transformers.
        pretrained (`str`, *optional*): a pipeline to start from.

    Raises:
        ValueError: for unknown classes and settings, naming those that exist.
    """
    if pretrained:
        config = DiffusionPipeline.load_config(pretrained)
        return class_named(config, "FlowMatchSRPipeline", "pipeline").from_pretrained(pretrained)
    cls = class_named(pipeline, "FlowMatchSRPipeline", "pipeline")
    steps = "DDIMScheduler" if cls is flowsr.DDPMSRPipeline else "FlowMatchSREulerScheduler"
    components = {
        "unet": build(class_named(unet, "UNetSRModel", "unet"), unet, "unet"),
        "scheduler": build(class_named(scheduler, steps, "scheduler"), scheduler, "scheduler"),
    }
    for name, loader in LOADERS.items():
        if name in pipeline:
            components[name] = loader.from_pretrained(pipeline[name])
    return build(cls, {**pipeline, **components}, "pipeline")


def class_named(config: dict, default: str, name: str) -> type:
    """The class that a config names in `_class_name`, of flowsr or else of diffusers."""
    wanted = config.get("_class_name", default)
    wanted = wanted[-1] if isinstance(wanted, (list, tuple)) else wanted  # self-contained folders name their file too
    found = getattr(flowsr, wanted, None) or getattr(diffusers, wanted, None)
    if not inspect.isclass(found):
        raise ValueError(f"`{name}`: neither flowsr nor diffusers has a class {wanted!r}.")
    return found


def build(cls: type, config: dict, name: str):
    """A component from its config; unknown keys are named, with those that exist."""
    config = {key: value for key, value in config.items() if key != "_class_name"}
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"`{name}` has unknown settings {unknown}; {cls.__name__} knows {known}.")
    return cls(**config)
