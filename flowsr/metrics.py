"""Distances between pictures as the super-resolution literature computes them.

Pictures are `(h, w, 3)` arrays of uint8. PSNR and SSIM are taken on the luma of BT.601 in studio range, without a
border of `border` pixels, which is the scale (Timofte et al. 2014 and most papers since).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from flowsr.degradations import matlab_bicubic

COLUMNS = {  # of tables, in this order: key in results, title, format
    "psnr_y": ("PSNR-Y", "{:.2f}"),
    "ssim_y": ("SSIM-Y", "{:.3f}"),
    "lpips": ("LPIPS", "{:.3f}"),
    "haarpsi": ("HaarPSI", "{:.3f}"),
    "detail": ("detail", "{:.2f}"),
    "lr_psnr": ("LR-PSNR", "{:.1f}"),
    "seconds_per_megapixel": ("s / MP", "{:.2f}"),
}


def luma(image: np.ndarray) -> np.ndarray:
    """Y of BT.601 in [16, 235], not rounded, as MATLAB's `rgb2ycbcr` on doubles: `(h, w, 3)` uint8 -> `(h, w)`."""
    return 16 + image.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255


def inner_luma(a: np.ndarray, b: np.ndarray, border: int) -> tuple[np.ndarray, np.ndarray]:
    """The luma of both pictures without `border` pixels on each side."""
    if a.shape != b.shape:
        raise ValueError(f"The pictures must have one shape, got {a.shape} and {b.shape}.")
    if min(a.shape[:2]) <= 2 * border:
        raise ValueError(
            f"Nothing is left of a {a.shape[1]}x{a.shape[0]} picture without a border of {border} pixels."
        )
    inside = slice(border, a.shape[0] - border), slice(border, a.shape[1] - border)
    return luma(a)[inside], luma(b)[inside]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio for a peak of 255, in dB; infinite for equal arrays."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error)) if error > 0 else float("inf")


