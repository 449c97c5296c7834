"""What is minimised: the error of the posterior mean, of a flow's velocity, or of what a diffusion predicts.

A training step is the same for all three:

    example = objective.example(crops)
    prediction = unet(example.x_t, example.timestep, **example.conditions).sample
    loss = objective.loss(prediction, example)

Sources, conditions and ranges are those of the pipeline, so that training and sampling cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from diffusers import DiffusionPipeline
from torch import nn

from flowsr.training.distances import LOSSES, colour_loss, frequency_loss, perceptual_loss
from flowsr.training.draws import (
    condition_dropped,
    generators_for,
    moved_off_the_grid,
    sigmas_for,
    timesteps_for,
    unrolling_for,
)
from flowsr.training.settings import Settings


@dataclass(frozen=True)
class Example:
    """What the network is called with for a batch of crops, and what its answer is compared with.

    Attributes:
        x_t (`torch.Tensor` of shape `(batch, c, H, W)`, *optional*): the state; none for an encoder.
        timestep (`torch.Tensor` of shape `(batch,)`, *optional*): its time, as the network has it.
        conditions (`dict`): further arguments of the network.
        image (`torch.Tensor` of shape `(batch, c, H, W)`): where the way ends: HR in the data range of the pipeline,
            or what a diffusion makes of it.
        source (`torch.Tensor` of shape `(batch, c, H, W)`, *optional*): where the way begins, in the same range.
        crops (`dict`): `hr` and `lr` in [-1, 1], and the numbers `index` of the crops, on the CPU.
        sigma (`torch.Tensor` of shape `(batch,)`, *optional*): the noise level on a flow.
    """

    x_t: torch.Tensor | None
    timestep: torch.Tensor | None
    conditions: dict
    image: torch.Tensor
    source: torch.Tensor | None
    crops: dict
    sigma: torch.Tensor | None = None


def conditions_of(pipe: DiffusionPipeline, crops: dict, seed: int) -> dict:
    """What the network is called with beside state and time; a share of the crops has no condition, for guidance."""
    config, device = pipe.unet.config, crops["hr"].device
    classes, dropout = getattr(config, "num_class_embeds", None), getattr(config, "condition_dropout", 0.0)
    conditions = pipe.conditions(crops["lr"]) if "lr" in crops else pipe.conditions()
    dropped = condition_dropped(crops["index"], seed, dropout).to(device) if dropout else None
    if dropout and "lr" in crops:
        conditions["drop_condition"] = dropped
    if classes is not None:
        label = crops["label"]
        conditions["class_labels"] = label if dropped is None else torch.where(dropped, classes, label)
    return conditions


class PosteriorMean:
    """Distance of an encoder's image and HR, or a teacher's answer (Hinton et al. 2015), or between the two."""

    def __init__(self, pipe: DiffusionPipeline, settings: Settings):
        self.pipe, self.settings, self.distance = pipe, settings, LOSSES[settings.loss]

    def example(self, crops: dict) -> Example:
        image = crops["hr"]
        if self.settings.teacher:
            image = torch.lerp(image, crops["teacher"], self.settings.teacher_weight)
        return Example(None, None, self.pipe.conditions(crops["lr"]), self.pipe.to_data_range(image), None, crops)

    def loss(self, mean: torch.Tensor, example: Example) -> torch.Tensor:
        loss = self.distance(mean, example.image).mean()
        if weight := self.settings.frequency_weight:
            loss = loss + weight * frequency_loss(mean, example.image)
        return loss


class FlowMatching:
    """Distance of velocities from image to source: Lipman et al. 2023, eq. 23.

    From a source that depends on the data, Albergo et al. 2024; from the posterior mean, Ohayon et al. 2024.

    Args:
        pipe: whose scheduler has the path, and its source; with `train: head` its network encodes the LR.
        lpips: distance of two batches in [-1, 1], for `perceptual_weight`.
        autocast: context of the pipeline's own network.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: Settings,
        lpips: nn.Module | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.pipe, self.scheduler, self.settings = pipe, pipe.scheduler, settings
        self.lpips, self.autocast = lpips, autocast
        self.distance = LOSSES[settings.loss]

    def example(self, crops: dict) -> Example:
        """A state between image (sigma = 0) and source (sigma = 1) for each crop."""
        settings, hr, index = self.settings, self.pipe.to_data_range(crops["hr"]), crops["index"]
        conditions = conditions_of(self.pipe, crops, settings.seed)
        generators = generators_for(index, settings.seed, hr.device)
        if "lr" not in crops:
            source = self.pipe.prepare_source(len(hr), generators, hr.shape[-2:])
        elif settings.train == "head":  # whose encoder does not change: that of the pipeline, whole on every device
            with torch.no_grad(), self.autocast():
                conditions["encoding"] = self.pipe.encode(crops["lr"])
            source = self.pipe.prepare_source(crops["lr"], generators, prior_estimate=conditions["encoding"].mean)
        else:
            source = self.pipe.prepare_source(crops["lr"], generators)
        sigma = sigmas_for(index, settings.seed, settings.sigma_atom, law=settings.timestep_law).to(hr.device)
        timestep = sigma * self.scheduler.config.num_train_timesteps
        x_t = self.scheduler.add_noise(hr, source, timestep)
        return Example(x_t, timestep, conditions, hr, source, crops, sigma)

    def loss(self, prediction: torch.Tensor, example: Example) -> torch.Tensor:
        x_t, timestep, sigma, settings = example.x_t, example.timestep, example.sigma, self.settings
        velocity = self.scheduler.predict_velocity(prediction, x_t, timestep)
        target = self.scheduler.get_velocity(example.image, example.source, timestep)
        loss = self.distance(velocity, target).mean()
        image = self.scheduler.predict_sample(prediction, x_t, timestep)
        if settings.perceptual_weight and not settings.unroll_weight:
            loss = loss + settings.perceptual_weight * perceptual_loss(self.lpips, *self.seen(image, example), sigma)
        if settings.colour_weight:
            loss = loss + settings.colour_weight * colour_loss(image, example.conditions["lr"])
        return loss

    def seen(self, image: torch.Tensor, example: Example) -> list[torch.Tensor]:
        """What LPIPS compares: the image and HR, in [-1, 1]."""
        index, image = example.crops["index"], self.pipe.from_data_range(image)
        return moved_off_the_grid(index, self.settings.seed, image, example.crops["hr"])

    # The head at states that its own sampler meets (scheduled sampling, Bengio et al. 2015).

    @torch.no_grad()
    def unrolled(self, unet: nn.Module, example: Example) -> Example:
        """The same crops somewhere within 2, 4 or 8 steps of the sampler, by Euler from the mean on."""
        steps, done = unrolling_for(example.crops["index"], self.settings.seed)
        heads_behind = int(done.max())  # known on the CPU, so that no device is waited for
        steps, done = steps.to(example.source.device), done.to(example.source.device)
        count = self.scheduler.config.num_train_timesteps
        sigma = 1 - 1 / steps  # the first step, at sigma = 1, goes to the mean
        x_t = self.scheduler.add_noise(example.conditions["encoding"].mean, example.source, sigma * count)
        for number in range(heads_behind):
            image = unet(x_t, sigma * count, **example.conditions).sample
            sigma_next = torch.where(done > number, sigma - 1 / steps, sigma)
            x_t = image + (x_t - image) * (sigma_next / sigma)[:, None, None, None]
            sigma = sigma_next
        return replace(example, x_t=x_t, timestep=sigma * count)

    def unrolled_loss(self, image: torch.Tensor, example: Example) -> torch.Tensor:
        """Distance of the image there, and its LPIPS."""
        loss = self.settings.unroll_weight * self.distance(image, example.image).mean()
        if weight := self.settings.perceptual_weight:
            loss = loss + weight * self.lpips(*self.seen(image, example)).mean()
        return loss


