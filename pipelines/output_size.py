"""The size of an output: that of the network, or any other by a Lanczos resize of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

LOBES = 3  # of the Lanczos kernel on each side of its centre


@dataclass(frozen=True)
class OutputSize:
    """How large an output is: `scale` times its input, or what the one who calls asks for.

    Args:
        scale (`int`): of the network.
        outscale (`float`, *optional*): output pixels per input pixel, each way.
        height, width (`int`, *optional*): of the output in pixels; one alone keeps the proportions.

    Raises:
        ValueError: for what is no size, or two that may differ.
    """

    scale: int
    outscale: float | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        sides = {"height": self.height, "width": self.width}
        if self.outscale is not None and any(side is not None for side in sides.values()):
            raise ValueError(
                f"Give `outscale` or a size, not both, got outscale={self.outscale}, height={self.height}, "
                f"width={self.width}."
            )
        if self.outscale is not None and (
            not isinstance(self.outscale, (int, float)) or not 0 < self.outscale < math.inf
        ):
            raise ValueError(f"`outscale` must be a positive number, such as 2.5, got {self.outscale!r}.")
        for name, side in sides.items():
            if side is not None and (not isinstance(side, int) or isinstance(side, bool) or side < 1):
                raise ValueError(f"`{name}` must be a whole number of pixels from 1, got {side!r}.")

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of this height and width."""
        if self.height is not None and self.width is not None:
            return self.height, self.width
        if self.height is not None:
            factor = self.height / height
        elif self.width is not None:
            factor = self.width / width
        else:
            factor = self.scale if self.outscale is None else self.outscale
        rows, columns = (max(1, math.floor(side * factor + 0.5)) for side in (height, width))
        return self.height or rows, self.width or columns


def lanczos_taps(before: int, after: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of `after` pixels looks among `before` ones, and the weights: two tensors `(after, taps)`.

    The windowed sinc of Duchon 1979 with three lobes. It is stretched where the picture gets smaller (antialiasing),
    cut at the edges, and of sum 1: as in Pillow.
    """
    ratio = before / after
    stretch = max(ratio, 1.0)
    centre = (torch.arange(after, dtype=torch.float64) + 0.5) * ratio - 0.5
    first = torch.ceil(centre - LOBES * stretch)
    place = first[:, None] + torch.arange(math.floor(2 * LOBES * stretch) + 1)
    x = (place - centre[:, None]) / stretch
    weights = torch.sinc(x) * torch.sinc(x / LOBES)
    weights[(x.abs() >= LOBES) | (place < 0) | (place >= before)] = 0
    return place.long().clamp(0, before - 1), (weights / weights.sum(1, keepdim=True)).float()


def resampled(x: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, dim: int) -> torch.Tensor:
    """Weighted sums along an axis, place by place, so that a part of a picture has the bits of the whole."""
    shape = [-1 if axis == dim else 1 for axis in range(x.ndim)]
    total = None
    for place, weight in zip(places.T.to(x.device), weights.T.to(x.device)):
        term = x.index_select(dim, place) * weight.view(shape)
        total = term if total is None else total.add_(term)
    return total


def resize(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """An image at another size by Lanczos' kernel, antialiased; the same object where it has that size.

    Args:
        image (`torch.Tensor` of shape `(n, c, h, w)`, float, in [0, 1]).
        size: height and width.

    Returns:
        `torch.Tensor` of shape `(n, c, *size)`, in [0, 1].
    """
    for dim, after in ((3, size[1]), (2, size[0])):
        if image.shape[dim] != after:
            image = resampled(image, *lanczos_taps(image.shape[dim], after), dim)
    return image.clamp(0, 1)
