"""Agreement of a picture with the LR it came from. A is MATLAB's bicubic downscaling, A+ its pseudo-inverse."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F


@lru_cache(maxsize=8)
def downscaling_kernel(scale: int) -> tuple[torch.Tensor, int]:
    """Weights of A along one axis, and the HR position of the first relative to `scale * i` for LR pixel i.

    The cubic of Keys 1981 (a = -0.5), stretched by `scale`, centred on the LR pixel.
    """
    centre = (scale - 1) / 2
    first = math.ceil(centre - 2 * scale + 1e-9)
    offsets = torch.arange(first, math.floor(centre + 2 * scale - 1e-9) + 1, dtype=torch.float64)
    x = ((offsets - centre) / scale).abs()
    weights = torch.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    return weights / weights.sum(), first


@lru_cache(maxsize=8)
def normal_inverse_kernel(scale: int) -> torch.Tensor:
    """Weights of (A A^T)^-1 along one axis: A A^T is a convolution on the LR grid, inverted in the Fourier domain."""
    kernel, _ = downscaling_kernel(scale)
    period = 512
    padded = torch.zeros(period * scale, dtype=torch.float64)
    padded[: len(kernel)] = kernel
    autocorrelation = torch.fft.ifft(torch.fft.fft(padded).abs() ** 2).real[::scale]
    inverse = torch.fft.ifft(1 / torch.fft.fft(autocorrelation)).real
    radius = int((inverse[: period // 2].abs() > 1e-8 * inverse[0]).nonzero().max())
    return torch.cat([inverse[-radius:], inverse[: radius + 1]])


def mirrored(x: torch.Tensor, before: int, after: int, dim: int) -> torch.Tensor:
    """Extends an axis by its mirror image, the edge pixel included, as often as it takes."""
    size = x.shape[dim]
    index = torch.arange(-before, size + after, device=x.device) % (2 * size)
    return x.index_select(dim, torch.where(index < size, index, 2 * size - 1 - index))


def filtered(x: torch.Tensor, weights: torch.Tensor, dim: int, stride: int = 1) -> torch.Tensor:
    """Weighted sums of neighbours along an axis, one every `stride`.

    Multiplied and added place by place, since matrix products of other sizes add in another order: a part of a
    picture has the bits of the whole.
    """
    length = (x.shape[dim] - len(weights)) // stride * stride + 1
    total = None
    for first, weight in enumerate(weights.tolist()):
        index = [slice(None)] * x.ndim
        index[dim] = slice(first, first + length, stride)
        term = weight * x[tuple(index)]
        total = term if total is None else total.add_(term)
    return total


def downscale(hr: torch.Tensor, scale: int) -> torch.Tensor:
    """A: `(n, c, scale * h, scale * w)` -> `(n, c, h, w)`, as MATLAB's `imresize` without rounding."""
    kernel, first = downscaling_kernel(scale)
    for dim in (2, 3):
        hr = filtered(mirrored(hr, -first, first + len(kernel) - scale, dim), kernel, dim, scale)
    return hr


def upscale_minimum_norm(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """A+: `(n, c, h, w)` -> `(n, c, scale * h, scale * w)`: the smallest picture with `downscale(it) == lr`.

    A+ = A^T (A A^T)^-1, both short separable filters on the mirrored picture, so any size will do.
    """
    inverse, (kernel, first) = normal_inverse_kernel(scale), downscaling_kernel(scale)
    radius, margin, taps = len(inverse) // 2, 3, math.ceil(len(kernel) / scale)
    phases = F.pad(kernel, (0, taps * scale - len(kernel))).reshape(taps, scale).flip(0).T  # of A^T
    for dim in (2, 3):
        size = lr.shape[dim]
        x = filtered(mirrored(lr, radius + margin, radius + margin, dim), inverse, dim)  # LR -margin .. size + margin
        up = torch.stack([filtered(x, phase, dim) for phase in phases], dim + 1).flatten(dim, dim + 1)
        lr = up.narrow(dim, (margin + 1 - taps) * scale - first, size * scale)
    return lr


ROUNDS = 8  # of projections, for "exact"
ROUNDING = 1e-6  # of an LR in [-1, 1]: what float32 leaves of an agreement


def reach(scale: int, kind: Literal["exact", "soft"] | None) -> int:
    """LR pixels around a place on which [`make_consistent`] depends there, each way."""
    if kind is None:
        return 0
    if kind == "soft":
        return 2 + 8 + 2  # upsampling, smoothing, downscaling
    return ROUNDS * (2 + len(normal_inverse_kernel(scale)) // 2 + 2)


def make_consistent(hr: torch.Tensor, lr: torch.Tensor, scale: int, kind: Literal["exact", "soft"]) -> torch.Tensor:
    """Brings a picture into agreement with the LR it came from.

    "exact": the closest picture in [-1, 1] that downscales to `lr`: alternating projections onto `A hr = lr` (which is
    hr + A+ (lr - A hr); Wang et al. 2023, eq. 7) and onto the range. "soft": only what is smooth over about 8 LR
    pixels is corrected, so that colour and tone agree while noise and JPEG blocks of the LR are not copied.

    Args:
        hr (`torch.Tensor` of shape `(n, c, scale * h, scale * w)`, in [-1, 1]).
        lr (`torch.Tensor` of shape `(n, c, h, w)`, in [-1, 1]).
    """
    if kind == "soft":
        error = lr - downscale(hr, scale)
        x = torch.arange(-8, 9, dtype=torch.float64)
        gauss = torch.softmax(-(x**2) / (2 * 3.0**2), dim=0)  # std 3 LR pixels
        for dim in (2, 3):
            error = filtered(mirrored(error, 8, 8, dim), gauss, dim)
        return hr + F.interpolate(error, scale_factor=float(scale), mode="bicubic", antialias=True)
    for number in range(ROUNDS):
        error = lr - downscale(hr, scale)
        if number > 0:  # each place by itself, so that a part of a picture comes out as in the whole
            error = torch.where(error.abs() > ROUNDING, error, 0.0)
            if not error.any():
                break
        hr = (hr + upscale_minimum_norm(error, scale)).clamp(-1, 1)
    return hr
