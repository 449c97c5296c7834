"""What turns a high-resolution picture into a low-resolution one: one bicubic map, and chains of random damage."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

# The bicubic map of MATLAB, which made the published test sets.


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


def banded_product(matrix: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """`matrix @ columns` for a matrix that is zero far from its diagonal: a few rows at a time, without the zeros."""
    parts = []
    for start in range(0, len(matrix), 8):
        rows = matrix[start : start + 8]
        used = np.flatnonzero(rows.any(axis=0))
        near = slice(used[0], used[-1] + 1)
        parts.append(rows[:, near] @ columns[near].astype(matrix.dtype))
    return np.concatenate(parts)


def cut_to_multiple(image: np.ndarray, scale: int) -> np.ndarray:
    """The picture without the last rows and columns that make no whole LR pixel: `(h, w[, c])`."""
    height, width = (side - side % scale for side in image.shape[:2])
    return image[:height, :width]


def round_to_uint8(image: np.ndarray) -> np.ndarray:
    """Nearest of 0..255, halves upward, as MATLAB's `uint8`."""
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8)


def matlab_bicubic(image: np.ndarray, scale: int, rounded: bool = True) -> np.ndarray:
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
        flat = banded_product(bicubic_matrix(len(moved), scale), moved.reshape(len(moved), -1))
        image = np.moveaxis(flat.reshape(-1, *moved.shape[1:]), 0, axis)
        if rounded:
            image = round_to_uint8(image)
    return image


# Random damage. Every step maps a picture, float32 `(c, h, w)` in [0, 1], to another and draws from `random` alone.


def gaussian_kernel(size: int, sigmas: tuple[float, float], angle: float, beta: float = 1.0, plateau: bool = False):
    """Blur kernel of size x size with standard deviations `sigmas` (pixels) along axes turned by `angle` (radians).

    With q the squared Mahalanobis length: exp(-q^beta / 2), the generalised Gaussian (beta = 1: the plain one), or
    1 / (1 + q^beta), the plateau (Wang et al. 2021, Real-ESRGAN, section 3.1). Sums to 1.
    """
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    along = x * np.cos(angle) + y * np.sin(angle)
    across = y * np.cos(angle) - x * np.sin(angle)
    q = (along / sigmas[0]) ** 2 + (across / sigmas[1]) ** 2
    kernel = 1 / (1 + q**beta) if plateau else torch.exp(-0.5 * q**beta)
    return (kernel / kernel.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> torch.Tensor:
    """The circular low pass of `cutoff` (radians per pixel), which rings and overshoots; sums to 1.

    cutoff * J1(cutoff * r) / (2 pi r), Wang et al. 2021 (Real-ESRGAN), section 3.3.
    """
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    r = torch.hypot(*torch.meshgrid(offset, offset, indexing="ij"))
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2 * torch.pi * r)
    kernel[r == 0] = cutoff**2 / (4 * torch.pi)
    return (kernel / kernel.sum()).float()


def random_kernel(random: np.random.Generator, sigma: tuple[float, float], sinc: float) -> torch.Tensor:
    """A kernel of 7 to 21 pixels: sinc with probability `sinc`, else of a Gaussian kind with `sigma` in its range.

    Kinds and their shares, and the ranges of beta, are those of Real-ESRGAN, section 4.1.
    """
    size = int(random.choice(np.arange(7, 22, 2)))
    if random.random() < sinc:
        return sinc_kernel(size, random.uniform(np.pi / 3 if size < 13 else np.pi / 5, np.pi))
    kind = random.choice(6, p=[0.45, 0.25, 0.12, 0.03, 0.12, 0.03])
    a, b = random.uniform(*sigma, size=2)
    isotropic, plateau = kind in (0, 2, 4), kind in (4, 5)
    beta = random.uniform(0.5, 4) if kind in (2, 3) else random.uniform(1, 2) if plateau else 1.0
    return gaussian_kernel(size, (a, a if isotropic else b), random.uniform(-np.pi, np.pi), beta, plateau)


