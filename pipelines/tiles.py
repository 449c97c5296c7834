"""One network evaluation of a picture of any size: padded to what the network takes, whole or in tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .conventions import cache_context


def predict(
    unet: torch.nn.Module,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    lr: torch.Tensor,
    tile: int | None = None,
    guidance_scale: float = 1.0,
    conditions: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The network at one state, with classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w).

    Args:
        unet: called as `unet(x_t, timestep, lr)`; knows `config.scale_factor`, `size_multiple` and `receptive_field`.
        x_t (`torch.Tensor` of shape `(n, c, scale * h, scale * w)`), lr (`(n, 3, h, w)`).
        tile (`int`, *optional*): side of a tile in LR pixels; `None` for the whole picture at once.
        conditions (`dict`, *optional*): what the network is told of the whole picture, the same for each tile: context
            tokens `encoder_hidden_states`, `class_labels`. Guidance leads away from the network without the LR's
            features and, where there are class labels, without a class.
    """
    options = dict(conditions or {})
    prediction = predict_in_tiles(unet, x_t, timestep, lr, tile, options)
    if guidance_scale == 1:
        return prediction
    options["drop_condition"] = torch.ones(len(lr), dtype=torch.bool, device=lr.device)
    if "class_labels" in options:
        options["class_labels"] = torch.full_like(options["class_labels"], unet.config.num_class_embeds)
    without = predict_in_tiles(unet, x_t, timestep, lr, tile, options)
    return without + guidance_scale * (prediction - without)


def predict_in_tiles(
    unet: torch.nn.Module,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    lr: torch.Tensor,
    tile: int | None,
    options: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The network at one state; `options` go to every call of it.

    Where `unet.receptive_field` is a number, each tile sees that much around it, and the result is that of the whole
    picture. Where it is `None` (normalisation over positions, attention), tiles overlap by a quarter and are blended:
    close to the whole picture, but not the same.
    """
    scale = unet.config.scale_factor
    multiple = math.lcm(unet.size_multiple, scale) // scale  # LR pixels
    height, width = lr.shape[-2:]
    if tile is None or (height <= tile and width <= tile):
        return evaluate(unet, x_t, timestep, lr, multiple, options)

    exact = unet.receptive_field is not None
    if exact:
        tiles = exact_tiles(height, width, tile, math.ceil(unet.receptive_field / scale), multiple)
    else:
        tiles = overlapping_tiles(height, width, tile, tile // 4)
    total, weight = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
    for piece in tiles:
        seen, kept = enlarged(piece.seen, scale), enlarged(piece.kept, scale)
        answer = evaluate(unet, x_t[(..., *seen)], timestep, lr[(..., *piece.seen)], multiple, options)
        inner = tuple(slice(k.start - s.start, k.stop - s.start) for k, s in zip(kept, seen))
        answer = answer[(..., *inner)]
        overlap = 0 if exact else tile // 4 * scale
        rows, columns = (ramp(length, overlap).to(x_t) for length in answer.shape[-2:])
        window = rows[:, None] * columns
        total[(..., *kept)] += answer * window
        weight[(..., *kept)] += window
    return total / weight


def evaluate(
    unet: torch.nn.Module,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    lr: torch.Tensor,
    multiple: int,
    options: dict[str, torch.Tensor],
) -> torch.Tensor:
    """One network call; LR sides that are no multiple of `multiple` are extended by their edge, and cut off again."""
    scale = unet.config.scale_factor
    height, width = lr.shape[-2:]
    right, bottom = -width % multiple, -height % multiple
    padded, one = (height + bottom, width + right), unet.size_multiple // scale
    if unet.receptive_field is None and padded in ((1, 1), (one, one)):
        right += multiple  # a norm over positions needs more than one, on the LR grid and at the deepest level
    if right or bottom:
        lr = F.pad(lr, (0, right, 0, bottom), mode="replicate")
        x_t = F.pad(x_t, (0, right * scale, 0, bottom * scale), mode="replicate")
    with cache_context(unet):
        answer = unet(x_t, timestep, lr, return_dict=False, **options)[0]
    return answer[..., : height * scale, : width * scale]


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


def overlapping_tiles(height: int, width: int, side: int, overlap: int) -> list[Tile]:
    """Tiles of `side` LR pixels that cover the picture, neighbours sharing at least `overlap`."""
    tiles = []
    for top in overlapping_starts(height, side, overlap):
        for left in overlapping_starts(width, side, overlap):
            piece = slice(top, min(top + side, height)), slice(left, min(left + side, width))
            tiles.append(Tile(piece, piece))
    return tiles


def overlapping_starts(size: int, side: int, overlap: int) -> list[int]:
    """Starts of windows of `side` that cover `size`, each two sharing at least `overlap`."""
    if size <= side:
        return [0]
    count = math.ceil((size - overlap) / (side - overlap))
    return [round(i * (size - side) / (count - 1)) for i in range(count)]


def ramp(size: int, overlap: int) -> torch.Tensor:
    """Blending weights that rise over `overlap` pixels at each end and never reach 0; all 1 without overlap."""
    x = torch.arange(size, dtype=torch.float32) + 0.5
    return (torch.minimum(x, size - x) / max(overlap, 0.5)).clamp(max=1)


def enlarged(slices: tuple[slice, slice], scale: int) -> tuple[slice, slice]:
    """LR slices in HR pixels."""
    return tuple(slice(s.start * scale, s.stop * scale) for s in slices)
