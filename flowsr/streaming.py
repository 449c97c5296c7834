"""Pictures of any size in bounded memory: upscaled part by part, the same to the bit as in one piece.

reader = np.memmap("small.raw", np.uint8, "r", shape=(50_000, 40_000, 3))
writer = np.memmap("large.raw", np.uint8, "w+", shape=(200_000, 160_000, 3))
flowsr.stream(reader, writer, pipe, fidelity=1.0, max_memory=4 * 2**30)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL.Image
import psutil
import torch
from diffusers import DiffusionPipeline

from flowsr.pipelines.fidelity import read_fidelity
from flowsr.pipelines.output_size import OutputSize, lanczos_taps, resampled
from flowsr.pipelines.tiling import enlarged, exact_spans, lr_multiple, within

SHARE = 0.5  # of the memory that is free, taken without `max_memory`
LARGEST_TILE = 1024  # LR pixels: beyond it a tile saves little
SAME_KERNELS = 20480  # values: torch convolves smaller pictures by other code, which rounds otherwise
# Of the widest layer, and float32 pictures on the grid of the result, that live at once.
MAPS, IMAGES = 10, 20


class Progress(NamedTuple):
    """How far a picture is: `part` of `parts` are done, and of the next `step` of `steps`."""

    part: int
    parts: int
    step: int = 0
    steps: int = 1

    @property
    def share(self) -> float:
        return (self.part + self.step / self.steps) / self.parts


class Upscaled:
    """A picture that is upscaled as its rows are asked for: it has `shape`, `dtype` and `[first:last]`.

    The last band of rows stays in memory, so that rows are best asked for from top to bottom.

    Args:
        reader: picture to be upscaled, an array `(h, w)` or `(h, w, c)` of uint8, uint16 or float in [0, 1], with 1 to
            4 channels (2 and 4: alpha); anything with `shape` and `[y0:y1, x0:x1]`, or a PIL picture.
        pipe ([`FlowMatchSRPipeline`]): with a network whose receptive field is bounded and a scheduler of
            `noise="positional"`.
        num_inference_steps, fidelity, consistency, guidance_scale, class_labels: as in the pipeline's call.
        seed (`int`): of the source noise.
        tile (`int`, *optional*): side of a part in LR pixels, without what it sees around itself; by default as large
            as `max_memory` allows.
        max_memory (`int`, *optional*): bytes for a part's work, beside weights and the rows in hand; by default half
            of what is free.
        progress: called with a [`Progress`] after every step and every part.

    Raises:
        ValueError: for a reader or limits that cannot be, before any work.
    """

    def __init__(
        self,
        reader: Any,
        pipe: DiffusionPipeline,
        num_inference_steps: int = 4,
        fidelity: float | np.ndarray | torch.Tensor | PIL.Image.Image = 0.0,
        consistency: Literal["exact", "soft"] | None = None,
        guidance_scale: float = 1.0,
        class_labels: int | None = None,
        seed: int = 0,
        tile: int | None = None,
        max_memory: int | None = None,
        progress: Callable[[Progress], None] = lambda so_far: None,
    ):
        if not hasattr(pipe, "halo"):
            raise ValueError(f"A {type(pipe).__name__} upscales whole pictures; take a FlowMatchSRPipeline.")
        if isinstance(reader, PIL.Image.Image):
            reader = np.asarray(reader)
        shape = getattr(reader, "shape", None)
        if not shape or len(shape) not in (2, 3) or not all(shape) or len(shape) == 3 and shape[2] > 4:
            raise ValueError(
                "`reader` must have a `shape` of (h, w) or (h, w, c) with 1 to 4 channels, got a "
                f"{type(reader).__name__} of shape {shape}."
            )
        self.reader, self.pipe, self.seed, self.progress = reader, pipe, seed, progress
        depends = {"num_inference_steps": num_inference_steps, "consistency": consistency}
        self.options = {**depends, "guidance_scale": guidance_scale, "class_labels": class_labels}
        self.fidelity = read_fidelity(fidelity, {tuple(shape[:2])})
        depends["fidelity"] = 0.0 if isinstance(self.fidelity, torch.Tensor) else self.fidelity
        self.halo, scale, multiple = pipe.halo(**depends), pipe.scale_factor, lr_multiple(pipe.unet)
        self.scale = scale
        if tile is None:
            tile = largest_tile(pipe, self.halo, max_memory)
        elif not isinstance(tile, int) or tile < 1:
            raise ValueError(f"`tile` must be a whole number of LR pixels from 1, got {tile!r}.")
        self.side = math.ceil(tile / multiple) * multiple
        height, width = shape[:2]
        self.shape = (height * scale, width * scale, *shape[2:])
        self.dtype = np.dtype(getattr(reader, "dtype", np.uint8))
        self.ndim, self.nbytes = len(self.shape), math.prod(self.shape) * self.dtype.itemsize
        self.tall = self.side * scale  # rows of a band
        least = SAME_KERNELS // pipe.unet.config.in_channels + 1  # LR pixels
        least = [max(math.isqrt(least) + 1, math.ceil(least / size)) for size in (width, height)]
        spans = (exact_spans(size, self.side, self.halo) for size in (height, width))
        self.bands, self.columns = (
            [(widened(seen, size, side), kept) for seen, kept in each]
            for each, size, side in zip(spans, (height, width), least)
        )
        self.done, self.band = 0, (-1, None)

    def part(self, seen: tuple[slice, slice], kept: tuple[slice, slice]) -> np.ndarray:
        """One part, upscaled by itself: `kept` and `seen`, with the halo, are areas in LR pixels."""
        pixels = np.asarray(self.reader[seen])
        generator, corner = torch.Generator().manual_seed(self.seed), tuple(side.start for side in seen)
        fidelity = self.fidelity[seen] if isinstance(self.fidelity, torch.Tensor) else self.fidelity
        parts = len(self.bands) * len(self.columns)
        steps = following_steps(lambda *steps: self.progress(Progress(self.done, parts, *steps)))
        options = {**self.options, "fidelity": fidelity, **steps}
        made = self.pipe(pixels, corner=corner, generator=generator, output_type="np", **options).images[0]
        made = made[enlarged(within(kept, seen), self.scale)]
        made = made if len(self.shape) == 3 else made[..., 0]
        self.done += 1
        self.progress(Progress(self.done, parts))
        return as_dtype(made, self.dtype)

    def parts(self) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
        """All parts with their areas in pixels of the result, from top to bottom and left to right."""
        for seen_rows, kept_rows in self.bands:
            for seen_columns, kept_columns in self.columns:
                kept = (kept_rows, kept_columns)
                yield enlarged(kept, self.scale), self.part((seen_rows, seen_columns), kept)

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of the result, `(rows, W)` or `(rows, W, c)`."""
        first, last, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"Rows come one after the other, got a step of {step}.")
        made, at = np.empty((max(last - first, 0), *self.shape[1:]), self.dtype), first
        while at < last:
            number = at // self.tall
            if number != self.band[0]:
                self.band = (-1, None)  # let go of before the next is made
                self.band = (number, self.make_band(number))
            taken = self.band[1][at - number * self.tall : last - number * self.tall]
            made[at - first : at - first + len(taken)] = taken
            at += len(taken)
        return made

    def make_band(self, number: int) -> np.ndarray:
        seen_rows, kept_rows = self.bands[number]
        band = np.empty(((kept_rows.stop - kept_rows.start) * self.scale, *self.shape[1:]), self.dtype)
        for seen_columns, kept_columns in self.columns:
            _, columns = enlarged((kept_rows, kept_columns), self.scale)
            band[:, columns] = self.part((seen_rows, seen_columns), (kept_rows, kept_columns))
        return band


