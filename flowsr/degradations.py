"""What turns a high-resolution picture into a low-resolution one."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def cubic(x: np.ndarray) -> np.ndarray:
    """The interpolation kernel of Keys 1981, eq. 4, with a = -0.5; support (-2, 2)."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


@lru_cache(maxsize=64)
def bicubic_matrix(size: int, scale: int) -> np.ndarray:
    """The linear map of one axis in MATLAB's `imresize(..., 1 / scale)`: antialiased cubic, mirrored edges.

    Args:
        size (`int`): HR pixels, a multiple of `scale`.
        scale (`int`): HR pixels per LR pixel.

    Returns:
        `np.ndarray` of shape `(size / scale, size)`, float64; each row sums to 1.
    """
    if size % scale:
        raise ValueError(f"`size` must be a multiple of the scale {scale}, got {size}; crop the picture first.")
    out = np.arange(size // scale)
    centres = (out + 0.5) * scale - 0.5
    first = np.floor(centres - 2 * scale).astype(int)
    taps = first[:, None] + np.arange(4 * scale + 2)[None]  # (lr, taps), beyond the edges too
    weights = cubic((centres[:, None] - taps) / scale)
    weights /= weights.sum(axis=1, keepdims=True)
    mirrored = np.mod(taps, 2 * size)
    mirrored = np.where(mirrored < size, mirrored, 2 * size - 1 - mirrored)
    matrix = np.zeros((size // scale, size))
    np.add.at(matrix, (out[:, None], mirrored), weights)
    return matrix


def cut_to_multiple(image: np.ndarray, scale: int) -> np.ndarray:
    """The picture without the last rows and columns that make no whole LR pixel: `(h, w[, c])`."""
    height, width = (side - side % scale for side in image.shape[:2])
    return image[:height, :width]


def round_to_uint8(image: np.ndarray) -> np.ndarray:
    """Nearest of 0..255, halves upward, as MATLAB's `uint8`."""
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def downscale(image: np.ndarray, scale: int, rounded: bool = True) -> np.ndarray:
    """MATLAB's `imresize(image, 1 / scale)` for uint8: the published x4 test images, bit for bit.

    Args:
        image (`np.ndarray` of shape `(h, w)` or `(h, w, channels)`, uint8): sides that are multiples of `scale`.
        scale (`int`): HR pixels per LR pixel.
        rounded (`bool`): uint8 as MATLAB gives it, rows first and rounded in between; else float64, never rounded.

    Returns:
        `np.ndarray` of shape `(h / scale, w / scale[, channels])`.
    """
    if image.dtype != np.uint8:
        raise TypeError(f"`image` must be uint8, got {image.dtype}.")
    for axis in (0, 1):
        moved = np.moveaxis(image, axis, 0)
        flat = bicubic_matrix(len(moved), scale) @ moved.reshape(len(moved), -1).astype(np.float64)
        image = np.moveaxis(flat.reshape(-1, *moved.shape[1:]), 0, axis)
        if rounded:
            image = round_to_uint8(image)
    return image
