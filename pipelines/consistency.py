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


def downscale(hr: torch.Tensor, scale: int) -> torch.Tensor:
    """A: `(n, c, scale * h, scale * w)` -> `(n, c, h, w)`, as MATLAB's `imresize` without rounding."""
    kernel, first = downscaling_kernel(scale)
    for dim in (2, 3):
        size = hr.shape[dim] // scale
        x = mirrored(hr, -first, first + len(kernel) - scale, dim).movedim(dim, -1)
        x = x.unfold(-1, len(kernel), scale)[..., :size, :] @ kernel.to(x)
        hr = x.movedim(-1, dim)
    return hr


def upscale_minimum_norm(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """A+: `(n, c, h, w)` -> `(n, c, scale * h, scale * w)`: the smallest picture with `downscale(it) == lr`.

    A+ = A^T (A A^T)^-1, both short separable filters on the mirrored picture, so any size will do.
    """
    inverse, (kernel, first) = normal_inverse_kernel(scale), downscaling_kernel(scale)
    radius, reach = len(inverse) // 2, 3
    for dim in (2, 3):
        size = lr.shape[dim]
        x = mirrored(lr, radius + reach, radius + reach, dim).movedim(dim, -1)
        x = x.unfold(-1, len(inverse), 1) @ inverse.to(x)  # LR pixels -reach .. size + reach
        rows = x.reshape(-1, 1, x.shape[-1])
        up = F.conv_transpose1d(rows, kernel.to(x)[None, None], stride=scale)
        start = reach * scale - first
        lr = up[..., start : start + size * scale].reshape(*x.shape[:-1], size * scale).movedim(-1, dim)
    return lr


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
        x = torch.arange(-8, 9, device=hr.device, dtype=hr.dtype)
        gauss = torch.softmax(-(x**2) / (2 * 3.0**2), dim=0)  # std 3 LR pixels
        for dim in (2, 3):
            error = (mirrored(error, 8, 8, dim).movedim(dim, -1).unfold(-1, 17, 1) @ gauss).movedim(-1, dim)
        return hr + F.interpolate(error, scale_factor=float(scale), mode="bicubic", antialias=True)
    for _ in range(8):
        hr = hr + upscale_minimum_norm(lr - downscale(hr, scale), scale)
        if hr.abs().max() <= 1:
            break
        hr = hr.clamp(-1, 1)
    return hr
