"""Whether the uncertainty of a checkpoint says how wrong a picture is: `python benchmarks/uncertainty.py FOLDER...`

Each photo is reduced by MATLAB's bicubic and upscaled in eight samples. Printed are how often the truth lies within
the mean plus or minus a multiple of the uncertainty, the rank correlation of uncertainty and error, and the factor by
which 80 % intervals of these photos would cover 80 %: what `uncertainty_factor` of model_index.json should be.
"""

import argparse

import numpy as np
import torch

from flowsr.degradations import matlab_bicubic
from flowsr.files import find_pictures, read_picture
from flowsr.loading import load_upscaler

SIDE = 240  # pixels of the centre of each photo
WIDTHS = {50: 0.6745, 80: 1.2816, 90: 1.6449}  # of intervals of a normal distribution, in standard deviations


def ranks(values: np.ndarray) -> np.ndarray:
    return values.ravel().argsort().argsort().astype(np.float64)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, with ties broken by place."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def block_means(values: np.ndarray, side: int = 8) -> np.ndarray:
    height, width = (size // side for size in values.shape)
    return values[: height * side, : width * side].reshape(height, side, width, side).mean(axis=(1, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+", help="folders of photos")
    parser.add_argument("--checkpoint", default="x4")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    pipe = load_upscaler(options.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    scale, factor = pipe.scale_factor, pipe.config.uncertainty_factor
    ratios, by_pixel, by_block = [], [], []
    for path in find_pictures(options.photos):
        hr = np.asarray(read_picture(path).convert("RGB"))
        height, width = (min(side, SIDE) // scale * scale for side in hr.shape[:2])
        top, left = (hr.shape[0] - height) // 2, (hr.shape[1] - width) // 2
        hr = hr[top : top + height, left : left + width]
        found = pipe(
            matlab_bicubic(hr, scale), options.steps, num_images_per_prompt=options.samples, output_type="np",
            output_uncertainty=True, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        error = np.abs(found.mean[0] - hr.astype(np.float32) / 255)
        uncertainty = found.uncertainty[0]
        ratios.append((error / np.maximum(uncertainty, 1e-6)[..., None]).ravel())
        error = np.sqrt((error**2).mean(axis=2))
        by_pixel.append(rank_correlation(uncertainty, error))
        by_block.append(rank_correlation(block_means(uncertainty), block_means(error)))
    count, ratios = len(ratios), np.concatenate(ratios)
    print(f"{count} photos, {options.samples} samples of {options.steps} steps, factor {factor:g}\n")
    print("| interval | covers |\n|---|---|")
    for percent, width in WIDTHS.items():
        print(f"| {percent} % | {100 * (ratios <= width).mean():.1f} % |")
    print(f"\nrank correlation with the error: {np.mean(by_pixel):.2f} by pixel, {np.mean(by_block):.2f} by 8x8 block")
    print(f"the factor for which 80 % intervals cover 80 %: {factor * np.quantile(ratios, 0.8) / WIDTHS[80]:.2f}")


if __name__ == "__main__":
    main()
