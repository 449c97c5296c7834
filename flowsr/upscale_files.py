"""Many picture files: where their results go, which are there already, and each upscaled, or why it was not.

`plan` pairs pictures with results and refuses what cannot be before weights are loaded, `left_to_do` leaves out what
earlier calls have made, [`FileUpscaler`] makes the rest one by one. The command line and other engines share them.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch

import flowsr
from flowsr import upscaler
from flowsr.estimate import SAMPLE, Estimate, estimate
from flowsr.fidelity_map import read_map
from flowsr.files import MAX_PIXELS, PICTURE_SUFFIXES, PictureFile, check_place, format_of, read_file
from flowsr.folders import Done, digest_of, digest_of_pipeline, find_tree, in_shard
from flowsr.loading import load_silently
from flowsr.picture_reader import read_data, shape_of
from flowsr.pipelines.output_size import OutputSize
from flowsr.streaming import Progress, has_parts
from flowsr.suitability import CLEAN, REAL, advise

SMALL_TILE = 128  # LR pixels: tried where memory ran out
FORESEEN = 64  # pictures by which the time of all is estimated
TILE = 256  # LR pixels: of a network whose pictures have no parts


@dataclass(frozen=True)
class UpscaleSettings:
    """How pictures are upscaled and written: the options of `flowsr upscale` of these names.

    Attributes:
        checkpoint: as for [`~flowsr.loading.load`]; "auto" chooses between x4 and x4-real for each picture.
        device, dtype: of the weights, by torch's names.
        steps, fidelity, consistency, seed, outscale, width, height: of the pipeline's call.
        fidelity_map: picture file, white where faithful, instead of a `fidelity`.
        tile: of the call too; 0 for none.
        format, suffix, quality: of the files.
        compare: also write `bicubic | upscaled`.
        uncertainty: also write a heat map of how far samples lie apart.
        provenance: write into the file how it was made.
        max_pixels (`int`, *optional*): of a result; [`MAX_PIXELS`] without.
        max_memory (`int`, *optional*): bytes, as for [`~flowsr.streaming.Upscaled`].
    """

    checkpoint: str = "auto"
    device: str = "auto"
    dtype: str | None = None
    steps: int = 4
    fidelity: float = 0.0
    fidelity_map: str | None = None
    consistency: str | None = None
    tile: int | None = None
    seed: int = 0
    outscale: float | None = None
    width: int | None = None
    height: int | None = None
    format: str | None = None
    suffix: str = ""
    quality: int | None = None
    compare: bool = False
    uncertainty: bool = False
    provenance: bool = True
    max_pixels: int | None = None
    max_memory: int | None = None

    def __post_init__(self):
        if self.pixels < 1:
            raise ValueError(f"`--max-pixels` must be positive, got {self.max_pixels}.")
        if self.fidelity_map and self.fidelity:
            raise ValueError("`--fidelity` is one number and `--fidelity-map` one for each pixel; leave one.")
        if Path(f"a{self.suffix}").name != f"a{self.suffix}":
            raise ValueError(f"`--suffix` is a part of a name, got {self.suffix!r}.")

    @property
    def pixels(self) -> int:
        return MAX_PIXELS if self.max_pixels is None else self.max_pixels

    @property
    def size(self) -> dict[str, float]:
        names = ("outscale", "width", "height")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Job(NamedTuple):
    source: Path
    target: Path


def plan(inputs: list[str], output: str, settings: UpscaleSettings, shard: tuple[int, int] | None = None) -> list[Job]:
    """The pictures among `inputs`, or of them those of a shard, each with the place of its result.

    Args:
        inputs: files, folders, or `-` for the standard input.
        output: folder; a file for one picture; `-` for the standard output.
        shard: number and count.

    Raises:
        ValueError: for places that do not fit, two results with one name, and results on top of inputs.
    """
    found = find_tree(inputs, Path(output))
    if shard:
        found = [(source, name) for source, name in found if in_shard(name, shard)]
    jobs = [Job(source, target) for (source, _), target in zip(found, plan_targets(found, output, settings))]
    sources, planned = {source.resolve() for source, _ in jobs}, set()
    for target in [] if output == "-" else results_of(jobs, settings):
        check_place(target)
        if target in planned:
            raise ValueError(f"Two inputs would be written to {target}; upscale them into different folders.")
        planned.add(target)
        if target.resolve() in sources:
            raise ValueError(f"{target} is an input and would be overwritten; choose another `-o` or a `--suffix`.")
    return jobs


def plan_targets(found: list[tuple[Path, Path]], output: str, settings: UpscaleSettings) -> list[Path]:
    """Where each result goes, of pictures and the names that they have below a folder of results.

    For the standard output, `-` with the suffix of the format; without one where only the input knows it.
    """
    folder, suffix = Path(output), f".{settings.format}" if settings.format else ""
    streams = [path for path, _ in found if str(path) == "-"]
    if streams and len(found) > 1:
        raise ValueError("The standard input `-` is one picture; upscale others by another call.")
    if output == "-":
        if len(found) > 1 or settings.compare or settings.uncertainty:
            raise ValueError(
                f"The standard output takes one picture; name a folder for {len(found)}, `--compare` or "
                "`--uncertainty`."
            )
        return [Path(f"-{suffix or path.suffix}") for path, _ in found]
    if is_one_file(output):
        check_file(folder, suffix, len(found))
        return [folder] * len(found)
    if folder.is_file():
        raise ValueError(f"`-o {output}` is a file that is no picture; name a folder or a picture file.")
    if streams and not suffix:
        raise ValueError("The standard input has no name; name the result by `-o`, or its format by `--format`.")
    return [folder / result_name(name, settings) for _, name in found]


def result_name(name: Path, settings: UpscaleSettings) -> Path:
    """The name that a result has below its folder, of that of its picture."""
    return name.with_name(f"{name.stem}{settings.suffix}{f'.{settings.format}' if settings.format else name.suffix}")


def is_one_file(output: str) -> bool:
    """Whether the place of results is by its name a file: it has a suffix, and is no folder."""
    return bool(Path(output).suffix) and not Path(output).is_dir() and not output.endswith(("/", os.sep))


def check_file(output: Path, suffix: str, count: int) -> None:
    """Raises a ValueError for a file that cannot be the result of `count` pictures in the format of `suffix`."""
    if output.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(
            f"`-o {output}` has no suffix of a picture ({', '.join(sorted(PICTURE_SUFFIXES))}); for a folder, end "
            "it with a slash."
        )
    if suffix and format_of(output) != format_of(f"-{suffix}"):
        raise ValueError(f"`-o {output}` and `--format {suffix[1:]}` disagree; leave one.")
    format_of(output)
    if count > 1:
        raise ValueError(f"`-o {output}` is one file, but there are {count} pictures; name a folder.")


def results_of(jobs: list[Job], settings: UpscaleSettings) -> list[Path]:
    """All files that are written."""
    targets = [job.target for job in jobs]
    compared = [compare_path(target) for target in targets if settings.compare]
    return targets + compared + [uncertainty_path(target) for target in targets if settings.uncertainty]


def compare_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.png")


def uncertainty_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}_uncertainty.png")


def refuse_existing(jobs: list[Job], settings: UpscaleSettings) -> None:
    """Raises a ValueError where a result would be written over a file."""
    for target in results_of(jobs, settings):
        if target.exists():
            raise ValueError(f"{target} exists; pass `--overwrite` to replace it, or choose another `-o`.")


def left_to_do(
    jobs: list[Job], output: str, deciding: dict, shard: tuple[int, int] | None = None
) -> tuple[list[Job], Done]:
    """Of the jobs those that no earlier call has done alike, and the list in the folder of what is done.

    Args:
        output: folder of the results.
        deciding: all that results depend on beside their pictures, [`FileUpscaler.deciding`].
        shard: of this call.
    """
    done = Done(Path(output), deciding, shard)
    return [job for job in jobs if not done.has(*job)], done


class FileUpscaler:
    """Upscales picture files one by one, each with the weights that suit it; these are loaded once.

    Args:
        settings ([`UpscaleSettings`]): of all files.

    Raises:
        ValueError: for a checkpoint that cannot be loaded, or settings that it does not have.
    """

    def __init__(self, settings: UpscaleSettings):
        self.settings, self.models = settings, models_of(settings)
        self.pipe = pipe = next(iter(self.models.values()))
        OutputSize(pipe.scale_factor, **settings.size)  # refuses what is no size, once for all pictures
        tile = (None if has_parts(pipe) else TILE) if settings.tile is None else settings.tile or None
        self.call = upscaler.call_options(
            pipe,
            read_map(settings.fidelity_map) if settings.fidelity_map else settings.fidelity,
            num_inference_steps=settings.steps,
            consistency=settings.consistency,
            tile=tile,
            **settings.size,
        )
        if settings.uncertainty and not upscaler.has_dial(pipe):
            raise ValueError(f"`--uncertainty` is of flows, and a {type(pipe).__name__} is a diffusion; take x4.")
        self.lr_pixels = settings.pixels // pipe.scale_factor**2  # at most, of an input
        self.measured: dict = {}  # speeds

    def deciding(self) -> dict:
        """All that a result depends on beside its picture: the version, the weights and the settings."""
        decides = asdict(self.settings)
        for limit_or_place in ("checkpoint", "device", "max_pixels", "max_memory"):
            del decides[limit_or_place]
        if self.settings.fidelity_map:
            decides["fidelity_map"] = digest_of(Path(self.settings.fidelity_map))
        weights = "+".join(map(digest_of_pipeline, self.models.values()))
        return {"version": flowsr.__version__, "pipeline": weights, **decides}

    def estimate(self, source: Path) -> Estimate:
        """What a picture will take; the speed of this machine is measured once.

        Raises:
            ValueError: for what is no picture, or cannot be done.
        """
        *size, channels, dtype = shape_of(source, self.lr_pixels)
        return estimate(
            self.pipe, size, channels, dtype, max_memory=self.settings.max_memory, measured=self.measured, **self.call
        )

    def foresee(self, sources: list[Path]) -> float | None:
        """Seconds for all pictures, by at most 64 of them; `None` where the measuring would be a tenth of the work."""
        some = sources[:: math.ceil(len(sources) / FORESEEN) or 1]
        shapes, needed = [], []
        for source in some:  # what cannot be done is named when its turn comes
            with contextlib.suppress(ValueError):
                shapes.append(shape_of(source, self.lr_pixels))
        if sum(width * height for width, height, *_ in shapes) < 10 * 2 * SAMPLE**2:
            return None
        for source in some:
            with contextlib.suppress(ValueError):
                needed.append(self.estimate(source).seconds)
        return sum(needed) * len(sources) / len(some)

    def __call__(
        self,
        source: Path,
        target: Path,
        done: Done | None = None,
        content: bytes | None = None,
        stream: BinaryIO | None = None,
        say: Callable[[str], None] = lambda note: None,
        advice: bool = True,
        progress: Callable[[Progress], None] = lambda so_far: None,
    ) -> dict:
        """Upscales one file and reports: `input`, `model`, `output`, `width`, `height` and `seconds`, or an `error`.

        Args:
            source, target, stream, say, progress: as for [`~flowsr.upscaler.upscale_file`].
            done: where the start is noted.
            content: of the file, where it was read already; `source` names it.
            advice: also say which weights may suit the picture better.
        """
        report, start = {"input": str(source)}, time.perf_counter()
        try:
            if done is not None:
                done.begin(source, target)
            if content is None:
                picture = read_file(source, self.lr_pixels)
            else:
                picture = read_data(content, str(source), self.lr_pixels)
            report["model"], better = advise(picture, self.settings.checkpoint, list(self.models))
            if better and advice:
                say(better)
            width, height = self.write(picture, target, report["model"], say, stream=stream, progress=progress)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            line = "out of memory" if is_out_of_memory(error) else " ".join(str(error).split())
            return report | {"error": line if str(source) in line else f"{source}: {line}"}
        seconds = round(time.perf_counter() - start, 3)
        return report | {"output": str(target), "width": width, "height": height, "seconds": seconds}

    def write(
        self, picture: PictureFile, target: Path, model: str, say: Callable[[str], None], **how
    ) -> tuple[int, int]:
        """Upscales by the weights of a name, once more in small tiles where memory runs out; returns the size."""
        settings = self.settings
        work = partial(
            upscaler.upscale_file,
            self.models[model],
            picture,
            target,
            seed=settings.seed,
            compare_to=compare_path(target) if settings.compare else None,
            uncertainty_to=uncertainty_path(target) if settings.uncertainty else None,
            model=model if settings.provenance else None,
            quality=settings.quality,
            max_pixels=settings.pixels,
            max_memory=settings.max_memory,
            say=say,
            **how,
        )
        try:
            return work(**self.call)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # Behind the handler, whose traceback holds what the first try had made.
        say(f"out of memory; once more in tiles of {SMALL_TILE} LR pixels")
        return work(**self.call | {"tile": SMALL_TILE})


def models_of(settings: UpscaleSettings) -> dict:
    """Pipelines by the names of their checkpoints: one, or for `auto` those among which each picture chooses."""
    checkpoint, dtype = settings.checkpoint, settings.dtype and getattr(torch, settings.dtype)
    if checkpoint == "auto":
        return {name: load_silently(name, settings.device, dtype) for name in (CLEAN, REAL)}
    name = Path(checkpoint).name if Path(checkpoint).exists() else checkpoint
    return {name: load_silently(checkpoint, settings.device, dtype)}


def is_out_of_memory(error: Exception) -> bool:
    """Python's own, that of a GPU, and that of torch on a CPU, which has no class."""
    return isinstance(error, MemoryError) or "memory" in str(error).lower() and isinstance(error, RuntimeError)
