"""Which bundled weights suit a picture: `x4` for clean reduced ones, `x4-real` for what JPEG or noise has damaged.

Cheap measures of one picture, without a network. Their thresholds are from held-out photos that were reduced cleanly,
and from the same with JPEG and noise: docs/which_weights.md has the table, benchmarks/suitability.py makes it.
"""

from __future__ import annotations

import numpy as np
import PIL.Image

from flowsr.files import as_levels
from flowsr.picture_file import PictureFile

CLEAN, REAL = "x4", "x4-real"
SIDE = 1024  # pixels of the centre that are looked at, each way
QUALITY = 90  # of a JPEG file: below it the picture counts as damaged
BLOCK_Z, BLOCK_STEP = 9.0, 0.6  # standard errors, levels of 255: of the steps at the edges of JPEG's blocks
COLOR_NOISE, GREY_NOISE = 2.0, 5.0  # standard deviations, levels of 255
# Luminance at quality 50: ITU-T T.81, table K.1; its sum alone is needed.
STANDARD_SUM = 3688
FLAT_SHARE, FLAT_BIAS = 0.05, 0.77  # of the patches, and what their noise is of that of all patches


def suits(picture: PictureFile | PIL.Image.Image) -> tuple[str, str]:
    """The weights that suit a picture, and why in words.

    A JPEG file tells its quality by its tables. Pixels that came through a JPEG before show steps every eighth row and
    column; noise shows in the flattest patches, and best in differences of colours, where photos have little detail.

    Args:
        picture: as `read_file` or Pillow reads it; the first frame counts.

    Returns:
        `"x4"` or `"x4-real"`, and the reason, such as `"JPEG tables of quality 60"`.
    """
    quality = jpeg_quality(getattr(picture, "quantization", None) or {})
    if quality is not None and quality < QUALITY:
        return REAL, f"JPEG tables of quality {quality:.0f}"
    pixels = pixels_of(picture)
    z, step = blockiness(pixels)
    if z > BLOCK_Z and step > BLOCK_STEP:
        return REAL, f"steps of {step:.1f} levels at the edges of JPEG's blocks"
    color, grey = noise(pixels)
    if color > COLOR_NOISE or grey > GREY_NOISE:
        sigma = color if color > COLOR_NOISE else grey
        return REAL, f"noise of about {sigma:.1f} levels of 255"
    return CLEAN, "neither JPEG blocks nor noise"


def advise(picture: PictureFile, checkpoint: str, loaded: list[str]) -> tuple[str, str | None]:
    """Which of the loaded checkpoints is taken for a picture, and what to say of it, if anything.

    Args:
        checkpoint: as it was asked for; `"auto"` chooses.
        loaded: names; the only one, where one was asked for.
    """
    if checkpoint not in ("auto", CLEAN):
        return loaded[0], None
    model, reason = suits(picture)
    if checkpoint == "auto":
        return model, f"{REAL}, as it has {reason}" if model == REAL else None
    return loaded[0], f"{REAL} may suit it better, as it has {reason}" if model == REAL else None


def pixels_of(picture: PictureFile | PIL.Image.Image) -> np.ndarray:
    """The centre of the first frame: `(h, w, 1 or 3)`, float32 in [0, 255]."""
    frame = picture.frames[0] if isinstance(picture, PictureFile) else np.asarray(as_levels(picture, "RGB"))
    (height, width, channels), side = frame.shape, SIDE
    top, left = max(0, (height - side) // 2), max(0, (width - side) // 2)
    colors = 1 if channels < 3 else 3
    return frame[top : top + side, left : left + side, :colors].astype(np.float32) / (np.iinfo(frame.dtype).max / 255)


def jpeg_quality(quantization: dict[int, list[int]]) -> float | None:
    """The setting of libjpeg whose luminance table is as coarse in sum; `None` without tables.

    Entries end at 255, so that below 25 the answer is somewhat high.
    """
    if not quantization:
        return None
    percent = 100 * sum(quantization[min(quantization)]) / STANDARD_SUM
    return 5000 / percent if percent > 100 else (200 - percent) / 2


def blockiness(pixels: np.ndarray) -> tuple[float, float]:
    """How much larger differences of neighbours are at every eighth edge than elsewhere, wherever the eighth begins.

    As the blockiness of Wang, Sheikh and Bovik 2002 ("No-reference perceptual quality assessment of JPEG compressed
    images"), with each difference taken against those beside it, so that texture cancels out.

    Returns:
        In standard errors, summed over both directions, and in levels, their mean.
    """
    luma, found = pixels.mean(axis=2), []
    for grid in (luma, luma.T):
        if min(grid.shape) < 24:
            return 0.0, 0.0
        difference = np.minimum(np.abs(np.diff(grid, axis=1)), 20)  # an edge of a thing is no step of a block
        excess = difference[:, 1:-1] - (difference[:, :-2] + difference[:, 2:]) / 2
        means = np.array([excess[:, phase::8].mean() for phase in range(8)])
        at = int(means.argmax())
        step = means[at] - np.mean([means[(at + away) % 8] for away in (2, 3, 4, 5, 6)])
        found.append((step / max(excess.std() / (excess.size / 8) ** 0.5, 1e-6), step))
    (z, step), (z_down, step_down) = found
    return float(z + z_down), float(step + step_down) / 2


def noise(pixels: np.ndarray) -> tuple[float, float]:
    """Standard deviations of noise in levels: of colours against each other, and of grey.

    The second difference in both directions (Immerkaer 1996, "Fast noise variance estimation", eq. 3) of each patch of
    8x8, of which the flattest twentieth counts: there least of it is texture. Patches that touch black or white are
    left out, as noise is cut off there.
    """
    inside = (pixels > 4) & (pixels < 251)
    inside, grey = inside.all(axis=2), pixels.mean(axis=2)
    differences = [pixels[..., c] - pixels[..., 1] for c in (0, 2)] if pixels.shape[2] == 3 else [np.zeros_like(grey)]
    return min(flat_noise(each / np.sqrt(2), inside) for each in differences), flat_noise(grey, inside)


def flat_noise(plane: np.ndarray, inside: np.ndarray) -> float:
    """The noise of the flattest patches of a plane `(h, w)`, of those that lie `inside`."""
    residual = plane[:-2] - 2 * plane[1:-1] + plane[2:]
    residual = (residual[:, :-2] - 2 * residual[:, 1:-1] + residual[:, 2:]) / 6
    height, width = (side // 8 for side in residual.shape)
    if not height or not width:
        return 0.0

    def patches(x: np.ndarray) -> np.ndarray:
        return x[: 8 * height, : 8 * width].reshape(height, 8, width, 8).swapaxes(1, 2).reshape(-1, 64)

    sigmas = np.sqrt(np.pi / 2) * np.abs(patches(residual)).mean(axis=1)
    sigmas = sigmas[patches(inside[1:-1, 1:-1]).all(axis=1)]
    return float(np.quantile(sigmas, FLAT_SHARE)) / FLAT_BIAS if len(sigmas) else 0.0
