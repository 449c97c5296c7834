"""Images of any kind to tensors and back: mode, alpha, profile and 16 bits go out as they came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from .output_size import resize

BATCH_PIXELS = 2**20  # LR pixels of the outputs of a batch, at most: they bound its memory


@dataclass
class InputImage:
    """An image as the network takes it, with what is needed to give it back in kind."""

    color: torch.Tensor  # (1, 3, h, w), float32 in [-1, 1]
    alpha: torch.Tensor | None  # (1, 1, h, w), float32 in [0, 1]
    grey: bool  # one channel in, one channel out
    mode: str | None = None  # the PIL mode to give back; None for arrays and tensors
    info: dict | None = None  # ICC profile and EXIF of a PIL image


def read_pil(image: PIL.Image.Image) -> InputImage:
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
        (read,) = read_array(grey.astype(np.uint16))
        read.mode, read.info = "I;16", info
        return read
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
    (read,) = read_array(array)
    read.mode, read.info = mode, info
    return read


def read_array(array: np.ndarray) -> list[InputImage]:
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


def read_tensor(tensor: torch.Tensor) -> list[InputImage]:
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
        raise ValueError(f"`image` must be in [0, 1], got {low:.4g}..{high:.4g}; {way_out}, or pass a PIL image.")
    alphas = tensor[:, -1:].split(1) if tensor.shape[1] in (2, 4) else [None] * len(tensor)
    grey = tensor.shape[1] <= 2
    color = tensor[:, :1].expand(-1, 3, -1, -1) if grey else tensor[:, :3]
    return [InputImage(c, alpha, grey) for c, alpha in zip((color * 2 - 1).split(1), alphas)]


def read_images(image: Any) -> list[InputImage]:
    """An image, several in one array or tensor, or a list of these, of any size."""
    if not isinstance(image, (list, tuple)):
        image = [image]
    if not image:
        raise ValueError("`image` is an empty list.")
    images = []
    for item in image:
        if isinstance(item, PIL.Image.Image):
            if 0 in item.size:
                raise ValueError(f"`image` is empty: its size is {item.width}x{item.height}.")
            images.append(read_pil(item))
        elif isinstance(item, np.ndarray):
            images += read_array(item)
        elif isinstance(item, torch.Tensor):
            images += read_tensor(item)
        else:
            raise TypeError(
                "`image` must be a PIL image, a numpy array, a torch tensor, or a list of these, got "
                f"{type(item).__name__}."
            )
    return images


@dataclass
class Batch:
    """Input images of one size, and where they and their outputs stand among all of a call."""

    images: list[InputImage]
    inputs: slice
    outputs: slice

    def lr(self, device: torch.device) -> torch.Tensor:
        """`(n, 3, h, w)`, float32 in [-1, 1]."""
        return torch.cat([image.color for image in self.images]).to(device)


def batches(images: list[InputImage], copies: int) -> list[Batch]:
    """Neighbours of one size, as many as their `copies` outputs each keep within `BATCH_PIXELS`; the order stays."""
    groups = []
    for image in images:
        size = image.color.shape[-2:]
        room = BATCH_PIXELS // (size.numel() * copies)
        if groups and groups[-1][0].color.shape[-2:] == size and len(groups[-1]) < room:
            groups[-1].append(image)
        else:
            groups.append([image])
    ends = np.cumsum([0, *map(len, groups)]).tolist()
    spans = zip(groups, ends, ends[1:])
    return [Batch(group, slice(i, j), slice(i * copies, j * copies)) for group, i, j in spans]


def write_images(
    pixels: torch.Tensor, output_type: str, image: InputImage | None = None, size: tuple[int, int] | None = None
) -> list:
    """`n` outputs as `output_type` has it, and in the kind of an input image where there is one.

    Args:
        pixels (`torch.Tensor` of shape `(n, c, H, W)`): 0 is black and 1 is white; clamped.
        size (`tuple[int, int]`, *optional*): height and width to be resized to, alpha too.
    """
    pixels = pixels.clamp(0, 1)
    if image is not None and image.grey:
        pixels = (pixels * pixels.new_tensor([0.299, 0.587, 0.114])[None, :, None, None]).sum(1, keepdim=True)
    if image is not None and image.alpha is not None:
        alpha = F.interpolate(image.alpha, size=pixels.shape[-2:], mode="bicubic", antialias=True).clamp(0, 1)
        pixels = torch.cat([pixels, alpha.to(pixels.device).expand(len(pixels), -1, -1, -1)], dim=1)
    if size is not None:
        pixels = resize(pixels, size)
    if output_type == "pt":
        return list(pixels)
    arrays = list(pixels.cpu().permute(0, 2, 3, 1).numpy())
    if output_type == "np":
        return arrays
    mode, info = (image.mode, image.info) if image is not None else (None, None)
    return [to_pil(array, mode, info) for array in arrays]


def to_pil(array: np.ndarray, mode: str | None, info: dict | None) -> PIL.Image.Image:
    """`(h, w, c)` in [0, 1] -> PIL, in the mode and with the ICC profile and EXIF of the input."""
    if mode == "I;16":
        image = PIL.Image.fromarray((array[..., 0] * 65535).round().astype(np.uint16))
    else:
        levels = (array * 255).round().astype(np.uint8)
        image = PIL.Image.fromarray(levels.squeeze(-1) if levels.shape[-1] == 1 else levels)
        if mode not in (None, image.mode):
            image = image.convert(mode)
    image.info.update(info or {})
    return image


def stack_if_equal(images: list, output_type: str) -> list | np.ndarray | torch.Tensor:
    """Arrays and tensors of one size as one; PIL images, and sizes that differ, as a list."""
    if output_type == "pil" or len({image.shape for image in images}) > 1:
        return images
    return np.stack(images) if output_type == "np" else torch.stack(images)