def blur(image: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Convolves each channel; the picture is mirrored at its edges."""
    pad = kernel.shape[-1] // 2
    mode = "reflect" if pad < min(image.shape[-2:]) else "replicate"
    padded = F.pad(image[None], [pad] * 4, mode=mode)
    return F.conv2d(padded, kernel.expand(len(image), 1, *kernel.shape), groups=len(image))[0]


def resize(image: torch.Tensor, size: tuple[int, int], random: np.random.Generator) -> torch.Tensor:
    """To `size` (rows, columns) by area, bilinear or bicubic interpolation, as chance has it."""
    mode = str(random.choice(["area", "bilinear", "bicubic"]))
    options = {} if mode == "area" else {"antialias": False}
    return F.interpolate(image[None], size=size, mode=mode, **options)[0].clamp(0, 1)


def random_resize(
    image: torch.Tensor, random: np.random.Generator, shares: tuple, span: tuple, base: tuple[int, int]
) -> torch.Tensor:
    """To `base` times up to span[1], down to span[0] or just one, with probabilities `shares`; see [`resize`]."""
    kind = random.choice(3, p=shares)
    factor = (random.uniform(1, span[1]), random.uniform(span[0], 1), 1.0)[kind]
    return resize(image, tuple(max(round(side * factor), 1) for side in base), random)


def gaussian_noise(image: torch.Tensor, random: np.random.Generator, sigma: tuple[float, float]) -> torch.Tensor:
    """Adds white noise of a standard deviation in `sigma` (of 255 levels); grey noise four times in ten."""
    channels = 1 if random.random() < 0.4 else len(image)
    noise = random.standard_normal((channels, *image.shape[1:]), dtype=np.float32) * random.uniform(*sigma) / 255
    return (image + torch.from_numpy(noise)).clamp(0, 1)


def poisson_noise(image: torch.Tensor, random: np.random.Generator, scale: tuple[float, float]) -> torch.Tensor:
    """Adds shot noise, `scale` times that of 255 photons at white; grey noise four times in ten."""
    signal = image.mean(0, keepdim=True) if random.random() < 0.4 else image
    photons = signal.numpy() * 255
    noise = (random.poisson(photons) - photons).astype(np.float32) / 255 * random.uniform(*scale)
    return (image + torch.from_numpy(noise)).clamp(0, 1)


def jpeg(image: torch.Tensor, random: np.random.Generator, quality: tuple[int, int]) -> torch.Tensor:
    """Through a JPEG file of a quality in the given range, both ends included."""
    levels = (image * 255).round().clamp(0, 255).to(torch.uint8)
    file = io.BytesIO()
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy() if len(image) == 3 else levels[0].numpy())
    picture.save(file, "JPEG", quality=int(random.integers(quality[0], quality[1] + 1)))
    return torch.from_numpy(np.atleast_3d(np.array(Image.open(file)))).permute(2, 0, 1).float() / 255


def real_esrgan(image: torch.Tensor, scale: int, random: np.random.Generator) -> torch.Tensor:
    """The second-order chain of Wang et al. 2021 (Real-ESRGAN), section 3 and the ranges of its section 4.1.

    Twice blur, resize, noise, JPEG; then the final size and a sinc filter, before or after the second JPEG.
    """
    height, width = (side // scale for side in image.shape[-2:])
    x = blur(image, random_kernel(random, (0.2, 3.0), sinc=0.1)).clamp(0, 1)
    x = random_resize(x, random, (0.2, 0.7, 0.1), (0.15, 1.5), base=image.shape[-2:])
    x = gaussian_noise(x, random, (1, 30)) if random.random() < 0.5 else poisson_noise(x, random, (0.05, 3.0))
    x = jpeg(x, random, (30, 95))
    if random.random() < 0.8:
        x = blur(x, random_kernel(random, (0.2, 1.5), sinc=0.1)).clamp(0, 1)
    x = random_resize(x, random, (0.3, 0.4, 0.3), (0.3, 1.2), base=(height, width))
    x = gaussian_noise(x, random, (1, 25)) if random.random() < 0.5 else poisson_noise(x, random, (0.05, 2.5))

    def final_size_and_sinc(x: torch.Tensor) -> torch.Tensor:
        x = resize(x, (height, width), random)
        if random.random() < 0.8:
            size = int(random.choice(np.arange(7, 22, 2)))
            x = blur(x, sinc_kernel(size, random.uniform(np.pi / 3, np.pi))).clamp(0, 1)
        return x

    if random.random() < 0.5:
        return jpeg(final_size_and_sinc(x), random, (30, 95))
    return final_size_and_sinc(jpeg(x, random, (30, 95)))


def bsrgan(image: torch.Tensor, scale: int, random: np.random.Generator) -> torch.Tensor:
    """The shuffled chain of Zhang et al. 2021 (BSRGAN), section 3.4, without its camera pipeline.

    Isotropic and anisotropic blur, downscaling, Gaussian noise and JPEG noise in random order; JPEG once more at last.
    """
    height, width = (side // scale for side in image.shape[-2:])

    def isotropic(x):
        sigma = random.uniform(0.1, 2.4)
        return blur(x, gaussian_kernel(21, (sigma, sigma), 0.0))

    def anisotropic(x):
        sigmas = tuple(np.sqrt(random.uniform(0.5, 6.0, size=2)))
        return blur(x, gaussian_kernel(21, sigmas, random.uniform(0, np.pi)))

    steps = [
        isotropic,
        anisotropic,
        lambda x: resize(x, (height, width), random),
        lambda x: gaussian_noise(x, random, (1, 25)),
        lambda x: jpeg(x, random, (30, 95)) if random.random() < 0.75 else x,
    ]
    for number in random.permutation(len(steps)):
        image = steps[number](image).clamp(0, 1)
    return jpeg(image, random, (30, 95))


def photo(image: torch.Tensor, scale: int, random: np.random.Generator) -> torch.Tensor:
    """Pictures of phones, cameras and the web: milder than the two above, and one in six is clean.

    At most one blur, the LR by any filter, sensor noise or none, JPEG or none; one in four was then resized and saved
    as JPEG once more, as sites do with what they are sent. Probabilities and ranges are our own.
    """
    height, width = (side // scale for side in image.shape[-2:])
    if random.random() < 1 / 6:
        return F.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
    x = image
    if random.random() < 0.6:
        x = blur(x, random_kernel(random, (0.2, 3.0), sinc=0.1)).clamp(0, 1)
    shared_again = random.random() < 0.25
    if shared_again:
        x = random_resize(x, random, (0.0, 0.8, 0.2), (0.3, 1.0), base=image.shape[-2:])
        x = jpeg(x, random, (50, 95))
    if random.random() < 0.5:
        x = F.interpolate(x[None], size=(height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
    else:
        x = resize(x, (height, width), random)
    noise = random.random()
    if noise < 0.35:
        x = gaussian_noise(x, random, (1, 18))
    elif noise < 0.6:
        x = poisson_noise(x, random, (0.05, 2.0))
    return jpeg(x, random, (30, 95)) if random.random() < 0.75 else x


# Beside "bicubic", which is `matlab_bicubic`.
CHAINS = {"bsrgan": bsrgan, "real_esrgan": real_esrgan, "photo": photo}


def degrade(image: np.ndarray, scale: int, chain: str, random: np.random.Generator) -> np.ndarray:
    """A low-resolution version of a picture by one draw of a chain.

    Args:
        image (`np.ndarray` of shape `(h, w, c)`, uint8): RGB or grey, sides that are multiples of `scale`.
        scale (`int`): HR pixels per LR pixel.
        chain ("bicubic", "bsrgan", "real_esrgan", "photo"): "bicubic" draws nothing.
        random (`np.random.Generator`): all that chance decides comes from here.

    Returns:
        `np.ndarray` of shape `(h / scale, w / scale, c)`, uint8.

    Raises:
        ValueError: for an unknown chain.
    """
    if chain == "bicubic":
        return matlab_bicubic(image, scale)
    if chain not in CHAINS:
        raise ValueError(f"The degradation must be one of {['bicubic', *CHAINS]}, got {chain!r}.")
    x = torch.from_numpy(image.astype(np.float32).transpose(2, 0, 1)) / 255
    x = CHAINS[chain](x, scale, random)
    return (x * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
