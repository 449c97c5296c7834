"""Measures a pipeline on a folder of pictures, beside bicubic interpolation, as the literature does."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from flowsr.data import as_levels
from flowsr.degradations import cut_to_multiple, downscale
from flowsr.files import PICTURE_SUFFIXES, find_pictures, read_picture
from flowsr.metrics import detail, haarpsi, load_lpips, lr_psnr, psnr_y, ssim_y
from flowsr.upscaler import call_options


@dataclass
class Pair:
    """A test picture: `hr`, cut to a multiple of the scale, and `lr`; uint8 of shape `(h, w, 3)`."""

    name: str
    hr: np.ndarray
    lr: np.ndarray


def load_pairs(hr_dir: str, lr_dir: str | None, scale: int) -> list[Pair]:
    """Test pictures of a folder, with the LR of another folder or made in MATLAB's convention.

    An LR picture carries the name of its HR picture, or that with `x{scale}` behind the stem.

    Raises:
        ValueError: for a missing or empty folder, a missing LR picture, or sizes that do not fit the scale.
    """
    for folder in (hr_dir, lr_dir):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"There is no folder {folder}.")
    lr_paths = list(Path(lr_dir).iterdir()) if lr_dir is not None else []
    pairs = []
    for path in find_pictures([hr_dir]):
        hr = cut_to_multiple(np.asarray(as_levels(read_picture(path), "RGB")), scale)
        if lr_dir is None:
            pairs.append(Pair(path.name, hr, downscale(hr, scale)))
            continue
        names = (path.stem, f"{path.stem}x{scale}")
        found = [p for p in lr_paths if p.stem in names and p.suffix.lower() in PICTURE_SUFFIXES]
        if len(found) != 1:
            raise ValueError(f"{lr_dir} must hold one LR picture for {path.name}, found {[p.name for p in found]}.")
        lr = np.asarray(as_levels(read_picture(found[0]), "RGB"))
        if (lr.shape[0] * scale, lr.shape[1] * scale) != hr.shape[:2]:
            raise ValueError(
                f"{found[0].name} is {lr.shape[1]}x{lr.shape[0]}; at x{scale} it must be {hr.shape[1] // scale}x"
                f"{hr.shape[0] // scale} for {path.name} of {hr.shape[1]}x{hr.shape[0]}. Is the scale right?"
            )
        pairs.append(Pair(path.name, hr, lr))
    return pairs


def evaluate(
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


def curve(
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
        options: further arguments of [`evaluate`].
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
    """What [`evaluate`] returns, for each (number of steps, fidelity)."""
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
            measured = {
                "psnr_y": psnr_y(sr, pair.hr, scale),
                "ssim_y": ssim_y(sr, pair.hr, scale),
                "lr_psnr": lr_psnr(sr, pair.lr, scale),
                "haarpsi": haarpsi(sr, pair.hr),
                "detail": detail(sr, pair.hr, scale),
            }
            if lpips is not None:
                measured["lpips"] = lpips(sr, pair.hr)
            images.append({"name": pair.name, **measured})
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


def read_others(table: str) -> list[dict]:
    """Other systems from a CSV with the columns `system`, `psnr_y` and `lpips` of the same test set.

    Raises:
        ValueError: for a missing file or column, or a cell that is no number.
    """
    import csv

    if not Path(table).is_file():
        raise ValueError(f"`--others`: there is no file {table}.")
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = ("system", "psnr_y", "lpips")
    if not rows or not set(wanted) <= set(rows[0]):
        raise ValueError(
            f"`--others`: {table} needs the columns {', '.join(wanted)}, found {list(rows[0] if rows else [])}."
        )
    try:
        return [{"system": row["system"], **{name: float(row[name]) for name in wanted[1:]}} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"`--others`: a cell of {table} is no number ({error}).") from error


def plot_curve(result: dict, others: list[dict], picture: str | Path, title: str = "") -> None:
    """PSNR-Y against LPIPS: [`curve`] by steps (solid) and fidelity (dashed), others, and the blends of any two."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in result["rows"] if "steps" in row]
    if any("lpips" not in row for row in rows):
        raise ValueError(f"The curve needs LPIPS: {result['lpips']}.")
    figure, axis = pyplot.subplots(figsize=(7, 5), layout="constrained")
    for number, first in enumerate(others):
        for second in others[:number]:
            ends = [[each[name] for each in (first, second)] for name in ("psnr_y", "lpips")]
            axis.plot(*ends, color="0.85", linewidth=0.7, zorder=1)
    for other in others:
        axis.plot(other["psnr_y"], other["lpips"], "o", color="0.45", markersize=4, zorder=2)
        axis.annotate(
            other["system"], (other["psnr_y"], other["lpips"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
        )
    ends = [row for row in rows if row["fidelity"] in (0, 1)]  # the numbers of steps, from the faithful end on
    dial = [row for row in rows if row["steps"] in (1, ends[-1]["steps"])]  # the fidelities at the most steps
    for series, style in ((dial, "o--"), (ends, "o-")):
        axis.plot(
            [row["psnr_y"] for row in series], [row["lpips"] for row in series], style, color="tab:red", zorder=3
        )
    for row in rows:
        name = f"fidelity {row['fidelity']:g}" if row["fidelity"] else f"{row['steps']} steps"
        place = {"xytext": (4, -9), "textcoords": "offset points", "fontsize": 7, "color": "tab:red"}
        axis.annotate(name, (row["psnr_y"], row["lpips"]), **place)
    axis.set(xlabel="PSNR-Y, dB (more is better)", ylabel="LPIPS (less is better)", title=title)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def markdown_table(result: dict) -> str:
    """The rows of `evaluate` as a Markdown table."""
    columns = {
        "psnr_y": ("PSNR-Y", "{:.2f}"),
        "ssim_y": ("SSIM-Y", "{:.3f}"),
        "lpips": ("LPIPS", "{:.3f}"),
        "haarpsi": ("HaarPSI", "{:.3f}"),
        "detail": ("detail", "{:.2f}"),
        "lr_psnr": ("LR-PSNR", "{:.1f}"),
        "seconds_per_megapixel": ("s / MP", "{:.2f}"),
    }
    columns = {key: value for key, value in columns.items() if key in result["rows"][0]}
    lines = [
        "| method | " + " | ".join(title for title, _ in columns.values()) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in result["rows"]:
        cells = [form.format(row[key]) for key, (_, form) in columns.items()]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
