"""How far the samples of a picture lie apart, for pictures of any size, and as a heat map."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline

from flowsr.streaming import has_parts, upscaled

SAMPLES = 8
FULL_HEAT = 0.15  # of the range: what a heat map draws in white


def sampled_uncertainty(
    pipe: DiffusionPipeline, pixels: np.ndarray, seed: int = 0, samples: int = SAMPLES, **options
) -> np.ndarray:
    """The `uncertainty` of the pipeline's call, from samples that are made one after the other.

    Memory holds three pictures of floats, however many samples there are.

    Args:
        pipe ([`FlowMatchSRPipeline`]).
        pixels: picture `(h, w, c)` of uint8, uint16 or float in [0, 1], 1 to 4 channels (2 and 4: alpha).
        seed (`int`): of the first sample; the next ones have the next.
        samples (`int`): from 2.
        options: as for [`~flowsr.streaming.upscaled`]; of the pipeline's call where that has no parts.

    Returns:
        `np.ndarray` of shape `(H, W)`, float32: standard deviation, in the range [0, 1] of the picture.
    """
    if pixels.dtype.kind != "f":
        pixels = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    colors = 1 if pixels.shape[2] < 3 else 3
    mean, squares = 0.0, 0.0
    for number in range(samples):  # Welford 1962
        if has_parts(pipe):
            sample = upscaled(pixels, pipe, seed=seed + number, **options)[:]
        else:
            generator = torch.Generator().manual_seed(seed + number)
            sample = pipe(pixels, generator=generator, output_type="np", **options).images[0]
        difference = sample[..., :colors] - mean
        mean = mean + difference / (number + 1)
        squares = squares + difference * (sample[..., :colors] - mean)
    return pipe.config.uncertainty_factor * np.sqrt(squares.mean(axis=2) / (samples - 1))


def heat(values: np.ndarray) -> np.ndarray:
    """`(h, w)` -> `(h, w, 3)`, uint8: 0 black, by way of red and yellow, to white at `FULL_HEAT` and more."""
    ramp = np.array([[0, 0, 0], [170, 0, 30], [255, 120, 0], [255, 230, 90], [255, 255, 255]])
    stops = np.linspace(0, FULL_HEAT, len(ramp))
    return np.stack([np.interp(values, stops, ramp[:, c]) for c in range(3)], axis=2).round().astype(np.uint8)