class Diffusion:
    """Distance of what the network predicts by its scheduler: noise, v, or the image itself.

    Ho et al. 2020, eq. 14, for the noise; Salimans and Ho 2022, appendix D, for v.
    """

    def __init__(self, pipe: DiffusionPipeline, settings: Settings):
        self.pipe, self.scheduler, self.settings = pipe, pipe.scheduler, settings
        self.distance = LOSSES[settings.loss]

    def example(self, crops: dict) -> Example:
        """A noised image, or residual, at a time of its own for each crop."""
        hr, lr, index, seed = crops["hr"], crops["lr"], crops["index"], self.settings.seed
        image, noise = (
            self.pipe.to_target(hr, lr),
            self.pipe.prepare_source(lr, generators_for(index, seed, hr.device)),
        )
        timestep = timesteps_for(index, seed, self.scheduler.config.num_train_timesteps, self.settings.timestep_law)
        timestep = timestep.to(hr.device)
        x_t = self.scheduler.add_noise(image, noise, timestep)
        return Example(x_t, timestep, conditions_of(self.pipe, crops, seed), image, noise, crops)

    def loss(self, prediction: torch.Tensor, example: Example) -> torch.Tensor:
        predicts = self.scheduler.config.prediction_type
        if predicts == "v_prediction":
            target = self.scheduler.get_velocity(example.image, example.source, example.timestep)
        else:
            target = example.source if predicts == "epsilon" else example.image
        return self.distance(prediction, target).mean()
