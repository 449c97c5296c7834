"""The dial after the run: a picture's faithful and vivid ends, and everything between them.

The ends are those of `fidelity=1` and `fidelity=0`. Their mix pixel by pixel costs no network evaluation, and for the
squared error it is the best trade of distortion against perception that there is (Freirich et al. 2021, "A Theory of
the Distortion-Perception Tradeoff in Wasserstein Space": the optimum lies on the line between the posterior mean and
a perfect sampler).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from diffusers import DiffusionPipeline

from flowsr.fidelity_map import stretch
from flowsr.picture_file import PictureFile
from flowsr.pipelines.output_size import resize
from flowsr.streaming import as_dtype
from flowsr.uncertainty import heat
from flowsr.upscaler import has_dial


def blend_ends(
    faithful: np.ndarray, vivid: np.ndarray, fidelity: float | np.ndarray, feather: float = 0.0
) -> np.ndarray:
    """`fidelity * faithful + (1 - fidelity) * vivid`.

    Args:
        faithful (`np.ndarray` of shape `(h, w, c)`): answer of `fidelity=1`, of any range.
        vivid (`np.ndarray` of shape `(h, w, c)`): answer of `fidelity=0`.
        fidelity: in [0, 1]; a map `(rows, columns)` of any size is stretched over the picture.
        feather (`float`): standard deviation in pixels of the Gaussian that softens a map.

    Returns:
        `np.ndarray` of shape `(h, w, c)`, float32, in the range of the ends.

    Raises:
        ValueError: for ends of different shapes, or a fidelity that is no number or map in [0, 1].
    """
    if faithful.shape != vivid.shape:
        raise ValueError(f"Both ends must have one shape, got {faithful.shape} and {vivid.shape}.")
    fidelity = np.asarray(fidelity, dtype=np.float32)
    if fidelity.ndim not in (0, 2) or not fidelity.size or not (fidelity.min() >= 0 and fidelity.max() <= 1):
        raise ValueError(f"`fidelity` must be a number or a map (h, w) in [0, 1], got shape {fidelity.shape}.")
    if fidelity.ndim == 2:
        fidelity = stretch(fidelity, faithful.shape[:2], feather)[..., None]
    vivid = vivid.astype(np.float32)
    return vivid + fidelity * (faithful.astype(np.float32) - vivid)


def invention_heat(faithful: np.ndarray, vivid: np.ndarray) -> np.ndarray:
    """What the vivid end adds to the faithful one: |vivid - faithful|, black by way of red and yellow to white.

    Args:
        faithful, vivid (`np.ndarray` of shape `(h, w, c)`): of uint8 or uint16.

    Returns:
        `np.ndarray` of shape `(h, w, 3)`, uint8; white for a mean difference of `FULL_HEAT` of the range and more.
    """
    return heat(np.abs(vivid.astype(np.float32) - faithful).mean(axis=2) / np.iinfo(faithful.dtype).max)


@dataclass
class Ends:
    """A picture with both ends of its dial.

    Attributes:
        source: as it was read; a single frame.
        faithful, vivid: enlarged by `scale`.
        options: further arguments of the pipeline's call, the same for both.
        exact: results between the ends, by their fidelity.
    """

    source: PictureFile
    faithful: PictureFile
    vivid: PictureFile
    scale: int
    seed: int
    options: dict
    exact: dict[float, PictureFile] = field(default_factory=dict)

    def blend(self, fidelity: float | np.ndarray, feather: float = 0.0) -> PictureFile:
        """The mix of the ends, as [`blend_ends`]."""
        faithful, vivid = self.faithful.frames[0], self.vivid.frames[0]
        mixed = blend_ends(faithful, vivid, fidelity, feather)
        return replace(self.faithful, frames=[mixed.round().astype(vivid.dtype)])


def both_ends(
    pipe: DiffusionPipeline, source: PictureFile, seed: int = 0, on_step: Callable | None = None, **options
) -> Ends:
    """Upscales a picture with fidelity 1 and 0.

    Args:
        pipe: with a dial, such as [`FlowMatchSRPipeline`].
        seed (`int`): of the noise that the flow starts from.
        on_step: called as the pipeline's `callback_on_step_end`; what it raises ends the work.
        **options: further arguments of the pipeline's call.

    Raises:
        ValueError: for a pipeline without a dial, or several frames.
    """
    if not has_dial(pipe):
        raise ValueError(f"A {type(pipe).__name__} is a diffusion and has no dial of fidelity; take x4, for example.")
    if len(source.frames) > 1:
        raise ValueError(f"This holds {len(source.frames)} frames; one picture is wanted here.")
    ends = [enlarge(pipe, source, seed, on_step, fidelity=fidelity, **options) for fidelity in (1.0, 0.0)]
    return Ends(source, *ends, pipe.scale_factor, seed, options)


def at_fidelity(pipe: DiffusionPipeline, ends: Ends, fidelity: float, on_step: Callable | None = None) -> PictureFile:
    """The pipeline's own answer at a fidelity, which costs network evaluations the first time."""
    if fidelity in (0.0, 1.0):
        return ends.faithful if fidelity else ends.vivid
    if fidelity not in ends.exact:
        large = enlarge(pipe, ends.source, ends.seed, on_step, fidelity=fidelity, **ends.options)
        ends.exact = {fidelity: large}  # the last alone: a result takes as much memory as an end
    return ends.exact[fidelity]


def enlarge(
    pipe: DiffusionPipeline, picture: PictureFile, seed: int = 0, on_step: Callable | None = None, **options
) -> PictureFile:
    """The picture upscaled, with all that its file holds; arguments as of [`both_ends`]."""

    def upscaled(pixels: np.ndarray) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        call = {"generator": generator, "output_type": "np", "callback_on_step_end": on_step, **options}
        return pipe(pixels, **call).images[0]

    return picture.enlarged(upscaled)


def resized(large: PictureFile, size: tuple[int, int]) -> PictureFile:
    """A result at another height and width, resized as the pipeline's `outscale` does."""
    pixels = large.frames[0]
    if pixels.shape[:2] == size:
        return large
    top = np.iinfo(pixels.dtype).max
    x = resize(torch.from_numpy(pixels.astype(np.float32) / top).permute(2, 0, 1)[None], size)
    return large.resized([as_dtype(x[0].permute(1, 2, 0).numpy(), pixels.dtype)])
