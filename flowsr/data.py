"""Training pictures through HF datasets, and the stream of aligned (hr, lr) crops made from them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from flowsr.degradations import cut_to_multiple, degrade, downscale

DIV2K = "http://data.vision.ee.ethz.ch/cvl/DIV2K/"  # Agustsson and Timofte 2017
KNOWN = {"DIV2K": DIV2K + "DIV2K_train_HR.zip", "DIV2K_valid": DIV2K + "DIV2K_valid_HR.zip"}
SHUFFLE_BUFFER = 1000  # pictures of a stream among which chance picks the next


def load_images(
    train_data_dir: list[str] | None, dataset_name: str | None, labels: bool = False, streaming: bool = False
):
    """Pictures of folders (or zips of them), or of a named data set, as one data set of HF datasets.

    Args:
        train_data_dir (`list[str]`): folders or zips.
        dataset_name (`str`): "DIV2K" or "DIV2K_valid", the official zips; or the URL of a zip; or a data set on the
            Hub (or in a local folder) with a column `image`.
        labels (`bool`): keep the column `label`; in folders and zips it is the name of the folder of each picture.
        streaming (`bool`): read from the start to the end instead of by number; nothing is stored.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` for `streaming`, with the column `image` (and `label`).

    Raises:
        FileNotFoundError: if a folder does not exist or holds no picture.
        ValueError: if not exactly one source is given, or a data set has no column `image`, or no `label` if asked.
    """
    import datasets

    if bool(train_data_dir) == bool(dataset_name):
        raise ValueError(
            "Give either `train_data_dir` (folders or zips of pictures) or `dataset_name` (DIV2K, the URL of a zip, "
            f"or a data set on the Hub); got {train_data_dir!r} and {dataset_name!r}."
        )
    options = {"split": "train", "streaming": streaming}
    if dataset_name:
        url = KNOWN.get(dataset_name, dataset_name)
        if "://" in url:
            options |= {"path": "imagefolder", "data_files": {"train": url}, "drop_labels": not labels}
        else:
            options |= {"path": dataset_name}
        sets = [datasets.load_dataset(**options)]
    else:
        sets = []
        for place in map(Path, train_data_dir):
            if not place.exists():
                raise FileNotFoundError(f"`train_data_dir`: there is no {place}.")
            where = {"data_dir": str(place)} if place.is_dir() else {"data_files": {"train": str(place)}}
            try:
                found = datasets.load_dataset("imagefolder", drop_labels=not labels, **where, **options)
            except (datasets.exceptions.DatasetGenerationError, FileNotFoundError) as error:
                raise FileNotFoundError(f"`train_data_dir`: no readable picture in {place} ({error}).") from error
            sets.append(found)
    columns = ["image", "label"] if labels else ["image"]
    for found in sets:
        missing = [column for column in columns if column not in (found.column_names or [])]
        if missing:
            raise ValueError(f"The data set needs the columns {columns}, found {found.column_names}.")
    return datasets.concatenate_datasets([found.select_columns(columns) for found in sets])


@dataclass(frozen=True)
class Cropping:
    """How a crop is cut from a picture: all that chance decides is a function of (seed, number of the crop).

    Attributes:
        resolution (`int`): side of a crop in HR pixels, a multiple of `scale`.
        scale (`int`): HR pixels per LR pixel; 1 makes no LR.
        seed (`int`): which stream.
        channels (1 or 3): grey or RGB.
        degradation: "bicubic" makes the LR from the whole picture, so that crops have no edges of their own; the
            random chains of [`degrade`] make it from the crop.
        augmentation: "turns" for the eight symmetries of the square, "flip" for left and right, "none".
        center_crop (`bool`): the middle of the picture instead of a random place.
        resize_to (`int`, *optional*): pictures are first resized so that the shorter side has this many pixels.
    """

    resolution: int
    scale: int
    seed: int = 0
    channels: int = 3
    degradation: str = "bicubic"
    augmentation: str = "turns"
    center_crop: bool = False
    resize_to: int | None = None

    def pair(self, picture: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
        """A picture cut to a multiple of the scale, and its bicubic LR where it is used; uint8 `(h, w, c)`."""
        picture = picture.convert("RGB" if self.channels == 3 else "L")
        if self.resize_to is not None:
            factor = self.resize_to / min(picture.size)
            picture = picture.resize([round(side * factor) for side in picture.size], Image.BICUBIC)
        hr = cut_to_multiple(np.atleast_3d(np.asarray(picture)), self.scale)
        return hr, downscale(hr, self.scale) if self.scale > 1 and self.degradation == "bicubic" else None

    def crop(
        self, hr: np.ndarray, lr: np.ndarray | None, index: int, label: int | None, answer: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        """Crop number `index`: `hr` (c, resolution, resolution) and `lr` (c, resolution / scale, ...) in [-1, 1].

        Where a teacher's `answer` is given, which lies on the grid of `hr`, the crop has it as `teacher`.
        """
        random = np.random.default_rng([self.seed, 1, index])
        s, side = self.scale, self.resolution // self.scale
        rows, columns = hr.shape[0] // s - side + 1, hr.shape[1] // s - side + 1  # places on the LR grid
        place = int(random.integers(rows)), int(random.integers(columns))
        top, left = ((rows - 1) // 2, (columns - 1) // 2) if self.center_crop else place
        symmetry = int(random.integers(8))
        symmetry = {"turns": symmetry, "flip": 4 * (symmetry % 2), "none": 0}[self.augmentation]
        place = slice(top * s, (top + side) * s), slice(left * s, (left + side) * s)
        hr = hr[place]
        example = {"index": torch.tensor(index)}
        if answer is not None:
            example["teacher"] = to_tensor(turn(answer[place], symmetry))
        if s > 1:
            lr = degrade(hr, s, self.degradation, random) if lr is None else lr[top : top + side, left : left + side]
            example["lr"] = to_tensor(turn(lr, symmetry))
        if label is not None:
            example["label"] = torch.tensor(label)
        return {"hr": to_tensor(turn(hr, symmetry)), **example}


class CropDataset(Dataset):
    """The training stream: crop number `index` is a function of (seed, index) alone.

    Each pass over the pictures is a new permutation; each visit takes one random crop. A stream that begins at
    `start` continues one that ended there, to the bit.

    Args:
        images (`datasets.Dataset`): pictures in the column `image`, classes (if any) in `label`.
        cropping ([`Cropping`]): how crops are cut.
        start, length (`int`): first crop and number of crops.
        cache_gib (`float`): how much decoded data is kept in memory, in GiB.
        overfit (`int`, *optional*): only so many different crops, over and over.
        teacher: gives an answer for the name of a picture and its LR, see [`flowsr.teacher`].
    """

    def __init__(
        self, images, cropping: Cropping, start: int = 0, length: int = 0, cache_gib: float = 0.0,
        overfit: int | None = None, teacher: Callable[[str | None, np.ndarray], np.ndarray] | None = None,
    ):  # fmt: skip
        self.images, self.cropping, self.teacher = images, cropping, teacher
        self.start, self.length, self.overfit = start, length, overfit
        self.labelled = "label" in images.column_names
        self.cache_left = int(cache_gib * 2**30)
        self.cache: dict[int, tuple] = {}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, offset: int) -> dict[str, torch.Tensor]:
        number = self.start + offset
        index = number % self.overfit if self.overfit else number
        epoch, position = divmod(index, len(self.images))
        picture = int(order_of_pictures(self.cropping.seed, epoch, len(self.images))[position])
        hr, lr, label, answer = self.read(picture)
        return self.cropping.crop(hr, lr, index, label, answer) | {"index": torch.tensor(number)}

    def read(self, picture: int) -> tuple[np.ndarray, np.ndarray | None, int | None, np.ndarray | None]:
        """A picture, its LR, its class and the teacher's answer, read once as long as the cache has room."""
        if picture in self.cache:
            return self.cache[picture]
        row = self.images[picture]
        hr, lr = self.cropping.pair(row["image"])
        answer = self.teacher(name_of(self.images, picture), lr) if self.teacher is not None else None
        found = hr, lr, row["label"] if self.labelled else None, answer
        size = sum(array.nbytes for array in (hr, lr, answer) if array is not None)
        if size <= self.cache_left:
            self.cache_left -= size
            self.cache[picture] = found
        return found


class CropStream(IterableDataset):
    """The training stream of pictures that come one after the other; pictures smaller than a crop are left out.

    Each pass is shuffled within a buffer. A stream that begins at `start` reads past what an earlier one has used,
    without decoding it, and continues it to the bit.

    Args:
        images (`datasets.IterableDataset`), cropping, start, length: as for [`CropDataset`].
    """

    def __init__(self, images, cropping: Cropping, start: int, length: int):
        import datasets

        images = images.cast_column("image", datasets.Image(decode=False))
        self.images = images.shuffle(seed=cropping.seed, buffer_size=SHUFFLE_BUFFER)
        self.cropping, self.start, self.length = cropping, start, length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        index, epoch = 0, 0
        while index < self.start + self.length:
            self.images.set_epoch(epoch)
            before = index
            for row in self.images:
                picture = open_undecoded(row["image"])
                if self.cropping.resize_to is None and min(picture.size) < self.cropping.resolution:
                    continue
                if index >= self.start:
                    yield self.cropping.crop(*self.cropping.pair(picture), index, row.get("label"))
                index += 1
                if index >= self.start + self.length:
                    return
            if index == before:
                raise ValueError(f"No picture of the stream is as large as a crop of {self.cropping.resolution}.")
            epoch += 1


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


def smaller_than(images, resolution: int) -> dict[int, str]:
    """The pictures whose shorter side is below `resolution` pixels, as number: name and size; reads headers only."""
    import datasets

    small = {}
    undecoded = images.cast_column("image", datasets.Image(decode=False))
    for number, row in enumerate(undecoded):
        with open_undecoded(row["image"]) as picture:
            if min(picture.size) < resolution:
                small[number] = f"{row['image']['path'] or number} ({picture.width}x{picture.height})"
    return small


def name_of(images, picture: int) -> str | None:
    """The file name of a picture, where it came from a file."""
    import datasets

    undecoded = images.select([picture]).cast_column("image", datasets.Image(decode=False))
    path = undecoded[0]["image"]["path"]
    return path and Path(path).name


def open_undecoded(row: dict) -> Image.Image:
    """Opens an undecoded picture of HF datasets (bytes, or a path that may lie in a zip)."""
    from datasets.utils.file_utils import xopen

    if row["bytes"] is not None:
        return Image.open(io.BytesIO(row["bytes"]))
    return Image.open(xopen(row["path"], "rb"))
