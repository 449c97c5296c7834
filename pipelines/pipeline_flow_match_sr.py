"""Super-resolution by flow matching: low-resolution pictures in, pictures `scale` times as large out.

One self-contained file on purpose: it imports torch, numpy, PIL and diffusers alone, so that it can travel with a
checkpoint. Top to bottom: pictures to tensors and back, consistency with the LR, tiles, the pipeline with its sharing.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from huggingface_hub import ModelCard

# Pictures to tensors and back.


@dataclass
class Picture:
    """A picture, or several of one size, as the network takes them, with what is needed to give them back in kind."""

    color: torch.Tensor  # (n, 3, h, w), float32 in [-1, 1]
    alpha: torch.Tensor | None  # (n, 1, h, w), float32 in [0, 1]
    grey: bool  # one channel in, one channel out
    mode: str | None = None  # the PIL mode to give back; None for arrays and tensors
    info: dict | None = None  # ICC profile and EXIF of a PIL picture


def read_pil(image: PIL.Image.Image) -> Picture:
    """Any PIL mode; transparency of palettes becomes alpha, 16-bit greys keep their 16 bits."""
    info = {key: image.info[key] for key in ("icc_profile", "exif") if key in image.info}
    mode = image.mode
    if mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError(
                f"`image` of mode {mode!r} must hold 16-bit values, got {grey.min()}..{grey.max()}; "
                "pass a float array in [0, 1] instead."
            )
        picture = read_array(grey.astype(np.uint16))
        picture.mode, picture.info = "I;16", info
        return picture
    if mode == "P" or mode == "PA":
        mode = "RGBA" if "transparency" in image.info or mode == "PA" else "RGB"
    elif mode == "1":
        mode = "L"
    elif "transparency" in image.info and mode in ("L", "RGB"):
        mode = {"L": "LA", "RGB": "RGBA"}[mode]
    try:
        work = {"La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "L": "L", "LA": "LA", "RGBA": "RGBA"}.get(mode, "RGB")
        if mode == "F" or mode == "LAB":
            raise ValueError
        array = np.asarray(image.convert(work))
    except ValueError as error:
        raise ValueError(
            f"`image` has PIL mode {image.mode!r}, which has no defined way to RGB; convert it yourself, or pass a "
            "float array in [0, 1]."
        ) from error
    picture = read_array(array)
    picture.mode, picture.info = mode, info
    return picture


def read_array(array: np.ndarray) -> Picture:
    """uint8, uint16 or float in [0, 1]; `(h, w)` or `([n,] h, w, c)` with 1 to 4 channels (2 and 4: alpha)."""
    if array.ndim == 2:
        array = array[None, :, :, None]
    elif array.ndim == 3:
        array = array[None]
    if array.ndim != 4 or array.shape[-1] not in (1, 2, 3, 4):
        raise ValueError(
            "An array `image` must have shape (h, w), (h, w, c) or (n, h, w, c) with 1 to 4 channels, got "
            f"{array.shape}."
        )
    if array.dtype in (np.uint8, np.uint16):
        array = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif array.dtype.kind != "f":
        raise TypeError(f"An array `image` must be uint8, uint16 or float in [0, 1], got {array.dtype}.")
    return read_tensor(torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).permute(0, 3, 1, 2))


def read_tensor(tensor: torch.Tensor) -> Picture:
    """uint8 or float in [0, 1]; `(c, h, w)` or `(n, c, h, w)` with 1 to 4 channels (2 and 4: alpha)."""
    if tensor.ndim == 3:
        tensor = tensor[None]
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 2, 3, 4):
        raise ValueError(
            "A tensor `image` must have shape (c, h, w) or (n, c, h, w) with 1 to 4 channels, got "
            f"{tuple(tensor.shape)}."
        )
    if tensor.numel() == 0:
        raise ValueError(f"`image` is empty: its size is {tensor.shape[3]}x{tensor.shape[2]}.")
    if tensor.dtype == torch.uint8:
        tensor = tensor.float() / 255
    elif not tensor.is_floating_point():
        raise TypeError(f"A tensor `image` must be uint8 or float in [0, 1], got {tensor.dtype}.")
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise ValueError("`image` holds NaN or infinity.")
    low, high = float(tensor.min()), float(tensor.max())
    if low < 0 or high > 1:
        way_out = "divide by 255" if low >= 0 else "add 1 and divide by 2 if it is in [-1, 1]"
        raise ValueError(f"`image` must be in [0, 1], got {low:.4g}..{high:.4g}; {way_out}, or pass a PIL picture.")
    alpha = tensor[:, -1:] if tensor.shape[1] in (2, 4) else None
    grey = tensor.shape[1] <= 2
    color = tensor[:, :1].expand(-1, 3, -1, -1) if grey else tensor[:, :3]
    return Picture(color * 2 - 1, alpha, grey)


def read_images(image: Any) -> list[Picture]:
    """A picture or a list of pictures of any size; a list of one kind and size becomes one batch."""
    if not isinstance(image, (list, tuple)):
        image = [image]
    if not image:
        raise ValueError("`image` is an empty list.")
    pictures = []
    for item in image:
        if isinstance(item, PIL.Image.Image):
            if 0 in item.size:
                raise ValueError(f"`image` is empty: its size is {item.width}x{item.height}.")
            pictures.append(read_pil(item))
        elif isinstance(item, np.ndarray):
            pictures.append(read_array(item))
        elif isinstance(item, torch.Tensor):
            pictures.append(read_tensor(item))
        else:
            raise TypeError(
                "`image` must be a PIL picture, a numpy array, a torch tensor, or a list of these, got "
                f"{type(item).__name__}."
            )
    return pictures


def write_images(picture: Picture, color: torch.Tensor, output_type: str) -> list:
    """`color` (`(n, 3, H, W)` in [-1, 1]) as pictures of the kind that came: a list of `n`."""
    color = ((color.float() + 1) / 2).clamp(0, 1)
    if picture.grey:
        color = (color * color.new_tensor([0.299, 0.587, 0.114])[None, :, None, None]).sum(1, keepdim=True)
    if picture.alpha is not None:
        alpha = F.interpolate(picture.alpha, size=color.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        color = torch.cat([color, alpha.to(color.device)], dim=1)
    if output_type == "pt":
        return list(color)
    arrays = color.cpu().permute(0, 2, 3, 1).numpy()
    return list(arrays) if output_type == "np" else [to_pil(array, picture) for array in arrays]


def to_pil(array: np.ndarray, picture: Picture) -> PIL.Image.Image:
    """`(h, w, c)` in [0, 1] -> PIL, in the mode and with the ICC profile and EXIF of the input."""
    if picture.mode == "I;16":
        image = PIL.Image.fromarray((array[..., 0] * 65535).round().astype(np.uint16))
    else:
        levels = (array * 255).round().astype(np.uint8)
        image = PIL.Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
        if picture.mode not in (None, image.mode):
            image = image.convert(picture.mode)
    image.info.update(picture.info or {})
    return image


# Consistency with the LR: A is MATLAB's bicubic downscaling, A+ its pseudo-inverse.


@lru_cache(maxsize=8)
def downscaling_kernel(scale: int) -> tuple[torch.Tensor, int]:
    """Weights of A along one axis, and the HR position of the first relative to `scale * i` for LR pixel i.

    The cubic of Keys 1981 (a = -0.5), stretched by `scale`, centred on the LR pixel.
    """
    centre = (scale - 1) / 2
    first = math.ceil(centre - 2 * scale + 1e-9)
    offsets = torch.arange(first, math.floor(centre + 2 * scale - 1e-9) + 1, dtype=torch.float64)
    x = ((offsets - centre) / scale).abs()
    weights = torch.where(x <= 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    return weights / weights.sum(), first


@lru_cache(maxsize=8)
def normal_inverse_kernel(scale: int) -> torch.Tensor:
    """Weights of (A A^T)^-1 along one axis: A A^T is a convolution on the LR grid, inverted in the Fourier domain."""
    kernel, _ = downscaling_kernel(scale)
    period = 512
    padded = torch.zeros(period * scale, dtype=torch.float64)
    padded[: len(kernel)] = kernel
    autocorrelation = torch.fft.ifft(torch.fft.fft(padded).abs() ** 2).real[::scale]
    inverse = torch.fft.ifft(1 / torch.fft.fft(autocorrelation)).real
    radius = int((inverse[: period // 2].abs() > 1e-8 * inverse[0]).nonzero().max())
    return torch.cat([inverse[-radius:], inverse[: radius + 1]])


def mirrored(x: torch.Tensor, before: int, after: int, dim: int) -> torch.Tensor:
    """Extends an axis by its mirror image, the edge pixel included, as often as it takes."""
    size = x.shape[dim]
    index = torch.arange(-before, size + after, device=x.device) % (2 * size)
    return x.index_select(dim, torch.where(index < size, index, 2 * size - 1 - index))


def downscale(hr: torch.Tensor, scale: int) -> torch.Tensor:
    """A: `(n, c, scale * h, scale * w)` -> `(n, c, h, w)`, as MATLAB's `imresize` without rounding."""
    kernel, first = downscaling_kernel(scale)
    for dim in (2, 3):
        size = hr.shape[dim] // scale
        x = mirrored(hr, -first, first + len(kernel) - scale, dim).movedim(dim, -1)
        x = x.unfold(-1, len(kernel), scale)[..., :size, :] @ kernel.to(x)
        hr = x.movedim(-1, dim)
    return hr


