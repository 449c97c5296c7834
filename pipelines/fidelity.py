"""The dial of fidelity, as one number or as a map over the image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


def check_fidelity(fidelity: float) -> None:
    """Raises a ValueError for what is no place between a vivid and a faithful image."""
    if not isinstance(fidelity, (int, float)) or not 0 <= fidelity <= 1:
        raise ValueError(f"`fidelity` must lie in [0, 1] (0 vivid, 1 faithful), got {fidelity!r}.")


def read_fidelity(
    fidelity: float | np.ndarray | torch.Tensor | PIL.Image.Image, sizes: set[tuple[int, int]]
) -> float | torch.Tensor:
    """A number as it is, and a map as `torch.Tensor` of shape `(h, w)`, float32.

    Args:
        fidelity: a number in [0, 1]; a map `(h, w)`, an array or tensor of floats in [0, 1] or of uint8 with 255 for
            1, or a PIL image of mode "L".
        sizes: heights and widths of the images.

    Raises:
        ValueError: for a value or a size that does not fit.
    """
    if isinstance(fidelity, PIL.Image.Image):
        if fidelity.mode != "L":
            raise ValueError(f"A map of `fidelity` must be grey, of PIL mode 'L', got {fidelity.mode!r}; convert it.")
        fidelity = np.array(fidelity)
    if not isinstance(fidelity, (np.ndarray, torch.Tensor)):
        check_fidelity(fidelity)
        return fidelity
    found = torch.as_tensor(np.ascontiguousarray(fidelity) if isinstance(fidelity, np.ndarray) else fidelity)
    found = found / 255 if found.dtype == torch.uint8 else found.float()
    if sizes != {tuple(found.shape)}:
        raise ValueError(
            f"A map of `fidelity` must have the height and width of every image, one of {sorted(sizes)}, got "
            f"{tuple(found.shape)}; `flowsr.fidelity_map.stretch` brings it there."
        )
    if not (found.min() >= 0 and found.max() <= 1):
        raise ValueError(
            f"A map of `fidelity` must lie in [0, 1] (0 vivid, 1 faithful), got {found.min():.4g}..{found.max():.4g}."
        )
    return found


class StopMap:
    """A flow that stops earlier at some pixels than at others.

    The flow is followed for the whole image. Each pixel takes the image estimate at sigma = its fidelity, between two
    steps by linear interpolation: what a number does for all pixels at once. So 1 gives the estimate at sigma = 1, and
    0 the last, to the bit.

    Args:
        fidelity (`torch.Tensor` of shape `(h, w)`): enlarged bilinearly by `scale`.
        scheduler ([`FlowMatchSREulerScheduler`]): with its grid set.
    """

    def __init__(self, fidelity: torch.Tensor, scale: int, scheduler):
        self.fidelity = F.interpolate(fidelity[None, None], scale_factor=float(scale), mode="bilinear")
        self.scheduler, self.image, self.sigma = scheduler, None, None

    def watch(
        self, evaluate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """`evaluate`, whose image estimates are taken in on the way; `image` holds the result at the end."""

        def watched(x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            prediction = evaluate(x_t, timestep)
            sigma = self.scheduler.sigmas[self.scheduler.index_for_timestep(timestep)].to(x_t)
            estimate = self.scheduler.step(prediction, timestep, x_t, return_dict=False)[1]
            if self.image is None:
                self.image = estimate
            else:
                passed = ((self.sigma - self.fidelity.to(x_t)) / (self.sigma - sigma)).clamp(0, 1)
                self.image = self.image.lerp(estimate, passed)
            self.sigma = sigma
            return prediction

        return watched
