"""Distances between what a pipeline makes and the truth, beside those of bicubic, as the literature has them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import PIL.Image
import torch

from flowsr.evaluation.pairs import Pair
from flowsr.metrics import COLUMNS, detail, haarpsi, load_lpips, lr_psnr, psnr_y, ssim_y
from flowsr.upscaler import call_options

METRICS: dict[str, Callable[[np.ndarray, Pair, int], float]] = {  # of a result, its pair and the scale
    "psnr_y": lambda sr, pair, scale: psnr_y(sr, pair.hr, scale),
    "ssim_y": lambda sr, pair, scale: ssim_y(sr, pair.hr, scale),
    "lr_psnr": lambda sr, pair, scale: lr_psnr(sr, pair.lr, scale),
    "haarpsi": lambda sr, pair, scale: haarpsi(sr, pair.hr),
    "detail": lambda sr, pair, scale: detail(sr, pair.hr, scale),
}


def measure(
    sr: np.ndarray, pair: Pair, scale: int, lpips: Callable | None = None, names: tuple[str, ...] = tuple(METRICS)
) -> dict[str, float]:
    """The numbers of one result.

    Args:
        sr (`np.ndarray` of shape `(h, w, 3)`, uint8): what was made of `pair.lr`, of the size of `pair.hr`.
        lpips: distance of two pictures, which adds `lpips`; or `None`.
        names: of the numbers, in [`METRICS`].
    """
    measured = {name: METRICS[name](sr, pair, scale) for name in names}
    return measured if lpips is None else measured | {"lpips": lpips(sr, pair.hr)}


def measure_steps(
    pipe,
    pairs: list[Pair],
    steps: list[int],
    fidelity: float = 0.0,
    consistency: str | None = None,
    seed: int = 0,
    tile: int | None = None,
    lpips_weights: str | None = None,
) -> dict:
    """Mean PSNR-Y, SSIM-Y, LR-PSNR, HaarPSI, detail and LPIPS of bicubic and of the pipeline at each number of steps.

    Returns:
        `dict`: `rows`, one per method, with `images` holding the numbers of each picture; and the settings.
    """
    positions = [(count, fidelity) for count in steps]
    result = measure_positions(pipe, pairs, positions, consistency, seed, tile, lpips_weights)
    return {**result, "fidelity": fidelity}


def measure_dial(
    pipe,
    pairs: list[Pair],
    steps: list[int] = [1, 2, 4, 8],
    fidelities: list[float] = [0.75, 0.5, 0.25],
    **options,
) -> dict:
    """The perception-distortion curve of the dial: from fidelity 1 down at the most steps, then each number of steps.

    Args:
        steps: numbers of steps at fidelity 0; one step is fidelity 1.
        fidelities: of the positions between, at `max(steps)` steps.
        options: further arguments of [`measure_steps`].
    """
    positions = [(1, 1.0), *((max(steps), fidelity) for fidelity in fidelities)]
    positions += [(count, 0.0) for count in steps if count > 1]
    return measure_positions(pipe, pairs, positions, **options)


def measure_positions(
    pipe,
    pairs: list[Pair],
    positions: list[tuple[int, float]],
    consistency: str | None = None,
    seed: int = 0,
    tile: int | None = None,
    lpips_weights: str | None = None,
) -> dict:
    """What [`measure_steps`] returns, for each (number of steps, fidelity)."""
    scale = pipe.scale_factor
    lpips, lpips_words = load_lpips(lpips_weights)
    pipe.set_progress_bar_config(disable=True)

    def bicubic(lr: PIL.Image.Image) -> PIL.Image.Image:
        return lr.resize((lr.width * scale, lr.height * scale), PIL.Image.BICUBIC)

    def flow(count: int, fidelity: float):
        def upscale(lr: PIL.Image.Image) -> PIL.Image.Image:
            options = call_options(pipe, fidelity, num_inference_steps=count, consistency=consistency, tile=tile)
            return pipe(lr, generator=torch.Generator().manual_seed(seed), **options).images[0]

        return upscale

    methods = {"bicubic": (bicubic, {})}
    for count, fidelity in positions:
        name = f"flowsr, {count} step{'s' if count > 1 else ''}"
        name += f", fidelity {fidelity}" if fidelity and count > 1 else ""
        methods[name] = flow(count, fidelity), {"steps": count, "fidelity": fidelity}
    rows = []
    for name, (method, position) in methods.items():
        images, seconds = [], 0.0
        for pair in pairs:
            start = time.perf_counter()
            sr = np.asarray(method(PIL.Image.fromarray(pair.lr)))
            seconds += time.perf_counter() - start
            images.append({"name": pair.name, **measure(sr, pair, scale, lpips)})
        means = {key: float(np.mean([image[key] for image in images])) for key in images[0] if key != "name"}
        megapixels = sum(pair.hr.shape[0] * pair.hr.shape[1] for pair in pairs) / 1e6
        speed = {"seconds_per_megapixel": seconds / megapixels}
        rows.append({"method": name, **position, **means, **speed, "images": images})
    return {
        "scale": scale,
        "pictures": len(pairs),
        "consistency": consistency,
        "seed": seed,
        "lpips": lpips_words,
        "rows": rows,
    }


def markdown_table(rows: list[dict], title: str = "method") -> str:
    """Rows of [`measure_steps`] or [`measure_dial`] as a Markdown table; what a row has no number of stays empty."""
    columns = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [f"| {' | '.join([title, *(COLUMNS[key][0] for key in columns)])} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in columns]
        lines.append(f"| {' | '.join([row['method'], *cells])} |")
    return "\n".join(lines)