def upscale_minimum_norm(lr: torch.Tensor, scale: int) -> torch.Tensor:
    """A+: `(n, c, h, w)` -> `(n, c, scale * h, scale * w)`: the smallest picture with `downscale(it) == lr`.

    A+ = A^T (A A^T)^-1, both short separable filters on the mirrored picture, so any size will do.
    """
    inverse, (kernel, first) = normal_inverse_kernel(scale), downscaling_kernel(scale)
    radius, reach = len(inverse) // 2, 3
    for dim in (2, 3):
        size = lr.shape[dim]
        x = mirrored(lr, radius + reach, radius + reach, dim).movedim(dim, -1)
        x = x.unfold(-1, len(inverse), 1) @ inverse.to(x)  # LR pixels -reach .. size + reach
        rows = x.reshape(-1, 1, x.shape[-1])
        up = F.conv_transpose1d(rows, kernel.to(x)[None, None], stride=scale)
        start = reach * scale - first
        lr = up[..., start : start + size * scale].reshape(*x.shape[:-1], size * scale).movedim(-1, dim)
    return lr


def make_consistent(hr: torch.Tensor, lr: torch.Tensor, scale: int, kind: Literal["exact", "soft"]) -> torch.Tensor:
    """Brings a picture into agreement with the LR it came from.

    "exact": the closest picture in [-1, 1] that downscales to `lr`: alternating projections onto `A hr = lr` (which is
    hr + A+ (lr - A hr); Wang et al. 2023, eq. 7) and onto the range. "soft": only what is smooth over about 8 LR
    pixels is corrected, so that colour and tone agree while noise and JPEG blocks of the LR are not copied.

    Args:
        hr (`torch.Tensor` of shape `(n, c, scale * h, scale * w)`, in [-1, 1]).
        lr (`torch.Tensor` of shape `(n, c, h, w)`, in [-1, 1]).
    """
    if kind == "soft":
        error = lr - downscale(hr, scale)
        x = torch.arange(-8, 9, device=hr.device, dtype=hr.dtype)
        gauss = torch.softmax(-(x**2) / (2 * 3.0**2), dim=0)  # std 3 LR pixels
        for dim in (2, 3):
            error = (mirrored(error, 8, 8, dim).movedim(dim, -1).unfold(-1, 17, 1) @ gauss).movedim(-1, dim)
        return hr + F.interpolate(error, scale_factor=float(scale), mode="bicubic", antialias=True)
    for _ in range(8):
        hr = (hr + upscale_minimum_norm(lr - downscale(hr, scale), scale)).clamp(-1, 1)
    return hr


