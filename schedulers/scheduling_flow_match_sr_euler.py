"""Euler scheduler for flow matching between a source (noise, noisy upsampled LR, or a prior's estimate) and the image.

One self-contained file on purpose: it imports torch, numpy and diffusers alone, so that it can travel with a
checkpoint.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor


@dataclass
class FlowMatchSREulerSchedulerOutput(BaseOutput):
    """prev_sample: the state at the next sigma; pred_original_sample: the image estimate. Both `(batch, c, h, w)`."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


def path_coefficients(path: str, sigma: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """a, b and their derivatives by sigma, for x_t = a * hr + b * source.

    "linear": rectified flow, Liu et al. 2022, eq. 1. "vp": the trigonometric interpolant, Albergo and Vanden-Eijnden
    2023, eq. 2.5: variance preserving for a source independent of the image.
    """
    if path == "linear":
        return 1 - sigma, sigma, -torch.ones_like(sigma), torch.ones_like(sigma)
    angle = sigma * (math.pi / 2)
    a, b = torch.cos(angle), torch.sin(angle)
    return a, b, -math.pi / 2 * b, math.pi / 2 * a


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Four random words of 32 bits for each counter of four words, all in int64: Philox4x32-10.

    Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, section 3.3. Words of a counter broadcast.
    """
    a, b, c, d = counter
    low = 0xFFFFFFFF
    for number in range(10):
        ab, cd = a * 0xD2511F53, c * 0xCD9E8D57  # int64 wraps around, which leaves all 64 bits right
        first, second = (key[0] + number * 0x9E3779B9) & low, (key[1] + number * 0xBB67AE85) & low
        a, b, c, d = (cd >> 32) & low ^ b ^ first, cd & low, (ab >> 32) & low ^ d ^ second, ab & low
    return a, b, c, d


@lru_cache(maxsize=8)
def normal_levels(device: torch.device) -> torch.Tensor:
    """The means of the normal distribution's 65536 parts of equal probability, nearly: the quantiles at their middles.

    Multiples of 2^-20, so that no machine rounds them otherwise. The largest is 4.17; the variance is 1 - 3e-5.
    """
    middles = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return ((torch.special.ndtri(middles) * 2**20).round() / 2**20).float().to(device)


def positional_noise(
    seed: int, shape: tuple[int, int, int], corner: tuple[int, int] = (0, 0), device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise that is a function of seed, row, column and channel alone, the same on every device.

    Sixteen bits of Philox choose one of [`normal_levels`]; no floating-point function is evaluated, so that equal
    arguments give equal bits.

    Args:
        seed (`int`): of which the lowest 64 bits count.
        shape: channels, rows and columns.
        corner: row and column of the first value.

    Returns:
        `torch.Tensor` of `shape`, float32.
    """
    (channels, height, width), (top, left) = shape, corner
    device, key = torch.device(device), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
    pairs = torch.arange(left // 2, (left + width + 1) // 2, device=device)  # a counter serves two columns
    noise = torch.empty(channels, height, 2 * len(pairs), device=device)
    at_once = max(1, 2**16 // len(pairs)) if device.type == "cpu" else height  # rows that stay in a CPU's cache
    levels, zero = normal_levels(device), torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, height, at_once):
        rows = torch.arange(top + start, top + min(start + at_once, height), device=device)[:, None]
        for first in range(0, channels, 4):  # and four channels
            words = philox((rows, pairs, zero + first // 4, zero), key)
            for channel in range(first, min(first + 4, channels)):
                for odd in (0, 1):
                    half = words[2 * odd + channel % 4 // 2] >> 16 * (channel % 2) & 0xFFFF
                    noise[channel, start : start + at_once, odd::2] = levels[half]
    return noise[:, :, left % 2 : left % 2 + width]


class FlowMatchSREulerScheduler(SchedulerMixin, ConfigMixin):
    r"""Draws the source, mixes it with the image for training, and walks back along the flow for inference.

    Direction and names are those of diffusers: sigma runs from 1 (source) to 0 (image), `timestep = sigma *
    num_train_timesteps`, `x_t = a(sigma) * hr + b(sigma) * source`, `velocity = d x_t / d sigma` (`source - hr` on the
    linear path). The t of the flow-matching papers (Lipman et al. 2023; Liu et al. 2022) is `1 - sigma`.

    A step reads hr and source off the prediction and mixes them anew at the next sigma. On the linear path this is
    Euler's step x + (sigma_next - sigma) * velocity; on the "vp" path it is that of DDIM (Song et al. 2021, eq. 12).
    The last step, to sigma = 0, returns the image estimate itself.

    `step` depends on its arguments and the grid alone: it may be called twice, out of order, or tile by tile.

    Args:
        num_train_timesteps (`int`): what the network sees as sigma = 1.
        source (`"noise"`, `"lr"`, `"prior"`): mean of the source: zero, the upsampled LR (data-dependent coupling,
            Albergo et al. 2023), or another model's estimate (posterior-mean rectified flow, Ohayon et al. 2024).
        source_noise_std (`float`): std of the Gaussian noise in the source, in units of the [-1, 1] range.
        path (`"linear"`, `"vp"`): see `path_coefficients`.
        prediction_type (`"velocity"`, `"sample"`): what the network predicts: the velocity or the image.
        evaluate_at (`"start"`, `"middle"`): the time that the network is told within a step; the state is always that
            of the start.
        evaluate_shift (`float`): that time is then shifted to s * sigma / (1 + (s - 1) * sigma), s = `evaluate_shift`.
            Above 1 the network expects more noise than the grid says: the errors of earlier steps, which no state in
            training had (exposure bias; Li et al. 2024, Alleviating Exposure Bias in Diffusion Models through Sampling
            with Shifted Time Steps). The more steps, the more it smooths; sigma = 1 stays.
        noise (`"generator"`, `"positional"`): how the source noise is drawn: as one sequence from the generator, as
            everywhere in diffusers, or as a function of one number from the generator, row, column and channel
            ([`positional_noise`]), so that parts of a picture have the noise of the whole.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        source: Literal["noise", "lr", "prior"] = "lr",
        source_noise_std: float = 0.1,
        path: Literal["linear", "vp"] = "linear",
        prediction_type: Literal["velocity", "sample"] = "sample",
        evaluate_at: Literal["start", "middle"] = "start",
        evaluate_shift: float = 1.0,
        noise: Literal["generator", "positional"] = "generator",
    ):
        choices = {
            "source": (source, ("noise", "lr", "prior")),
            "path": (path, ("linear", "vp")),
            "prediction_type": (prediction_type, ("velocity", "sample")),
            "evaluate_at": (evaluate_at, ("start", "middle")),
            "noise": (noise, ("generator", "positional")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}, got {value!r}.")
        if num_train_timesteps <= 0:
            raise ValueError(f"`num_train_timesteps` must be positive, got {num_train_timesteps}.")
        if evaluate_shift <= 0:
            raise ValueError(f"`evaluate_shift` must be positive, got {evaluate_shift}.")
        if source_noise_std < 0 or (source == "noise" and source_noise_std == 0):
            raise ValueError(
                f"`source_noise_std` must be positive (0 is allowed for 'lr' and 'prior'), got {source_noise_std}."
            )
        self.num_inference_steps: int | None = None
        self._set_grid(np.linspace(1, 0, num_train_timesteps + 1)[:-1], device=None)

    @property
    def init_noise_sigma(self) -> float:
        """Std of the noise in the initial state."""
        return self.config.source_noise_std

    # Training and the initial state.

    def sample_source(
        self,
        lr_up: torch.Tensor,
        prior: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> torch.Tensor:
        """Draws the start of the flow: mean + source_noise_std * noise, one draw per picture.

        With `noise="positional"` a picture takes one whole number from its generator: the same generator used twice
        gives different noise, and one seeded alike gives the same, also for a part of the picture.

        Args:
            lr_up (`torch.Tensor` of shape `(batch, c, h, w)`, in [-1, 1]): the LR on the grid of the image; gives the
                shape, and the mean for `source="lr"`.
            prior (`torch.Tensor` of the same shape, *optional*): the mean for `source="prior"`.
            generator (`torch.Generator`, or a list of one per picture, *optional*).
            corner: row and column of the first pixel, of a part of a larger picture.

        Raises:
            ValueError: where `prior` is missing, the number of generators is not the batch size, or a part of a
                picture is to have noise that does not depend on its place.
        """
        if (self.config.source == "prior") != (prior is not None):
            wanted = "needs" if prior is None else "does not use"
            raise ValueError(f"A scheduler with `source={self.config.source!r}` {wanted} `prior`.")
        batch = lr_up.shape[0]
        generators = generator if isinstance(generator, list) else [generator] * batch
        if len(generators) != batch:
            raise ValueError(f"`generator` must hold one generator per picture, got {len(generators)} for {batch}.")
        # Picture by picture, so that a batch is the same as its pictures one by one.
        one = (1, *lr_up.shape[1:])
        if self.config.noise == "positional":
            seeds = [int(torch.randint(2**63 - 1, (), generator=g, device=g and g.device)) for g in generators]
            draws = [positional_noise(seed, one[1:], corner, lr_up.device)[None].to(lr_up.dtype) for seed in seeds]
        elif tuple(corner) != (0, 0):
            raise ValueError(
                f"`corner` is {tuple(corner)}, and with `noise='generator'` noise does not depend on the place: only "
                "whole pictures can be drawn; take a scheduler with `noise='positional'`."
            )
        else:
            draws = [randn_tensor(one, generator=g, device=lr_up.device, dtype=lr_up.dtype) for g in generators]
        noise = self.config.source_noise_std * torch.cat(draws)
        if self.config.source == "noise":
            return noise
        return (lr_up if prior is None else prior) + noise

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = a * original_samples + b * noise; `noise`: from `sample_source`; timesteps: `()` or `(batch,)`."""
        a, b, _, _ = self._coefficients(timesteps, original_samples)
        return a * original_samples + b * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """d x_t / d sigma from the image `sample` to the source `noise`: the target of flow matching."""
        _, _, a_rate, b_rate = self._coefficients(timesteps, sample)
        return a_rate * sample + b_rate * noise

    def predict_velocity(
        self, model_output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """The velocity that a network output at state `sample` means, whatever the network predicts."""
        if self.config.prediction_type == "velocity":
            return model_output
        a, b, a_rate, b_rate = self._coefficients(timesteps, sample)
        return a_rate * model_output + b_rate * (sample - a * model_output) / b

    def predict_sample(
        self, model_output: torch.Tensor, sample: torch.Tensor, timesteps: torch.Tensor | float
    ) -> torch.Tensor:
        """The image estimate that a network output at state `sample` means, whatever the network predicts."""
        if self.config.prediction_type == "sample":
            return model_output
        a, b, a_rate, b_rate = self._coefficients(timesteps, sample)
        return (b_rate * sample - b * model_output) / (a * b_rate - b * a_rate)

    # Inference.

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Sets the grid: `num_inference_steps` equal steps from 1 to 0, or the starts of the steps as given.

        `sigmas` and `timesteps` (= sigma * num_train_timesteps) fall strictly and lie in (0, 1] and (0,
        num_train_timesteps]; the final 0 is not part of them.
        """
        if sum(x is not None for x in (num_inference_steps, sigmas, timesteps)) == 0:
            raise ValueError("Give `num_inference_steps`, `sigmas` or `timesteps`.")
        if sigmas is not None and timesteps is not None:
            raise ValueError("Give `sigmas` or `timesteps`, not both.")
        if timesteps is not None:
            sigmas = np.asarray(torch.as_tensor(timesteps).cpu(), dtype=np.float64) / self.config.num_train_timesteps
        if sigmas is None:
            if num_inference_steps < 1:
                raise ValueError(f"`num_inference_steps` must be at least 1, got {num_inference_steps}.")
            sigmas = np.linspace(1, 0, num_inference_steps + 1)[:-1]
        sigmas = np.asarray(torch.as_tensor(sigmas).cpu(), dtype=np.float64)
        valid = sigmas.ndim == 1 and len(sigmas) > 0 and (np.diff(sigmas) < 0).all() and 0 < sigmas[-1]
        if not valid or sigmas[0] > 1:
            raise ValueError(
                "The grid must fall strictly within (0, 1], without the final 0 (in timesteps: times "
                f"{self.config.num_train_timesteps}), got sigmas {sigmas.tolist()}."
            )
        if num_inference_steps is not None and num_inference_steps != len(sigmas):
            raise ValueError(f"`num_inference_steps` is {num_inference_steps}, but {len(sigmas)} steps were given.")
        self.num_inference_steps = len(sigmas)
        self._set_grid(sigmas, device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Remembers nothing: `step` finds its place by its timestep. Pipelines of diffusers call this."""

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | None = None) -> torch.Tensor:
        """The state as it is: scaling is the network's."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSREulerSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """From the state at one sigma of the grid to the next, in float32 at least.

        Args:
            model_output (`torch.Tensor` of shape `(batch, c, h, w)`): the prediction at `timestep`.
            timestep (`float` or scalar `torch.Tensor`): an element of `timesteps`.
            sample (`torch.Tensor` of shape `(batch, c, h, w)`): the state x_t.
            generator: not used (the flow is deterministic); here for the interface of diffusers.

        Raises:
            ValueError: if `timestep` is not on the grid.
        """
        index = self.index_for_timestep(timestep)
        dtype = torch.promote_types(sample.dtype, torch.float32)
        x_t, prediction = sample.to(dtype), model_output.to(dtype)
        sigma, sigma_next = self.sigmas[index].to(x_t), self.sigmas[index + 1].to(x_t)
        a, b, a_rate, b_rate = path_coefficients(self.config.path, sigma)
        if self.config.prediction_type == "sample":
            hr = prediction
            source = (x_t - a * hr) / b
        else:
            determinant = a * b_rate - b * a_rate
            hr = (b_rate * x_t - b * prediction) / determinant
            source = (a * prediction - a_rate * x_t) / determinant
        a_next, b_next, _, _ = path_coefficients(self.config.path, sigma_next)
        prev_sample = hr if sigma_next == 0 else a_next * hr + b_next * source
        prev_sample, hr = prev_sample.to(sample.dtype), hr.to(sample.dtype)
        if not return_dict:
            return prev_sample, hr
        return FlowMatchSREulerSchedulerOutput(prev_sample=prev_sample, pred_original_sample=hr)

    def shifted(self, sigma: torch.Tensor | np.ndarray) -> torch.Tensor | np.ndarray:
        """The noise level of which the network is told at `sigma`, by `evaluate_shift`."""
        return self.config.evaluate_shift * sigma / (1 + (self.config.evaluate_shift - 1) * sigma)

    def index_for_timestep(self, timestep: float | torch.Tensor) -> int:
        """Position of `timestep` in `timesteps`."""
        timestep = float(timestep)
        distance = (self.timesteps.double().cpu() - timestep).abs()
        index = int(distance.argmin())
        if distance[index] > 1e-5 * self.config.num_train_timesteps:
            raise ValueError(
                f"`timestep` must be an element of `scheduler.timesteps`, got {timestep}; the nearest is "
                f"{float(self.timesteps[index])}. Call `set_timesteps` first."
            )
        return index

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _set_grid(self, sigmas: np.ndarray, device: str | torch.device | None) -> None:
        edges = np.append(sigmas, 0.0)
        seen = edges[:-1] if self.config.evaluate_at == "start" else (edges[:-1] + edges[1:]) / 2
        seen = self.shifted(seen)
        self.sigmas = torch.tensor(edges, dtype=torch.float32)  # on the CPU: read as numbers, step by step
        self.timesteps = torch.tensor(seen * self.config.num_train_timesteps, dtype=torch.float32, device=device)

    def _coefficients(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Path coefficients at `timesteps` (`()` or `(batch,)`), shaped to broadcast over `like` (batch first)."""
        timesteps = torch.as_tensor(timesteps, device=like.device)
        if timesteps.ndim > 1 or (timesteps.ndim == 1 and len(timesteps) not in (1, like.shape[0])):
            raise ValueError(
                f"`timesteps` must have shape () or ({like.shape[0]},) for a batch of {like.shape[0]}, "
                f"got {tuple(timesteps.shape)}."
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        sigma = timesteps.to(dtype).reshape(-1, *[1] * (like.ndim - 1)) / self.config.num_train_timesteps
        return tuple(c.to(like.dtype) for c in path_coefficients(self.config.path, sigma))
