"""A pipeline as a function of tensors, the way spandrel calls its models, and as a function of picture files."""

from __future__ import annotations

import inspect
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

import flowsr
from flowsr.estimate import memory_in_one_piece
from flowsr.fidelity_map import stretch
from flowsr.files import (
    MAX_PIXELS,
    as_rgb,
    check_target,
    encode,
    format_of,
    read_file,
    save_picture,
    with_provenance,
    write_file,
)
from flowsr.loading import load_upscaler
from flowsr.picture_file import PictureFile
from flowsr.pipelines.output_size import OutputSize
from flowsr.streaming import Progress, Resized, Upscaled, following_steps, has_parts, upscaled
from flowsr.uncertainty import heat, sampled_uncertainty


class Upscaler:
    """`model(image) -> image`: tensors `(n, 3, h, w)` in [0, 1] to `(n, 3, scale * h, scale * w)` in [0, 1].

    For programs that expect an upscaler of spandrel's kind: equal input gives equal output, whatever else is in the
    batch, and `scale`, `device`, `dtype`, `model`, `to`, `half`, `eval` and the others mean what they mean there.

    Args:
        pipe ([`FlowMatchSRPipeline`] or [`DDPMSRPipeline`]): or a checkpoint of one, as for [`~flowsr.loading.load`].
        seed (`int`): of the noise that every picture starts from.
        **options: further arguments of the pipeline's call, such as `fidelity=1.0`, `num_inference_steps` or `tile`.

    Example:

        >>> from flowsr import Upscaler
        >>> model = Upscaler("x4", fidelity=1.0)
        >>> large = model(torch.rand(1, 3, 32, 48))  # doctest: +SKIP
    """

    input_channels = output_channels = 3
    purpose, supports_half, supports_bfloat16 = "SR", True, True  # half precision: on a GPU

    def __init__(self, pipe: DiffusionPipeline | str | os.PathLike, seed: int = 0, **options):
        self.pipe = load_upscaler(pipe) if isinstance(pipe, (str, os.PathLike)) else pipe
        if {"outscale", "height", "width"} & options.keys():
            raise ValueError("An Upscaler has one `scale`, that of its network; resize what it returns.")
        self.seed, self.options = seed, call_options(self.pipe, **options)

    @property
    def scale(self) -> int:
        return self.pipe.scale_factor

    @property
    def model(self) -> torch.nn.Module:
        return self.pipe.unet

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    def to(self, *args, **kwargs) -> Upscaler:
        """Moves or casts the pipeline, as `DiffusionPipeline.to`."""
        self.pipe.to(*args, **kwargs)
        return self

    def half(self) -> Upscaler:
        return self.to(torch.float16)

    def bfloat16(self) -> Upscaler:
        return self.to(torch.bfloat16)

    def float(self) -> Upscaler:
        return self.to(torch.float32)

    def eval(self) -> Upscaler:
        self.pipe.unet.eval()
        return self

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Upscales a batch; the answer is on the device and of the dtype of `image`.

        Raises:
            ValueError: for a shape or a range that is none of the above.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"`image` must have shape (n, 3, h, w), got {tuple(image.shape)}.")
        generators = [torch.Generator().manual_seed(self.seed) for _ in image]
        return self.pipe(image, generator=generators, output_type="pt", **self.options).images.to(image)


def call_options(pipe: DiffusionPipeline, fidelity: float | np.ndarray = 0.0, **options) -> dict:
    """Arguments for the call of a pipeline: `fidelity` is left out where it is 0, as a diffusion has no such dial.

    Raises:
        ValueError: for another `fidelity` and a diffusion.
    """
    if np.ndim(fidelity) == 0 and fidelity == 0:
        return options
    if not has_dial(pipe):
        raise ValueError(
            f"`fidelity` is a dial of flow matching, and a {type(pipe).__name__} is a diffusion; leave it at 0."
        )
    return {**options, "fidelity": fidelity}


def has_dial(pipe: DiffusionPipeline) -> bool:
    """Whether the call of a pipeline takes `fidelity`."""
    return "fidelity" in inspect.signature(type(pipe).__call__).parameters