# Tiles.


@dataclass
class Tile:
    """A piece of the picture in LR pixels: what the network sees, and the part of its answer that is used."""

    seen: tuple[slice, slice]
    kept: tuple[slice, slice]


def exact_tiles(height: int, width: int, side: int, halo: int, multiple: int) -> list[Tile]:
    """Tiles of `side` LR pixels that see `halo` more around them; corners on multiples of `multiple`."""
    side, halo = (math.ceil(x / multiple) * multiple for x in (side, halo))
    tiles = []
    for top in range(0, height, side):
        for left in range(0, width, side):
            kept = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            seen = tuple(
                slice(max(s.start - halo, 0), min(s.stop + halo, size)) for s, size in zip(kept, (height, width))
            )
            tiles.append(Tile(seen, kept))
    return tiles


def overlapping_starts(size: int, side: int, overlap: int) -> list[int]:
    """Starts of windows of `side` that cover `size`, each two sharing at least `overlap`."""
    if size <= side:
        return [0]
    count = math.ceil((size - overlap) / (side - overlap))
    return [round(i * (size - side) / (count - 1)) for i in range(count)]


# The pipeline.


class FlowMatchSRPipeline(DiffusionPipeline):
    r"""Upscales pictures along a learned flow from the (noisy) upsampled LR, or from noise, to the image.

    Args:
        unet ([`UNetSRModel`]): called as `unet(x_t, timestep, lr)`.
        scheduler ([`FlowMatchSREulerScheduler`]): draws the source and steps along the flow.
        data_range (`tuple[float, float]`): black and white as network and flow see them; saved with the pipeline.

    Example:

        >>> from flowsr import FlowMatchSRPipeline, bundled
        >>> pipe = FlowMatchSRPipeline.from_pretrained(bundled("x4"))
        >>> pipe(image).images[0].save("large.png")  # doctest: +SKIP
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(self, unet: ModelMixin, scheduler: SchedulerMixin, data_range: tuple[float, float] = (-1.0, 1.0)):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(data_range=tuple(data_range))

    @property
    def scale_factor(self) -> int:
        """HR pixels per LR pixel, each way."""
        return self.unet.config.scale_factor

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def check_inputs(
        self,
        pictures: list[Picture],
        num_inference_steps: int,
        sigmas: list[float] | None,
        fidelity: float,
        consistency: str | None,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        tile: int | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Refuses what cannot be done, before any work, saying what was found, what is wanted and the way out."""
        if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be a whole number from 1, got {num_inference_steps!r}.")
        if not 0 <= fidelity <= 1:
            raise ValueError(f"`fidelity` must lie in [0, 1] (0 vivid, 1 faithful), got {fidelity}.")
        if sigmas is not None and fidelity != 0:
            raise ValueError(
                "Give `sigmas` or `fidelity`, not both: `fidelity` chooses the grid that `sigmas` replaces."
            )
        if consistency not in ("exact", "soft", None):
            raise ValueError(f"`consistency` must be 'exact', 'soft' or None, got {consistency!r}.")
        if guidance_scale != 1 and not getattr(self.unet.config, "condition_dropout", 0):
            raise ValueError(
                f"`guidance_scale` is {guidance_scale}, but this network was trained without condition dropout; leave "
                "it at 1, or train with `condition_dropout`."
            )
        if num_images_per_prompt < 1:
            raise ValueError(f"`num_images_per_prompt` must be at least 1, got {num_images_per_prompt}.")
        if tile is not None and (not isinstance(tile, int) or tile < 1):
            raise ValueError(f"`tile` must be a number of LR pixels from 1, or None, got {tile!r}.")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"`output_type` must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}.")
        unknown = set(callback_on_step_end_tensor_inputs or []) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be in {self._callback_tensor_inputs}, got "
                f"{sorted(unknown)}."
            )
        count = sum(len(picture.color) for picture in pictures) * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"`generator` must hold one generator per output, got {len(generator)} for {count}.")
        if latents is not None:
            sizes = {tuple(side * self.scale_factor for side in picture.color.shape[-2:]) for picture in pictures}
            wanted = [(count, self.unet.config.in_channels, *size) for size in sizes]
            if [tuple(latents.shape)] != wanted:
                raise ValueError(
                    f"`latents` must be the initial state of every output, of shape {wanted[0]}, got "
                    f"{tuple(latents.shape)}; pictures of different sizes cannot share one."
                )
        if latents is None and self.scheduler.config.source == "prior":
            raise ValueError("This checkpoint starts from a prior's estimate; pass that as `latents`.")
        if self._execution_device.type == "cpu" and self.unet.dtype == torch.float16:
            raise ValueError(
                "float16 is thousands of times slower than float32 on a CPU; use pipe.to(torch.bfloat16) or "
                "pipe.to(torch.float32)."
            )

    @torch.no_grad()
    def __call__(
        self,
        image: PIL.Image.Image | np.ndarray | torch.Tensor | list,
        num_inference_steps: int = 4,
        sigmas: list[float] | None = None,
        fidelity: float = 0.0,
        consistency: Literal["exact", "soft"] | None = None,
        guidance_scale: float = 1.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        tile: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> ImagePipelineOutput | tuple:
        """Upscales; each output is exactly `scale_factor` times its input.

        Args:
            image: PIL picture of any mode (given back in the same mode, with alpha, ICC profile and EXIF); array `(h,
                w)`,
                `(h, w, c)` or `(n, h, w, c)` of uint8, uint16 or float in [0, 1]; tensor `(c, h, w)` or `(n, c, h, w)`
                of uint8 or float in [0, 1]; 1 to 4 channels, 2 and 4 with alpha; or a list of these. Any size from
                1x1.
            num_inference_steps (`int`): steps along the flow, one network evaluation each.
            sigmas (`list[float]`, *optional*): starts of the steps instead, falling within (0, 1].
            fidelity (`float` in [0, 1]): 0 goes all the way to a vivid sample; 1 answers at once with the most
                faithful
                picture (one evaluation whatever `num_inference_steps`); between them the flow is followed down to
                sigma = `fidelity`, and the estimate there is the answer. Values below 1 / `num_inference_steps` equal
                0.
            consistency: "exact" makes the output downscale (bicubic) to the input: for clean pictures that were
                downscaled; "soft" does so for colour and tone alone: for camera pictures and JPEGs.
            guidance_scale (`float`): classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w) on the LR.
            num_images_per_prompt (`int`): outputs per picture, next to each other.
            generator: of the source noise, also a list of one per output.
            latents (`torch.Tensor` of shape `(outputs, c, scale * h, scale * w)`, *optional*): initial state to start
                from instead of a draw, in the data range of the checkpoint.
            tile (`int`, *optional*): work in tiles of this many LR pixels, to bound the memory of the network. Where
                it has no normalisation over positions and no attention, the result is that of the whole picture; other
                networks are blended over an overlap of `tile` / 4, which is close but not the same.
            output_type: "pil"; "np" `(n, h, w, c)` or "pt" `(n, c, h, w)` in [0, 1] (a list where sizes differ);
                "latent", the final state in the data range of the checkpoint, before clamping and consistency.
            callback_on_step_end: `f(pipe, step, timestep, {"latents": ...})` after each step; may return new latents.
                `pipe._interrupt = True` within it stops there.

        Returns:
            [`~pipelines.ImagePipelineOutput`] with `images`, or the tuple `(images,)`.

        Raises:
            ValueError, TypeError: for input that cannot be right, before any work.
        """
        pictures = read_images(image)
        self.check_inputs(
            pictures, num_inference_steps, sigmas, fidelity, consistency, guidance_scale, num_images_per_prompt,
            generator, latents, tile, output_type, callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        self._guidance_scale, self._interrupt = guidance_scale, False
        self.set_sigmas(num_inference_steps, sigmas, fidelity)
        groups = group_by_size(pictures)
        self._num_timesteps = len(self.scheduler.timesteps)

        images, done = [], 0
        with self.progress_bar(total=len(groups) * self._num_timesteps) as bar:
            for group in groups:
                # 1. The LR, and the start of the flow.
                lr = torch.cat([picture.color for picture in group]).to(self._execution_device)
                lr = self.to_data_range(lr.repeat_interleave(num_images_per_prompt, dim=0))
                mine = slice(done, done + len(lr))
                done += len(lr)
                if latents is None:
                    lr_up = F.interpolate(lr, scale_factor=float(self.scale_factor), mode="bicubic", antialias=True)
                    draw = generator[mine] if isinstance(generator, list) else generator
                    x_t = self.scheduler.sample_source(lr_up, generator=draw)
                else:
                    x_t = latents[mine].to(lr)

                # 2. Along the flow.
                for step, timestep in enumerate(self.scheduler.timesteps):
                    if self._interrupt:
                        break
                    prediction = self.predict(x_t, timestep, lr, tile)
                    if guidance_scale != 1:
                        without = self.predict(x_t, timestep, lr, tile, drop_condition=True)
                        prediction = without + guidance_scale * (prediction - without)
                    x_t = self.scheduler.step(prediction, timestep, x_t, return_dict=False)[0]
                    if callback_on_step_end is not None:
                        asked = {"latents": x_t} if callback_on_step_end_tensor_inputs else {}
                        x_t = callback_on_step_end(self, step, timestep, asked).pop("latents", x_t)
                    bar.update()

                # 3. Agreement with the LR, and back into the kind of picture that came.
                if output_type == "latent":
                    images.extend(x_t)
                    continue
                x_t, lr = self.from_data_range(x_t), self.from_data_range(lr)
                if consistency is not None:
                    x_t = make_consistent(x_t, lr, self.scale_factor, consistency)
                answers = iter(x_t.split(num_images_per_prompt))
                for picture in group:
                    for number in range(len(picture.color)):
                        single = picture_at(picture, number, num_images_per_prompt)
                        images.extend(write_images(single, next(answers), output_type))

        if output_type != "pil" and len({image.shape for image in images}) == 1:
            images = np.stack(images) if output_type == "np" else torch.stack(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def set_sigmas(self, num_inference_steps: int, sigmas: list[float] | None, fidelity: float) -> None:
        """Sets the grid of the scheduler: evenly from 1 to `fidelity`, whence the last step jumps to the image."""
        if sigmas is None:
            last = max(fidelity, 1 / num_inference_steps)
            sigmas = [1.0] if last == 1 else np.linspace(1, last, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self._execution_device)

    def to_data_range(self, x: torch.Tensor) -> torch.Tensor:
        """[-1, 1] -> the data range of the checkpoint."""
        low, high = self.config.data_range
        return x if (low, high) == (-1, 1) else (x + 1) / 2 * (high - low) + low

    def from_data_range(self, x: torch.Tensor) -> torch.Tensor:
        """The data range of the checkpoint -> [-1, 1]."""
        low, high = self.config.data_range
        return x if (low, high) == (-1, 1) else (x - low) / (high - low) * 2 - 1

    def predict(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        lr: torch.Tensor,
        tile: int | None,
        drop_condition: bool = False,
    ) -> torch.Tensor:
        """The network at one state, whole or in tiles: `(n, c, H, W)` and `(n, 3, h, w)` -> `(n, c, H, W)`."""
        scale, unet = self.scale_factor, self.unet
        height, width = lr.shape[-2:]
        if tile is None or (height <= tile and width <= tile):
            return self.evaluate(x_t, timestep, lr, drop_condition)
        multiple = math.lcm(unet.size_multiple, scale) // scale
        if unet.receptive_field is not None:
            out = torch.empty_like(x_t)
            for piece in exact_tiles(height, width, tile, math.ceil(unet.receptive_field / scale), multiple):
                (top, left), (rows, columns) = piece.seen, piece.kept
                seen = tuple(slice(s.start * scale, s.stop * scale) for s in piece.seen)
                kept = tuple(slice(s.start * scale, s.stop * scale) for s in piece.kept)
                answer = self.evaluate(x_t[..., seen[0], seen[1]], timestep, lr[..., top, left], drop_condition)
                inner = tuple(slice(k.start - s.start, k.stop - s.start) for k, s in zip(kept, seen))
                out[..., kept[0], kept[1]] = answer[..., inner[0], inner[1]]
            return out
        total, weight = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
        overlap = tile // 4
        for top in overlapping_starts(height, min(tile, height), overlap):
            for left in overlapping_starts(width, min(tile, width), overlap):
                piece = slice(top, min(top + tile, height)), slice(left, min(left + tile, width))
                seen = tuple(slice(s.start * scale, s.stop * scale) for s in piece)
                answer = self.evaluate(
                    x_t[..., seen[0], seen[1]], timestep, lr[..., piece[0], piece[1]], drop_condition
                )
                rows, columns = (ramp(n, overlap * scale).to(x_t) for n in answer.shape[-2:])
                window = rows[:, None] * columns[None]
                total[..., seen[0], seen[1]] += answer * window
                weight[..., seen[0], seen[1]] += window
        return total / weight

    def evaluate(
        self, x_t: torch.Tensor, timestep: torch.Tensor, lr: torch.Tensor, drop_condition: bool
    ) -> torch.Tensor:
        """One network call; sides that do not fit are extended by their edge pixels, and cut off again."""
        scale = self.scale_factor
        multiple = math.lcm(self.unet.size_multiple, scale) // scale
        height, width = lr.shape[-2:]
        right, bottom = -width % multiple, -height % multiple
        if right or bottom:
            lr = F.pad(lr, (0, right, 0, bottom), mode="replicate")
            x_t = F.pad(x_t, (0, right * scale, 0, bottom * scale), mode="replicate")
        drop = torch.ones(len(lr), dtype=torch.bool, device=lr.device) if drop_condition else None
        answer = self.unet(x_t, timestep, lr, drop_condition=drop, return_dict=False)[0]
        return answer[..., : height * scale, : width * scale]

    # Sharing: a saved folder holds the code of its classes, so that it loads where flowsr is not installed, by
    # `DiffusionPipeline.from_pretrained(folder_or_repo, trust_remote_code=True)`; flowsr itself uses its own classes.

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes model_index.json in the form of remote code, and the sources. `save_pretrained` calls this last."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = os.path.join(save_directory, self.config_name)
        with open(path) as file:
            index = json.load(file)
        index.pop("_name_or_path", None)  # a local path
        index["_class_name"] = ["pipeline", type(self).__name__]
        shutil.copyfile(inspect.getsourcefile(type(self)), os.path.join(save_directory, "pipeline.py"))
        for name, component in self.components.items():
            cls = type(component)
            if component is None or cls.__module__.split(".")[0] in ("diffusers", "transformers"):
                continue
            stem = cls.__module__.split(".")[-1]
            index[name] = [stem, cls.__name__]
            shutil.copyfile(inspect.getsourcefile(cls), os.path.join(save_directory, name, f"{stem}.py"))
        with open(path, "w") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        if cls.__module__.startswith("flowsr.") and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]  # the installed class is at hand
        return config

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """The config, with the names of installed modules in place of those of remote code."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if cls.__module__.startswith("flowsr."):
            ours = ("flowsr.models.", "flowsr.schedulers.")
            installed = {module.rpartition(".")[2]: module for module in list(sys.modules) if module.startswith(ours)}
            for name, value in config.items():
                if not name.startswith("_") and isinstance(value, (list, tuple)) and value[0] in installed:
                    config[name] = [installed[value[0]], value[1]]
        return loaded

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """Completes the model card: the last step before an upload, by `push_to_hub` or `save_pretrained`."""
        path = os.path.join(working_dir, "README.md")
        card = ModelCard.load(path) if os.path.isfile(path) else ModelCard("---\n---\n")
        card.data.library_name, card.data.pipeline_tag = "diffusers", "image-to-image"
        card.data.tags = sorted({*(card.data.tags or []), "diffusers", "super-resolution", "flow-matching"})
        if "trust_remote_code" not in card.text:
            card.text += (
                f"\n# {repo_id}\n\nx{self.scale_factor} super-resolution by flow matching.\n\n```python\n"
                "from diffusers import DiffusionPipeline\n\n"
                f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)\n'
                "large = pipe(image).images[0]\n```\n\nWith flowsr installed, "
                f'`{type(self).__name__}.from_pretrained("{repo_id}")` needs no `trust_remote_code`.\n'
            )
        card.save(path)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)


def group_by_size(pictures: list[Picture]) -> list[list[Picture]]:
    """All in one batch where all have one size; else each for itself."""
    if len({picture.color.shape[-2:] for picture in pictures}) == 1:
        return [pictures]
    return [[picture] for picture in pictures]


def picture_at(picture: Picture, number: int, copies: int) -> Picture:
    """One picture of a batch, for `copies` outputs."""
    alpha = None if picture.alpha is None else picture.alpha[number : number + 1].expand(copies, -1, -1, -1)
    return Picture(picture.color[number : number + 1], alpha, picture.grey, picture.mode, picture.info)


def ramp(size: int, overlap: int) -> torch.Tensor:
    """Blending weights that rise over `overlap` pixels at each end and never reach 0."""
    x = torch.arange(size, dtype=torch.float32) + 0.5
    return (torch.minimum(x, size - x) / max(overlap, 1)).clamp(max=1)
