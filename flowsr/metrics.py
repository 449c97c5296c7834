"""Distances between pictures as the super-resolution literature computes them.

Pictures are `(h, w, 3)` arrays of uint8. PSNR and SSIM are taken on the luma of BT.601 in studio range, without a
border of `scale` pixels (Timofte et al. 2014 and all since).
"""

from __future__ import annotations

import numpy as np
import torch


def luma(image: np.ndarray) -> np.ndarray:
    """Y of BT.601 in [16, 235], not rounded, as MATLAB's `rgb2ycbcr` on doubles: `(h, w, 3)` uint8 -> `(h, w)`."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def inner_luma(a: np.ndarray, b: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    """The luma of both pictures without `border` pixels on each side."""
    if a.shape != b.shape:
        raise ValueError(f"The pictures must have one shape, got {a.shape} and {b.shape}.")
    if min(a.shape[:2]) <= 2 * border:
        raise ValueError(f"Nothing is left of a {a.shape[1]}x{a.shape[0]} picture without a border of {border} pixels.")
    inside = slice(border, a.shape[0] - border), slice(border, a.shape[1] - border)
    return luma(a)[inside], luma(b)[inside]


def psnr_y(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """Peak signal-to-noise ratio on luma, in dB; infinite for equal pictures."""
    y_a, y_b = inner_luma(a, b, border)
    error = np.mean((y_a - y_b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")
