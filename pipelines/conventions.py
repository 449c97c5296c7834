"""What diffusers' callbacks, caches and `from_pipe` ask of every pipeline."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline


class ConventionsMixin:
    """For a `DiffusionPipeline` whose `__call__` sets `_guidance_scale`, `_num_timesteps` and the like."""

    _guidance_scale: float = 1.0
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float:
        """Of the next step: a callback may set `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """What the network is told at present; caches such as pyramid attention broadcast ask for it."""
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


def cache_context(unet: torch.nn.Module) -> AbstractContextManager:
    """What caches that keep one state for each kind of evaluation want to be told around it."""
    return unet.cache_context("cond") if getattr(unet, "is_cache_enabled", False) else nullcontext()
