"""The network on images of any size: padded to what it takes, whole or in tiles, with guidance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F

Area = tuple[slice, slice]  # rows and columns


def predict(
    unet: torch.nn.Module,
    x_t: torch.Tensor,
    timestep: torch.Tensor,
    conditions: dict,
    tile: int | None = None,
    guidance_scale: float = 1.0,
) -> torch.Tensor:
    """The network at one state, with classifier-free guidance (Ho and Salimans 2022, eq. 6, as 1 + w).

    Guidance leads away from the network without the LR's features and, where there are class labels, without a class.

    Args:
        unet: called as `unet(x_t, timestep, **conditions)`; where it takes an LR, it knows `config.scale_factor`,
            `size_multiple` and `receptive_field`.
        x_t (`torch.Tensor` of shape `(n, c, H, W)`).
        conditions (`dict`): `lr` `(n, 3, H / scale, W / scale)` and its `encoding`, which are cut into tiles; and what
            holds for the whole image, the same for each tile: `encoder_hidden_states`, `class_labels`.
        tile (`int`, *optional*): side of a tile in LR pixels; `None` for the whole image at once.
    """
    prediction = predict_in_tiles(unet, x_t, timestep, conditions, tile)
    if guidance_scale == 1:
        return prediction
    dropped = dict(conditions)
    if "lr" in conditions:
        dropped["drop_condition"] = torch.ones(len(x_t), dtype=torch.bool, device=x_t.device)
    if "class_labels" in conditions:
        dropped["class_labels"] = torch.full_like(conditions["class_labels"], unet.config.num_class_embeds)
    without = predict_in_tiles(unet, x_t, timestep, dropped, tile)
    return without + guidance_scale * (prediction - without)


def predict_in_tiles(
    unet: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, conditions: dict, tile: int | None
) -> torch.Tensor:
    """The network at one state, without guidance.

    Where `unet.receptive_field` is a number, each tile sees that much around it, and the result is that of the whole
    image. Where it is `None` (normalisation over positions, attention), tiles overlap by a quarter and are blended:
    close to the whole image, but not the same.
    """
    if "lr" not in conditions:
        return evaluate(unet, x_t, timestep, conditions)
    lr, encoding, scale = conditions["lr"], conditions.get("encoding"), unet.config.scale_factor
    field = unet.receptive_field if encoding is None else unet.head_receptive_field
    if tile is None or max(lr.shape[-2:]) <= tile:
        return evaluate(unet, x_t, timestep, conditions)
    overlap = tile // 4 if field is None else 0
    total, weight = torch.zeros_like(x_t), torch.zeros_like(x_t[:1, :1])
    for seen, kept in tiles(lr, tile, field, unet):
        local = {"lr": lr[(..., *seen)]}
        if encoding is not None:
            local["encoding"] = encoding._replace(
                features=encoding.features[(..., *seen)], mean=encoding.mean[(..., *enlarged(seen, scale))]
            )
        answer = evaluate(unet, x_t[(..., *enlarged(seen, scale))], timestep, conditions | local)
        answer = answer[(..., *enlarged(within(kept, seen), scale))]
        rows, columns = (ramp(length, overlap * scale).to(x_t) for length in answer.shape[-2:])
        total[(..., *enlarged(kept, scale))] += answer * (rows[:, None] * columns)
        weight[(..., *enlarged(kept, scale))] += rows[:, None] * columns
    return total / weight


def evaluate(unet: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> torch.Tensor:
    """One network call; an LR whose sides do not fit the network is extended by its edge, and the answer cut again."""
    conditions, (height, width) = dict(conditions), x_t.shape[-2:]
    if "lr" in conditions:
        lr, scale, multiple = conditions["lr"], unet.config.scale_factor, lr_multiple(unet)
        right, bottom = -lr.shape[-1] % multiple, -lr.shape[-2] % multiple
        padded, one = (lr.shape[-2] + bottom, lr.shape[-1] + right), unet.size_multiple // scale
        if unet.receptive_field is None and padded in ((1, 1), (one, one)):
            right += multiple  # a norm over positions needs more than one, on the LR grid and at the deepest level
        if right or bottom:
            conditions["lr"] = F.pad(lr, (0, right, 0, bottom), mode="replicate")
            x_t = F.pad(x_t, (0, right * scale, 0, bottom * scale), mode="replicate")
    with cache_context(unet):
        return unet(x_t, timestep, **conditions, return_dict=False)[0][..., :height, :width]


def encode(unet: torch.nn.Module, lr: torch.Tensor, tile: int | None = None) -> NamedTuple:
    """The encoding of an LR `(n, 3, h, w)` by a network that has an encoder, whole or in tiles: the same."""
    if tile is None or max(lr.shape[-2:]) <= tile:
        return unet.encode(lr)
    scale, whole = unet.config.scale_factor, None
    for seen, kept in tiles(lr, tile, unet.encoder_receptive_field, unet):
        part, inner = unet.encode(lr[(..., *seen)]), within(kept, seen)
        if whole is None:
            (n, c), (h, w) = part.features.shape[:2], lr.shape[-2:]
            mean = part.mean.new_empty(n, part.mean.shape[1], h * scale, w * scale)
            whole = part._replace(features=part.features.new_empty(n, c, h, w), mean=mean)
        whole.features[(..., *kept)] = part.features[(..., *inner)]
        whole.mean[(..., *enlarged(kept, scale))] = part.mean[(..., *enlarged(inner, scale))]
    return whole


def cache_context(unet: torch.nn.Module) -> AbstractContextManager:
    """What caches that keep one state for each kind of evaluation need around it."""
    return unet.cache_context("cond") if getattr(unet, "is_cache_enabled", False) else nullcontext()


def lr_multiple(unet: torch.nn.Module) -> int:
    """LR pixels of which the sides of an LR must be multiples."""
    return math.lcm(unet.size_multiple, unet.config.scale_factor) // unet.config.scale_factor


def tiles(lr: torch.Tensor, side: int, field: int | None, unet: torch.nn.Module) -> Iterator[tuple[Area, Area]]:
    """What the network sees of an LR in each tile, and the part of its answer that is used, in LR pixels.

    Args:
        side (`int`): of a tile, in LR pixels.
        field (`int`, *optional*): HR pixels to be seen around a tile; `None` for overlapping tiles.
    """
    if field is None:
        axes = [overlapping_spans(size, side, side // 4) for size in lr.shape[-2:]]
    else:
        multiple = lr_multiple(unet)
        side, halo = (math.ceil(x / multiple) * multiple for x in (side, field / unet.config.scale_factor))
        axes = [exact_spans(size, side, halo) for size in lr.shape[-2:]]
    for (seen_rows, kept_rows), (seen_columns, kept_columns) in product(*axes):
        yield (seen_rows, seen_columns), (kept_rows, kept_columns)


def exact_spans(size: int, side: int, halo: int) -> list[tuple[slice, slice]]:
    """Spans of `side` that cover `size`, each with `halo` more around it as far as there is, and without."""
    kept = [slice(start, min(start + side, size)) for start in range(0, size, side)]
    return [(slice(max(k.start - halo, 0), min(k.stop + halo, size)), k) for k in kept]


def overlapping_spans(size: int, side: int, overlap: int) -> list[tuple[slice, slice]]:
    """Spans of `side` that cover `size`, each two sharing at least `overlap`; all that is seen is used."""
    if size <= side:
        return [(slice(0, size), slice(0, size))]
    count = math.ceil((size - overlap) / (side - overlap))
    starts = [round(i * (size - side) / (count - 1)) for i in range(count)]
    return [(slice(start, start + side), slice(start, start + side)) for start in starts]


def ramp(size: int, overlap: int) -> torch.Tensor:
    """Blending weights that rise over `overlap` pixels at each end and never reach 0; all 1 without overlap."""
    x = torch.arange(size, dtype=torch.float32) + 0.5
    return (torch.minimum(x, size - x) / max(overlap, 0.5)).clamp(max=1)


def within(inner: Area, outer: Area) -> Area:
    """An area as seen from the corner of another that holds it."""
    return tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer))


def enlarged(area: Area, scale: int) -> Area:
    """LR pixels in HR pixels."""
    return tuple(slice(s.start * scale, s.stop * scale) for s in area)