def upscale_file(
    pipe: DiffusionPipeline,
    source: str | Path | PictureFile,
    target: Path,
    seed: int = 0,
    compare_to: Path | None = None,
    uncertainty_to: Path | None = None,
    model: str | None = None,
    quality: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_memory: int | None = None,
    stream: BinaryIO | None = None,
    say: Callable[[str], None] = lambda note: None,
    progress: Callable[[Progress], None] = lambda so_far: None,
    **options,
) -> tuple[int, int]:
    """Upscales a picture file, with all that it holds, into another.

    Args:
        source: file, `-` for the standard input, or what was read of it.
        target: file, whose suffix says the format; with a `stream`, its suffix alone counts, and without one the
            format is that of `source`.
        seed (`int`): of the noise that the flow starts from, in every frame.
        compare_to (`Path`, *optional*): also write `bicubic | upscaled` of the first frame into this file.
        uncertainty_to (`Path`, *optional*): also write the heat map of the first frame's uncertainty, at fidelity 0,
            into this file.
        model (`str`, *optional*): name to write into the file with how the picture was made; nothing without.
        quality (`int` in 1..100, *optional*): of lossy compression.
        max_pixels (`int`): of the network's result and of the resized one, all frames together.
        max_memory (`int`, *optional*): bytes for the network's work on a part of a picture, where it has parts
            ([`has_parts`]); by default half of what is free.
        stream: to write to instead of a file.
        say: called with what the result cannot keep of `source`, in words, before any work.
        progress: called with a [`Progress`] within a frame, after every step and every part.
        **options: further arguments of the pipeline's call; a map of `fidelity`, an array, may have any size and is
            stretched over each frame.

    Returns:
        Width and height of what was written, of the first frame.

    Raises:
        ValueError: for a file that cannot be read or written, naming it; before any work where that can be known.
    """

    fidelity = options.get("fidelity")

    def enlarge(pixels: np.ndarray) -> np.ndarray | Upscaled | Resized:
        call = options | ({"fidelity": stretch(fidelity, pixels.shape[:2])} if np.ndim(fidelity) else {})
        if has_parts(pipe):
            parts = upscaled(pixels, pipe, seed=seed, max_memory=max_memory, progress=progress, **call)
            return parts if by_rows else parts[:]
        lr = pixels.shape[1::-1]
        memory_in_one_piece(pipe, lr, size.of(*lr[::-1])[::-1], call.get("tile"))
        call |= following_steps(lambda *steps: progress(Progress(0, 1, *steps)))
        generator = torch.Generator().manual_seed(seed)
        return pipe(pixels, generator=generator, output_type="np", **call).images[0]

    scale = pipe.scale_factor
    size = OutputSize(scale, *(options.get(name) for name in ("outscale", "height", "width")))
    picture = source if isinstance(source, PictureFile) else read_file(source, max_pixels // scale**2)
    check_pixels(picture, size, max_pixels)
    if model is not None:
        facts = {"software": f"flowsr {flowsr.__version__}", "model": model, "scale": scale, "seed": seed}
        names = {"num_inference_steps": "steps", "fidelity": "fidelity", "consistency": "consistency"}
        facts |= {short: options[name] for name, short in names.items() if options.get(name) is not None}
        facts |= {"fidelity": "map"} if np.ndim(fidelity) else {}
        facts |= resize_facts(picture, size)
        picture = with_provenance(picture, facts)
    if stream is not None and not target.suffix:
        target = target.with_name(f"{target.name}{picture.suffix}")
    for note in picture.notes + check_target(picture, target, size.of, quality):
        say(note)
    single = len(picture.frames) == 1 and not picture.cmyk and compare_to is None
    by_rows = single and format_of(target).name in ("PNG", "TIFF")
    large = picture.enlarged(enlarge)
    if stream is None:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_file(large, target, quality)
    else:
        encode(large, whole := io.BytesIO(), format_of(target), quality)
        stream.write(whole.getvalue())
    height, width = large.frames[0].shape[:2]
    if compare_to is not None:
        bicubic = as_rgb(picture).resize((width, height), PIL.Image.BICUBIC)
        save_picture(side_by_side([bicubic, as_rgb(large)]), compare_to)
    if uncertainty_to is not None:
        vivid = {name: value for name, value in options.items() if name != "fidelity"}
        vivid |= {"max_memory": max_memory} if has_parts(pipe) else {}
        values = sampled_uncertainty(pipe, picture.frames[0], seed, **vivid)
        save_picture(PIL.Image.fromarray(heat(values)), uncertainty_to)
    return width, height


def check_pixels(picture: PictureFile, size: OutputSize, max_pixels: int) -> None:
    """Raises a ValueError for a result of more than `max_pixels`, all frames together."""
    sizes = [size.of(*frame.shape[:2]) for frame in picture.frames]
    pixels = sum(height * width for height, width in sizes)
    if pixels > max_pixels:
        height, width = sizes[0]
        raise ValueError(
            f"The result of {width}x{height} would have {pixels:,} pixels, at most {max_pixels:,} are made; "
            "ask for a smaller size, or raise `--max-pixels`."
        )


def resize_facts(picture: PictureFile, size: OutputSize) -> dict[str, str]:
    """What is written into a file of a picture that is not as large as the network makes it."""
    height, width = picture.frames[0].shape[:2]
    made = size.of(height, width)
    if made == (height * size.scale, width * size.scale):
        return {}
    return {"size": f"{made[1]}x{made[0]}", "resize": "Lanczos"}


def side_by_side(images: list[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures of one size in a row."""
    return PIL.Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))