class Resized:
    """Rows of an upscaled picture at another size, with `shape`, `dtype` and `[first:last]` as [`Upscaled`].

    The same to the bit as the pipeline's own resize of the whole picture. Rows are asked for from top to bottom, and
    those of the upscaled picture that a later row may need stay in memory.

    Args:
        rows ([`Upscaled`]): is taken over, and makes floats from now on.
        size: height and width of the result.
    """

    def __init__(self, rows: Upscaled, size: tuple[int, int]):
        self.rows, self.dtype, self.shape = rows, rows.dtype, (*size, *rows.shape[2:])
        self.ndim, self.nbytes = len(self.shape), math.prod(self.shape) * self.dtype.itemsize
        rows.dtype = np.dtype(np.float32)  # rounded once, at the end
        (height, width), (new_height, new_width) = rows.shape[:2], size
        self.tall = max(1, rows.tall * new_height // height)  # rows of about a band
        self.down = lanczos_taps(height, new_height) if height != new_height else None
        self.across = lanczos_taps(width, new_width) if width != new_width else None
        self.first, self.held = 0, torch.empty(0, new_width, *self.shape[2:])  # rows, from which one on

    def __getitem__(self, rows: slice) -> np.ndarray:
        first, last, step = rows.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"Rows come one after the other, got a step of {step}.")
        if last <= first:
            return np.empty((0, *self.shape[1:]), self.dtype)
        if self.down is None:
            made = self.source_rows(first, last)
        else:
            places, weights = (each[first:last] for each in self.down)
            top, bottom = int(places.min()), int(places.max()) + 1
            made = resampled(self.source_rows(top, bottom), places - top, weights, 0)
        return as_dtype(made.clamp(0, 1).numpy(), self.dtype)

    def source_rows(self, first: int, last: int) -> torch.Tensor:
        """Rows of the upscaled picture, at the width of the result."""
        if first < self.first:  # back to rows that were let go of
            self.first, self.held = first, self.held[:0]
        self.first, self.held = first, self.held[first - self.first :].clone()
        made = torch.from_numpy(self.rows[first + len(self.held) : last])
        if self.across is not None:
            made = resampled(made, *self.across, 1)
        self.held = torch.cat([self.held, made])
        return self.held[: last - first]


