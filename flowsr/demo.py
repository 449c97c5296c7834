"""What `flowsr demo` and `flowsr degrade` draw."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

import flowsr
from flowsr.degradations import cut_to_multiple, degrade, matlab_bicubic
from flowsr.files import read_picture, save_picture
from flowsr.metrics import psnr_y
from flowsr.upscaler import has_dial, side_by_side


@dataclass
class Demo:
    """The demo's pictures, as files, and what was measured."""

    photo: Path
    lr_size: tuple[int, int]
    size: tuple[int, int]
    seconds: float
    psnr: dict[str, float]  # dB on Y, by method
    upscaled: Path
    comparison: Path


def run_demo(pipe: DiffusionPipeline, folder: Path, steps: int) -> Demo:
    """Downscales the example photo, upscales it, and writes the pictures into a folder."""
    pipe.set_progress_bar_config(disable=True)
    photo, scale = example_photo(), pipe.scale_factor
    hr = cut_to_multiple(np.asarray(read_picture(photo).convert("RGB")), scale)
    lr = PIL.Image.fromarray(matlab_bicubic(hr, scale))

    def upscale(**options) -> PIL.Image.Image:
        return pipe(lr, generator=torch.Generator().manual_seed(0), **options).images[0]

    start = time.perf_counter()
    sr = upscale(num_inference_steps=steps)
    seconds = time.perf_counter() - start
    results = {"bicubic": lr.resize(sr.size, PIL.Image.BICUBIC), f"flowsr, {steps} steps": sr}
    written = {"lr.png": lr, "flowsr.png": sr}
    if has_dial(pipe):
        results["flowsr, fidelity 1"] = written["flowsr_faithful.png"] = upscale(fidelity=1.0)
    written["comparison.png"] = side_by_side([results["bicubic"], sr, PIL.Image.fromarray(hr)])
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in written.items():
        save_picture(image, folder / name)
    psnr = {name: psnr_y(np.asarray(image), hr, scale) for name, image in results.items()}
    return Demo(photo, lr.size, sr.size, seconds, psnr, folder / "flowsr.png", folder / "comparison.png")


def example_photo() -> Path:
    """The photo of the demo: inside the installed package, or beside it in a source checkout."""
    for root in flowsr.__path__:
        photos = sorted((Path(root) / "examples").glob("*.png"))
        if photos:
            return photos[0]
    raise ValueError("The example photo is missing from this installation.")


def degradation_sheet(path: str | Path, degradation: str, scale: int, count: int, seed: int) -> PIL.Image.Image:
    """A picture and draws of a training degradation of it, enlarged by nearest neighbour, four in a row.

    Raises:
        ValueError: for an unknown degradation, or a picture smaller than one LR pixel.
    """
    if scale < 1 or count < 1:
        raise ValueError(f"`--scale` and `--count` must be positive, got {scale} and {count}.")
    with PIL.Image.open(path) as picture:
        hr = cut_to_multiple(np.asarray(picture.convert("RGB")), scale)
    if 0 in hr.shape:
        raise ValueError(f"{path} is smaller than one pixel of LR at scale {scale}.")
    random = np.random.default_rng(seed)
    draws = [degrade(hr, scale, degradation, random) for _ in range(count)]
    panels = [hr, *(draw.repeat(scale, axis=0).repeat(scale, axis=1) for draw in draws)]
    panels += [np.full_like(hr, 255)] * (-len(panels) % 4)
    rows = [np.concatenate(panels[start : start + 4], axis=1) for start in range(0, len(panels), 4)]
    return PIL.Image.fromarray(np.concatenate(rows))
