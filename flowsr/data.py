"""Training pictures through HF datasets, and the stream of aligned (hr, lr) crops made from them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from flowsr.degradations import cut_to_multiple, downscale


def load_images(train_data_dir: list[str] | None, dataset_name: str | None):
    """Pictures of image folders (or zips of them), or of a data set on the Hub, as one `datasets.Dataset`.

    Returns:
        `datasets.Dataset` with the column `image`.

    Raises:
        FileNotFoundError: if a folder does not exist or holds no picture.
        ValueError: if not exactly one source is given, or a data set has no column `image`.
    """
    import datasets

    if bool(train_data_dir) == bool(dataset_name):
        raise ValueError("Give either `train_data_dir` (folders or zips of pictures) or `dataset_name` (on the Hub).")
    if dataset_name:
        sets = [datasets.load_dataset(dataset_name, split="train")]
    else:
        sets = []
        for place in map(Path, train_data_dir):
            if not place.exists():
                raise FileNotFoundError(f"`train_data_dir`: there is no {place}.")
            where = {"data_dir": str(place)} if place.is_dir() else {"data_files": {"train": str(place)}}
            try:
                sets.append(datasets.load_dataset("imagefolder", split="train", drop_labels=True, **where))
            except (datasets.exceptions.DatasetGenerationError, FileNotFoundError) as error:
                raise FileNotFoundError(f"`train_data_dir`: no readable picture in {place} ({error}).") from error
    for found in sets:
        if "image" not in found.column_names:
            raise ValueError(f"The data set needs a column `image`, found {found.column_names}.")
    return datasets.concatenate_datasets([found.select_columns("image") for found in sets])


class CropDataset(Dataset):
    """The training stream: crop number `index` is a function of (seed, index) alone.

    Each pass over the pictures is a new permutation; each visit takes one random crop, flipped and turned by one of
    the eight symmetries of the square. The LR comes from the whole picture, so crops have no edges of their own. A
    stream that begins at `start` continues one that ended there, to the bit.

    Args:
        images (`datasets.Dataset`): pictures in the column `image`.
        resolution (`int`): side of a crop in HR pixels, a multiple of `scale`.
        scale (`int`): HR pixels per LR pixel.
        seed, start, length (`int`): which stream, its first crop and its number of crops.
        cache_gib (`float`): how much decoded data is kept in memory, in GiB.
    """

    def __init__(self, images, resolution: int, scale: int, seed: int, start: int, length: int, cache_gib: float):
        self.images, self.resolution, self.scale = images, resolution, scale
        self.seed, self.start, self.length = seed, start, length
        self.cache_left = int(cache_gib * 2**30)
        self.cache: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, offset: int) -> dict[str, torch.Tensor]:
        index = self.start + offset
        epoch, position = divmod(index, len(self.images))
        picture = int(order_of_pictures(self.seed, epoch, len(self.images))[position])
        hr, lr = self.pair(picture)
        random = np.random.default_rng([self.seed, 1, index])
        side = self.resolution // self.scale
        top = int(random.integers(lr.shape[0] - side + 1))
        left = int(random.integers(lr.shape[1] - side + 1))
        symmetry = int(random.integers(8))
        s = self.scale
        hr = hr[top * s : (top + side) * s, left * s : (left + side) * s]
        lr = lr[top : top + side, left : left + side]
        return {
            "hr": to_tensor(turn(hr, symmetry)),  # (3, resolution, resolution), [-1, 1]
            "lr": to_tensor(turn(lr, symmetry)),  # (3, resolution / scale, resolution / scale), [-1, 1]
            "index": torch.tensor(index),
        }

    def pair(self, picture: int) -> tuple[np.ndarray, np.ndarray]:
        """A picture, cut to a multiple of the scale, and its LR; uint8 of shape `(h, w, 3)`."""
        if picture in self.cache:
            return self.cache[picture]
        hr = cut_to_multiple(np.asarray(self.images[picture]["image"].convert("RGB")), self.scale)
        pair = hr, downscale(hr, self.scale)
        size = sum(array.nbytes for array in pair)
        if size <= self.cache_left:
            self.cache_left -= size
            self.cache[picture] = pair
        return pair


@lru_cache(maxsize=2)
def order_of_pictures(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation in which a pass visits the pictures; kept, as every crop of the pass asks for it."""
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def turn(image: np.ndarray, symmetry: int) -> np.ndarray:
    """One of the eight symmetries of the square: quarter turns, then a mirror for 4..7."""
    turned = np.rot90(image, symmetry % 4)
    return turned[:, ::-1] if symmetry >= 4 else turned


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """uint8 `(h, w, c)` -> float32 `(c, h, w)` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 127.5 - 1


def smaller_than(images, resolution: int) -> list[str]:
    """Names (or numbers) of the pictures whose shorter side is below `resolution` pixels; reads headers only."""
    import datasets

    small = []
    undecoded = images.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(undecoded):
        with open_undecoded(row["image"]) as picture:
            if min(picture.size) < resolution:
                small.append(f"{row['image']['path'] or number} ({picture.width}x{picture.height})")
    return small


def open_undecoded(row: dict):
    """Opens an undecoded picture of HF datasets (bytes, or a path that may lie in a zip)."""
    import io

    from datasets.utils.file_utils import xopen
    from PIL import Image

    if row["bytes"] is not None:
        return Image.open(io.BytesIO(row["bytes"]))
    return Image.open(xopen(row["path"], "rb"))