def upscaled(
    reader: Any,
    pipe: DiffusionPipeline,
    outscale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    **options,
) -> Upscaled | Resized:
    """A picture whose rows are upscaled as they are asked for, at the network's scale or at another size.

    Args:
        reader, pipe, options: as for [`Upscaled`].
        outscale, height, width: as in the pipeline's call.

    Raises:
        ValueError: for a reader, a size or limits that cannot be, before any work.
    """
    size = OutputSize(pipe.scale_factor, outscale, height, width)
    rows = Upscaled(reader, pipe, **options)
    wanted = size.of(*rows.reader.shape[:2])
    return rows if wanted == rows.shape[:2] else Resized(rows, wanted)


def following_steps(on_step: Callable[[int, int], None]) -> dict:
    """Options for a pipeline's call by which `on_step` gets the number of steps done and of all, after each."""

    def tell(pipe: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        on_step(step + 1, pipe.num_timesteps)
        return tensors

    return {"callback_on_step_end": tell, "callback_on_step_end_tensor_inputs": []}


def as_dtype(pixels: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[0, 1] as floats, or as the levels of an integer type."""
    return pixels.astype(dtype) if dtype.kind == "f" else (pixels * np.iinfo(dtype).max).round().astype(dtype)


def widened(span: slice, size: int, least: int) -> slice:
    """A span of at least `least` within `size`, as far as that goes."""
    start = max(0, min(span.start, span.stop - least))
    return slice(start, min(size, max(span.stop, start + least)))


def stream(reader: Any, writer: Any, pipe: DiffusionPipeline, **options) -> None:
    """Upscales a picture of any size in memory that does not grow with it.

    Every part depends on its surroundings alone, so that the result is the same to the bit for every `tile` and
    `max_memory`, at scales that are powers of two; at others bicubic weights are rounded by place, to within 1e-5.

    Args:
        reader: as for [`Upscaled`].
        writer: anything of the shape of the result that takes `writer[y0:y1, x0:x1] = pixels`, such as a numpy
            memmap, a Zarr or an HDF5 array; or a function that is called with rows `(rows, W[, c])` from top to
            bottom. Pixels have the dtype of the reader.
        pipe, options: as for [`upscaled`].

    Raises:
        ValueError: for a reader, a writer or limits that cannot be, before any work.

    Example:

        >>> import numpy as np, flowsr
        >>> small = np.memmap("small.raw", np.uint8, "r", shape=(5000, 4000, 3))  # doctest: +SKIP
        >>> large = np.memmap("large.raw", np.uint8, "w+", shape=(20000, 16000, 3))  # doctest: +SKIP
        >>> flowsr.stream(small, large, pipe, seed=1)  # doctest: +SKIP
    """
    result = upscaled(reader, pipe, **options)
    if not callable(writer):
        found = (tuple(getattr(writer, "shape", ())), np.dtype(getattr(writer, "dtype", result.dtype)))
        if found != (result.shape, result.dtype):
            raise ValueError(
                f"`writer` must have shape {result.shape} and dtype {result.dtype}, or be a function that takes rows; "
                f"got shape {found[0]} and dtype {found[1]}."
            )
        if isinstance(result, Upscaled):
            for area, pixels in result.parts():
                writer[area] = pixels
            return
    for start in range(0, result.shape[0], result.tall):
        rows = result[start : start + result.tall]
        if callable(writer):
            writer(rows)
        else:
            writer[start : start + len(rows), 0 : rows.shape[1]] = rows


def has_parts(pipe: DiffusionPipeline) -> bool:
    """Whether parts of a picture can be upscaled by themselves, to what they are in the whole."""
    try:
        return hasattr(pipe, "halo") and pipe.halo() >= 0
    except (AttributeError, ValueError):  # the first: a network of the caller's that does not say what it sees
        return False


def bytes_per_pixel(pipe: DiffusionPipeline) -> int:
    """Memory that the work on one LR pixel takes at its peak, beside the weights."""
    config = pipe.unet.config
    widths = config.get("block_out_channels") or (config.encoder_channels, config.head_channels)
    maps = MAPS * max(widths) * torch.finfo(pipe.unet.dtype).bits // 8
    return maps + IMAGES * 3 * config.scale_factor**2 * 4


def largest_tile(pipe: DiffusionPipeline, halo: int, max_memory: int | None) -> int:
    """LR pixels of the largest tile whose work, with its halo, fits into memory.

    Raises:
        ValueError: where not even the smallest does.
    """
    if max_memory is None:
        device = pipe._execution_device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        max_memory = int(SHARE * free)
    side, smallest = math.isqrt(max_memory // bytes_per_pixel(pipe)) - 2 * halo, min(16, max(1, halo))
    if side < smallest:
        needed = (smallest + 2 * halo) ** 2 * bytes_per_pixel(pipe)
        raise ValueError(
            f"A part sees {halo} LR pixels around itself and needs at least {math.ceil(needed / 2**20)} MiB, but "
            f"{max_memory // 2**20} MiB may be used; raise `max_memory`, or take fewer steps or no `consistency`."
        )
    return min(side, LARGEST_TILE)
