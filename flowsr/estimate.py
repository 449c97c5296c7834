"""What upscaling a picture will take, before any of it is done."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import psutil
from diffusers import DiffusionPipeline

from flowsr.pipelines.output_size import OutputSize
from flowsr.streaming import Upscaled, bytes_per_pixel, has_parts

SAMPLE = 96  # LR pixels: side of what is upscaled to learn the speed
WHOLE = 48  # bytes per pixel of the result where it is made in one piece


@dataclass
class Estimate:
    """What a picture will take.

    Attributes:
        width, height: of the result, pixels.
        parts: that are upscaled one by one; 1 for a picture in one piece.
        memory: of the process at its peak, bytes.
        seconds: at the speed that this machine has now.
        disk: bytes of the result without compression.
    """

    width: int
    height: int
    parts: int
    memory: int
    seconds: float
    disk: int


class Shape:
    """A picture of which the size alone is known."""

    def __init__(self, height: int, width: int, channels: int, dtype: str):
        self.shape, self.dtype = (height, width, channels), np.dtype(dtype)


def estimate(
    pipe: DiffusionPipeline,
    size: tuple[int, int],
    channels: int = 3,
    dtype: str = "uint8",
    tile: int | None = None,
    max_memory: int | None = None,
    outscale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    measured: dict | None = None,
    **options,
) -> Estimate:
    """Memory, time and disk for a picture, from its size and the speed of this machine.

    Args:
        size: width and height of the LR, pixels.
        channels (`int` in 1..4), dtype ("uint8", "uint16"): of the picture.
        tile, max_memory: as for [`~flowsr.streaming.Upscaled`].
        outscale, height, width: as in the pipeline's call.
        measured (`dict`, *optional*): speeds that earlier calls with the same options have found, used again.
        options: of the pipeline's call: `num_inference_steps`, `fidelity` (a map takes what 0 takes), `consistency`.

    Raises:
        ValueError: for what does not fit into the memory, with the way out.
    """
    if np.ndim(options.get("fidelity")):
        options["fidelity"] = 0.0
    (lr_width, lr_height), scale = size, pipe.scale_factor
    height, width = OutputSize(scale, outscale, height, width).of(lr_height, lr_width)
    resized = (height, width) != (lr_height * scale, lr_width * scale)
    here, pixels = psutil.Process().memory_info().rss, lr_width * lr_height
    disk = height * width * channels * np.dtype(dtype).itemsize
    if has_parts(pipe):
        shape = Shape(lr_height, lr_width, channels, dtype)
        plan = Upscaled(shape, pipe, tile=tile, max_memory=max_memory, **options)
        rows, columns = ([seen.stop - seen.start for seen, _ in spans] for spans in (plan.bands, plan.columns))
        parts, seen = len(rows) * len(columns), sum(rows) * sum(columns)
        band = min(plan.tall, plan.shape[0]) * plan.shape[1] * channels * (4 if resized else shape.dtype.itemsize)
        memory = here + max(rows) * max(columns) * bytes_per_pixel(pipe) + band
    else:
        parts, seen = 1, pixels
        memory = here + memory_in_one_piece(pipe, (lr_width, lr_height), (width, height), tile)
    measured = {} if measured is None else measured
    sample = (min(lr_height, SAMPLE), min(lr_width, SAMPLE), width / lr_width if resized else None)
    if sample not in measured:
        measured[sample] = measure(pipe, *sample, **options)
    return Estimate(width, height, parts, memory, measured[sample] * seen, disk)


def measure(pipe: DiffusionPipeline, height: int, width: int, outscale: float | None = None, **options) -> float:
    """Seconds that an LR pixel takes, of a sample that is upscaled twice, as the first call prepares.

    Args:
        height, width: of the sample, LR pixels.
        outscale, options: of the pipeline's call.
    """
    sample, resize = np.zeros((height, width, 3), np.uint8), {"outscale": outscale} if outscale else {}
    for _ in range(2):
        start = time.perf_counter()
        pipe(sample, output_type="np", **options, **resize)
        seconds = time.perf_counter() - start
    return seconds / (height * width)


def memory_in_one_piece(pipe: DiffusionPipeline, lr: tuple[int, int], made: tuple[int, int], tile: int | None) -> int:
    """Bytes that a picture without parts takes while it is made.

    Args:
        lr, made: width and height of the picture and of the result, pixels.
        tile: of the pipeline's call, LR pixels.

    Raises:
        ValueError: where a CPU has no such memory free.
    """
    (lr_width, lr_height), (width, height), scale = lr, made, pipe.scale_factor
    pixels = lr_width * lr_height
    at_once = pixels if tile is None else min(pixels, (2 * tile) ** 2)
    resized = width * height if made != (lr_width * scale, lr_height * scale) else 0
    memory = (pixels * scale**2 + resized) * WHOLE + at_once * bytes_per_pixel(pipe)
    free = psutil.virtual_memory().available
    if pipe._execution_device.type == "cpu" and memory > free:
        raise ValueError(
            f"A picture of {lr_width}x{lr_height} needs about {memory >> 20} MiB in one piece, and {free >> 20} MiB "
            "are free; take smaller pictures, or a checkpoint that upscales parts by themselves."
        )
    return memory
