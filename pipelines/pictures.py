"""Pictures of any kind to tensors and back: mode, alpha, profile and 16 bits go out as they came in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F


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


def group_by_size(pictures: list[Picture]) -> list[list[Picture]]:
    """All in one batch where all have one size; else each for itself."""
    if len({picture.color.shape[-2:] for picture in pictures}) == 1:
        return [pictures]
    return [[picture] for picture in pictures]


def write_group(group: list[Picture], color: torch.Tensor, copies: int, output_type: str) -> list:
    """All pictures of a group, `copies` outputs of each next to each other, from `color` (`(outputs, 3, H, W)`)."""
    images, answers = [], iter(color.split(copies))
    for picture in group:
        for number in range(len(picture.color)):
            alpha = picture.alpha
            if alpha is not None:
                alpha = alpha[number : number + 1].expand(copies, -1, -1, -1)
            images += write_images(replace(picture, alpha=alpha), next(answers), output_type)
    return images


def stack_if_equal(images: list, output_type: str) -> list | np.ndarray | torch.Tensor:
    """Arrays and tensors of one size as one; PIL pictures, and sizes that differ, as a list."""
    if output_type == "pil" or len({image.shape for image in images}) > 1:
        return images
    return np.stack(images) if output_type == "np" else torch.stack(images)
