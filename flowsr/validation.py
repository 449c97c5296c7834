"""What a training run shows of itself: measured pictures, grids to look at, and curves at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image

from flowsr.metrics import psnr_y, ssim_y

GRID_SIDE = 256  # HR pixels shown of each picture
TILE = 256  # LR pixels: bounds the memory of a validation


@dataclass
class Pair:
    """A picture and its LR, uint8 `(h, w, 3)`, and its class where the network knows classes."""

    hr: np.ndarray
    lr: np.ndarray
    label: int | None = None

    def upscaled(self, pipe, steps: int, seed: int) -> np.ndarray:
        """What a pipeline makes of the LR; uint8."""
        options = {} if self.label is None else {"class_labels": self.label}
        generator = torch.Generator(pipe.device).manual_seed(seed)
        answer = pipe(Image.fromarray(self.lr), num_inference_steps=steps, generator=generator, tile=TILE, **options)
        return np.asarray(answer.images[0])


def shared(work: Callable[[int], object], count: int) -> list:
    """`[work(0), ..., work(count - 1)]`, of which each process does a part; all processes must call together."""
    state = PartialState()
    own = [(number, work(number)) for number in range(state.process_index, count, state.num_processes)]
    return [done for _, done in sorted(gather_object(own), key=lambda numbered: numbered[0])]


def measure(pipe, pairs: list[Pair], steps: list[int], lpips: Callable | None) -> tuple[dict[str, float], np.ndarray]:
    """Mean PSNR-Y, SSIM-Y and LPIPS of a super-resolution pipeline, and a grid of what it made.

    Args:
        pipe: any of the super-resolution pipelines.
        pairs (`list[Pair]`): what is upscaled, and what it should become.
        steps (`list[int]`): numbers of inference steps, each measured.
        lpips: distance of two pictures, or `None`.

    Returns:
        `psnr_y_N`, `ssim_y_N` (and `lpips_N`) for each N of `steps`; and a uint8 grid with one row a picture:
        `bicubic | SR at each N | HR`. The processes of a training share the work, and each has all of the result.
    """
    scale = pipe.scale_factor

    def measure_one(number: int) -> tuple[dict[str, float], list[np.ndarray]]:
        pair, measured = pairs[number], {}
        row = [np.asarray(Image.fromarray(pair.lr).resize(pair.hr.shape[1::-1], Image.BICUBIC))]
        for count in steps:
            sr = pair.upscaled(pipe, count, seed=number)
            row.append(sr)
            measured[f"psnr_y_{count}"] = psnr_y(sr, pair.hr, scale)
            measured[f"ssim_y_{count}"] = ssim_y(sr, pair.hr, scale)
            if lpips is not None:
                measured[f"lpips_{count}"] = lpips(sr, pair.hr)
        return measured, corners([*row, pair.hr])

    measured, rows = zip(*shared(measure_one, len(pairs)))
    return {name: round(float(np.mean([each[name] for each in measured])), 4) for name in measured[0]}, grid(rows)


def coupling_grid(pipe, pairs: list[Pair], steps: int) -> np.ndarray:
    """One row a picture: `LR | source | SR | HR`, where the flow starts and where it ends."""
    scale = pipe.scale_factor

    def row(number: int) -> list[np.ndarray]:
        pair = pairs[number]
        generator = torch.Generator(pipe.device).manual_seed(number)
        x = torch.from_numpy(pair.lr.copy()).permute(2, 0, 1)[None].to(pipe.device) / 127.5 - 1
        source = pipe.from_data_range(pipe.prepare_source(x, generator))[0]
        source = ((source + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        nearest = pair.lr.repeat(scale, axis=0).repeat(scale, axis=1)
        return corners([nearest, source, pair.upscaled(pipe, steps, seed=number), pair.hr])

    return grid(shared(row, len(pairs)))


def generated_grid(pipe, steps: int, side: int = 8, guidance_scale: float = 1.0) -> np.ndarray:
    """`side` x `side` pictures of a generator; those of a row are of one class where it knows classes."""
    classes = pipe.unet.config.num_class_embeds
    labels = [row % classes for row in range(side) for _ in range(side)] if classes else None
    generator = torch.Generator(pipe.device).manual_seed(0)
    pictures = pipe(
        side**2, labels, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator
    ).images
    pictures = [np.asarray(picture.convert("RGB")) for picture in pictures]
    return grid([pictures[row * side : (row + 1) * side] for row in range(side)])


def corners(row: list[np.ndarray]) -> list[np.ndarray]:
    """What a grid can show of pictures, at most."""
    return [image[:GRID_SIDE, :GRID_SIDE] for image in row]


def grid(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures side by side, cut to the smallest common size and to `GRID_SIDE`."""
    height, width = (min(GRID_SIDE, *(image.shape[axis] for row in rows for image in row)) for axis in (0, 1))
    return np.concatenate([np.concatenate([image[:height, :width] for image in row], axis=1) for row in rows])


def plot_curves(metrics: Path, picture: Path) -> None:
    """Draws the loss and every validated number of a `metrics.jsonl` over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    validated = [record for record in records if record.get("event") == "validation"]
    kinds = [
        kind for kind in ("psnr_y", "ssim_y", "lpips") if any(f"{kind}_" in name for r in validated for name in r)
    ]
    figure, axes = pyplot.subplots(1, 1 + len(kinds), figsize=(5 * (1 + len(kinds)), 4), layout="constrained")
    axes = np.atleast_1d(axes)
    losses = [(record["step"], record["loss"]) for record in records if "loss" in record]
    axes[0].semilogy(*zip(*losses))
    axes[0].set(title="loss", xlabel="optimiser steps")
    for axis, kind in zip(axes[1:], kinds):
        for name in sorted(
            {n for r in validated for n in r if n.startswith(kind)}, key=lambda n: int(n.split("_")[-1])
        ):
            points = [(record["step"], record[name]) for record in validated if name in record]
            axis.plot(*zip(*points), marker=".", label=f"{name.split('_')[-1]} steps")
        axis.set(title=kind, xlabel="optimiser steps")
        axis.legend()
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
