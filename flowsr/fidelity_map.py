"""Maps of fidelity from files, and at the size of a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from flowsr.files import as_levels, as_rgb, read_file


def read_map(path: str | Path) -> np.ndarray:
    """A picture file as a map `(h, w)`, float32: black is 0, vivid, and white is 1, faithful.

    Raises:
        UnreadableError: for a file that cannot be read.
    """
    return np.asarray(as_levels(as_rgb(read_file(path)), "L")).astype(np.float32) / 255


def stretch(fidelity: np.ndarray, size: tuple[int, int], feather: float = 0.0) -> np.ndarray:
    """A map of fidelity at another size (rows, columns), softened; it stays in [0, 1].

    Args:
        feather (`float`): standard deviation in pixels of the Gaussian that softens it.
    """
    x = torch.from_numpy(np.ascontiguousarray(fidelity))[None, None]
    if x.shape[2:] != size:
        x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
    if feather > 0:
        radius = math.ceil(3 * feather)
        gauss = torch.softmax(-(torch.arange(-radius, radius + 1.0) ** 2) / (2 * feather**2), dim=0)
        x = F.conv2d(F.pad(x, (radius, radius, 0, 0), mode="replicate"), gauss[None, None, None])
        x = F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), gauss[None, None, :, None])
    return x[0, 0].clamp(0, 1).numpy()
