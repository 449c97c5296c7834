"""How often the chooser of weights calls a picture damaged: `python benchmarks/suitability.py FOLDER...`

Each photo is reduced four times by MATLAB's bicubic, which is the clean picture, and then damaged. A JPEG is judged as
a file, which has its tables, and by its pixels alone, as after it was saved as PNG.
"""

import argparse
import io

import numpy as np
import PIL.Image

from flowsr.degradations import matlab_bicubic
from flowsr.files import find_pictures, read_picture
from flowsr.suitability import REAL, suits

QUALITIES, SIGMAS = (30, 60, 75, 85, 90, 95), (2, 3, 5, 15)


def clean_picture(path) -> PIL.Image.Image:
    pixels = np.asarray(read_picture(path).convert("RGB"))
    height, width = (side // 4 * 4 for side in pixels.shape[:2])
    return PIL.Image.fromarray(matlab_bicubic(pixels[:height, :width], 4))


def jpeg_file(picture: PIL.Image.Image, quality: int) -> PIL.Image.Image:
    picture.save(file := io.BytesIO(), "JPEG", quality=quality)
    return PIL.Image.open(file)


def noisy(picture: PIL.Image.Image, sigma: float, grey: bool = False) -> PIL.Image.Image:
    pixels = np.asarray(picture).astype(np.float64)
    noise = np.random.default_rng(0).normal(0, sigma, (*pixels.shape[:2], 1 if grey else 3))
    return PIL.Image.fromarray((pixels + noise).round().clip(0, 255).astype(np.uint8))


def damaged_versions() -> dict:
    """Titles of the rows, and the functions that make a picture of a clean one."""
    rows = {"clean": lambda picture: picture}
    for quality in QUALITIES:
        rows[f"JPEG {quality}, as a file"] = lambda picture, quality=quality: jpeg_file(picture, quality)
        rows[f"JPEG {quality}, its pixels alone"] = lambda picture, quality=quality: jpeg_file(
            picture, quality
        ).convert("RGB")
    for sigma in SIGMAS:
        rows[f"noise {sigma}"] = lambda picture, sigma=sigma: noisy(picture, sigma)
        rows[f"noise {sigma}, grey"] = lambda picture, sigma=sigma: noisy(picture, sigma, grey=True)
    rows["noise 5, then JPEG 95, its pixels alone"] = lambda picture: jpeg_file(noisy(picture, 5), 95).convert("RGB")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", nargs="+", help="folders of photos")
    pictures = [clean_picture(path) for path in find_pictures(parser.parse_args().photos)]
    print(f"{len(pictures)} photos\n\n| picture | called damaged |\n|---|---|")
    for title, damage in damaged_versions().items():
        found = sum(suits(damage(picture))[0] == REAL for picture in pictures)
        print(f"| {title} | {found} of {len(pictures)} |")


if __name__ == "__main__":
    main()