def psnr_y(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """Peak signal-to-noise ratio on luma, in dB.

    Example:

        >>> grey = np.full((32, 32, 3), 100, np.uint8)
        >>> round(psnr_y(grey, grey + np.uint8(10), border=4), 2)  # 10 levels of RGB are 8.59 of luma
        29.45
    """
    return psnr(*inner_luma(a, b, border))


def ssim_y(a: np.ndarray, b: np.ndarray, border: int) -> float:
    """Structural similarity on luma: Wang et al. 2004, window 11x11 of std 1.5, averaged where the window fits."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    y_a, y_b = (torch.from_numpy(y)[None, None] for y in inner_luma(a, b, border))
    _, similarity = structural_similarity_index_measure(
        y_a, y_b, sigma=1.5, kernel_size=11, data_range=255.0, return_full_image=True
    )
    return float(similarity[..., 5:-5, 5:-5].mean())  # torchmetrics' own mean counts reflected borders too


def lr_psnr(sr: np.ndarray, lr: np.ndarray, scale: int) -> float:
    """Does the output downscale to the input? PSNR over RGB of the downscaled `sr` against `lr` (Lugmayr et al. 2020).

    Downscaling is MATLAB's bicubic, kept in float so that its own rounding does not count.
    """
    return psnr(matlab_bicubic(sr, scale, rounded=False), lr)


def detail(sr: np.ndarray, hr: np.ndarray, scale: int) -> float:
    """How much detail there is, right or wrong: energy beyond what the LR grid can hold, of `sr` over that of `hr`.

    1 is the texture of the original, less is smooth, more is grain. Energy is that of luma, in a Hann window, at
    frequencies of more than 1 / (2 scale) cycles per pixel along either axis. No network judges here.
    """
    beyond, energies = None, []
    for image in inner_luma(sr, hr, scale):
        window = np.hanning(image.shape[0])[:, None] * np.hanning(image.shape[1])
        spectrum = np.abs(np.fft.rfft2((image - image.mean()) * window)) ** 2
        if beyond is None:
            rows, columns = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])
            beyond = np.maximum(np.abs(rows), np.abs(columns)) > 1 / (2 * scale)
        energies.append(spectrum[beyond].sum())
    return float(energies[0] / max(energies[1], 1e-12))


def haarpsi(a: np.ndarray, b: np.ndarray) -> float:
    """HaarPSI (Reisenhofer et al. 2018): perceptual similarity in [0, 1] by Haar wavelets; 1 for equal pictures.

    No network judges here, so it stays unseen where a training had LPIPS in its loss. With the paper's constants
    C = 30 and alpha = 4.2 and its subsampling by two, on colour pictures.

    Args:
        a, b (`np.ndarray` of shape `(h, w, 3)`, uint8): at least 16 pixels each way.
    """
    if a.shape != b.shape or min(a.shape[:2]) < 16:
        raise ValueError(f"HaarPSI needs two pictures of one shape and 16 pixels each way, got {a.shape}, {b.shape}.")
    yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    pictures = torch.from_numpy(np.stack([a, b]).astype(np.float64) @ yiq.T).permute(0, 3, 1, 2)  # (2, 3, h, w)
    box = torch.full((3, 1, 2, 2), 0.25, dtype=torch.float64)
    pictures = same_convolution(pictures, box)[..., ::2, ::2]

    def similarity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (2 * x * y + 30) / (x**2 + y**2 + 30)

    chroma = same_convolution(pictures, box)[:, 1:].abs()
    of_chroma = similarity(chroma[0], chroma[1]).mean(0)
    total, weights, both = 0.0, 0.0, []
    for transposed in (False, True):
        magnitudes = []
        for scale in (1, 2, 3):  # eq. 7: the two finer scales are compared, the third one weighs
            side = 2**scale
            haar = torch.full((side, side), 1 / side, dtype=torch.float64)
            haar[: side // 2] *= -1
            haar = haar.T if transposed else haar
            magnitudes.append(same_convolution(pictures[:, :1], haar[None, None])[:, 0].abs())
        local = (similarity(*magnitudes[0]) + similarity(*magnitudes[1])) / 2
        weight = magnitudes[2].amax(0)
        both.append(weight)
        total, weights = total + (weight * torch.sigmoid(4.2 * local)).sum(), weights + weight.sum()
    weight = (both[0] + both[1]) / 2  # eq. 13: colour counts where either orientation has an edge
    total, weights = total + (weight * torch.sigmoid(4.2 * of_chroma)).sum(), weights + weight.sum()
    mean = total / weights if weights > 0 else torch.sigmoid(torch.tensor(4.2))
    return float((torch.logit(mean) / 4.2) ** 2)


def same_convolution(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Convolution with zeros around, of the size of `x`: each channel with its kernel, of even side."""
    side = kernels.shape[-1]
    before, after = side // 2, side // 2 - 1
    x = torch.nn.functional.pad(x, (before, after, before, after))
    return torch.nn.functional.conv2d(x, kernels.flip(-1, -2), groups=x.shape[1])


def load_lpips(weights: str | None) -> tuple[Callable[[np.ndarray, np.ndarray], float] | None, str]:
    """LPIPS v0.1 (Zhang et al. 2018; lower is better) as a function of two pictures, and what it is in words.

    With `weights`, a safetensors file of the SqueezeNet variant; without, torchmetrics' where it has its weights at
    hand. The function is `None` where neither can be had, and the words say why.
    """
    if weights is not None:
        if not Path(weights).is_file():
            raise ValueError(f"`lpips_weights`: there is no file {weights}.")
        from flowsr.lpips import SqueezeLPIPS

        network = SqueezeLPIPS(weights)
        words = "LPIPS v0.1, SqueezeNet"
    else:
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            network = LearnedPerceptualImagePatchSimilarity(net_type="squeeze").eval()
        except Exception as error:  # no torchvision, no network, no cache: each in its own way
            return None, f"no LPIPS: torchmetrics cannot have its weights here ({error}); give `--lpips_weights FILE`"
        words = "LPIPS v0.1, SqueezeNet, torchmetrics"

    @torch.no_grad()
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        x, y = (torch.from_numpy(p.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in (a, b))
        return float(network(x, y))

    return distance, words
