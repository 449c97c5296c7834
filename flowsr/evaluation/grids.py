"""Pictures side by side, to be looked at."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from flowsr.evaluation.pairs import Pair

GRID_SIDE = 256  # HR pixels shown of each picture
TILE = 256  # LR pixels: bounds the memory


def upscale_pair(pipe: DiffusionPipeline, pair: Pair, steps: int, seed: int) -> np.ndarray:
    """What a pipeline makes of the LR of a pair; uint8."""
    options = {} if pair.label is None else {"class_labels": pair.label}
    generator = torch.Generator(pipe.device).manual_seed(seed)
    answer = pipe(Image.fromarray(pair.lr), num_inference_steps=steps, generator=generator, tile=TILE, **options)
    return np.asarray(answer.images[0])


def bicubic_row(pair: Pair, results: list[np.ndarray]) -> list[np.ndarray]:
    """`bicubic | each of the results | HR`."""
    bicubic = Image.fromarray(pair.lr).resize(pair.hr.shape[1::-1], Image.BICUBIC)
    return corners([np.asarray(bicubic), *results, pair.hr])


def coupling_row(pipe: DiffusionPipeline, pair: Pair, result: np.ndarray, seed: int) -> list[np.ndarray]:
    """`LR | source | result | HR`: where the flow starts by this seed, and where it ends."""
    generator = torch.Generator(pipe.device).manual_seed(seed)
    lr = torch.from_numpy(pair.lr.copy()).permute(2, 0, 1)[None].to(pipe.device) / 127.5 - 1
    source = pipe.from_data_range(pipe.prepare_source(lr, generator))[0]
    source = ((source + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
    nearest = pair.lr.repeat(pipe.scale_factor, axis=0).repeat(pipe.scale_factor, axis=1)
    return corners([nearest, source, result, pair.hr])


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
