"""The stream of aligned (hr, lr) crops: crop number k of a run is a function of (seed, k)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from flowsr.degradations import cut_to_multiple, degrade, matlab_bicubic
from flowsr.files import as_levels
from flowsr.training.pictures import UNREADABLE, name_of, open_undecoded, unreadable

CACHE = 8 * 2**30  # bytes of decoded pictures that a loader keeps in memory
SHUFFLE_BUFFER = 1000  # pictures of a stream among which chance picks the next


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
        resize_to (`int`, *optional*): pictures are first resized so that the shorter side has this many pixels, and
            the middle is taken instead of a random place.
    """

    resolution: int
    scale: int
    seed: int = 0
    channels: int = 3
    degradation: str = "bicubic"
    augmentation: str = "turns"
    resize_to: int | None = None

    def pair(self, picture: Image.Image, lr: Image.Image | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """A picture cut to a multiple of the scale, and the LR of the whole picture where it is used.

        Args:
            picture: HR.
            lr: its LR; by default bicubic.

        Returns:
            uint8 `(h, w, c)` and `(h / scale, w / scale, c)`.

        Raises:
            ValueError: if the sizes do not fit.
        """
        mode = "RGB" if self.channels == 3 else "L"
        picture = as_levels(picture, mode)
        if self.resize_to is not None:
            factor = self.resize_to / min(picture.size)
            picture = picture.resize([round(side * factor) for side in picture.size], Image.BICUBIC)
        hr = cut_to_multiple(np.atleast_3d(np.asarray(picture)), self.scale)
        if lr is not None:
            if tuple(side * self.scale for side in lr.size) != hr.shape[1::-1]:
                raise ValueError(
                    f"its LR of {lr.width}x{lr.height} is not 1 / {self.scale} of {hr.shape[1]}x{hr.shape[0]}"
                )
            return hr, np.atleast_3d(np.asarray(as_levels(lr, mode)))
        return hr, matlab_bicubic(hr, self.scale) if self.scale > 1 and self.degradation == "bicubic" else None

    def crop(
        self, hr: np.ndarray, lr: np.ndarray | None, index: int, label: int | None, answer: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        """Crop number `index`: `hr` (c, resolution, resolution) and `lr` (c, resolution / scale, ...) as uint8.

        Where a teacher's `answer` is given, which lies on the grid of `hr`, the crop has it as `teacher`.
        """
        random = np.random.default_rng([self.seed, 1, index])
        s, side = self.scale, self.resolution // self.scale
        rows, columns = hr.shape[0] // s - side + 1, hr.shape[1] // s - side + 1  # places on the LR grid
        place = int(random.integers(rows)), int(random.integers(columns))
        top, left = ((rows - 1) // 2, (columns - 1) // 2) if self.resize_to is not None else place
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


def decoded(images, picture: int, cropping: Cropping) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """The row of a picture, its pixels and its LR.

    Raises:
        ValueError: naming the file, if it or its LR cannot be decoded.
    """
    try:
        row = images[picture]
        image = row["image"]
        image = ImageOps.exif_transpose(open_undecoded(image)) if isinstance(image, dict) else image  # of a stream
        return row, *cropping.pair(image, row.get("lr"))
    except UNREADABLE as error:
        raise unreadable(name_of(images, picture) or f"Picture {picture}", error) from error


class CropDataset(Dataset):
    """The training stream: crop number `index` is a function of (seed, index) alone.

    Each pass over the pictures is a new permutation; each visit takes one random crop. A stream that begins at
    `start` continues one that ended there, to the bit.

    Args:
        images (`datasets.Dataset`): pictures in the column `image`, classes (if any) in `label`, and in `lr` the LR
            pictures where they are given.
        cropping ([`Cropping`]): how crops are cut.
        start, length (`int`): first crop and number of crops.
        cache (`int`): bytes of decoded data that are kept in memory.
        overfit (`int`, *optional*): only so many different crops, over and over.
        teacher: gives an answer for the name of a picture and its LR, see [`flowsr.training.teacher`].
        small_images ("refuse" or "skip"): what becomes of a picture that cannot be decoded: an error, or the next
            picture in its place.
    """

    def __init__(
        self, images, cropping: Cropping, start: int = 0, length: int = 0, cache: int = CACHE,
        overfit: int | None = None, teacher: Callable[[str | None, np.ndarray], np.ndarray] | None = None,
        small_images: str = "refuse",
    ):  # fmt: skip
        self.images, self.cropping, self.teacher, self.small_images = images, cropping, teacher, small_images
        self.start, self.length, self.overfit = start, length, overfit
        self.labelled = "label" in images.column_names
        self.cache_left = cache
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
        for number in range(picture, picture + len(self.images)):
            try:
                row, hr, lr = decoded(self.images, number % len(self.images), self.cropping)
                break
            except ValueError:
                if self.small_images == "refuse":
                    raise
        else:
            raise ValueError("None of the pictures can be read.")
        picture = number % len(self.images)
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
    without decoding it, and continues it to the bit. Loader processes all read the stream, and each decodes the crops
    of its own batches.

    Args:
        images (`datasets.IterableDataset`), cropping, start, length: as for [`CropDataset`].
        small_images ("refuse" or "skip"): what becomes of a file that is no picture: an error, or it is left out. One
            that breaks off further on is always an error, as a resumed run reads past it undecoded.
        batch_size (`int`): crops in a batch of the loader.
    """

    def __init__(
        self, images, cropping: Cropping, start: int, length: int, small_images: str = "refuse", batch_size: int = 1
    ):
        import datasets

        images = images.cast_column("image", datasets.Image(decode=False))
        self.images = images.shuffle(seed=cropping.seed, buffer_size=SHUFFLE_BUFFER)
        self.cropping, self.start, self.length, self.small_images = cropping, start, length, small_images
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        index, epoch = 0, 0
        while index < self.start + self.length:
            self.images.set_epoch(epoch)
            before = index
            for rows in self.images.iter(batch_size=1):  # unlike `iter(self.images)` not split over loader processes
                row = {name: column[0] for name, column in rows.items()}
                try:
                    picture = open_undecoded(row["image"])
                except UNREADABLE as error:
                    if self.small_images == "refuse":
                        raise unreadable(row["image"]["path"] or f"Picture {index}", error) from error
                    continue
                if self.cropping.resize_to is None and min(picture.size) < self.cropping.resolution:
                    continue
                batch = (index - self.start) // self.batch_size  # the loader asks its processes in turn
                if index >= self.start and (worker is None or batch % worker.num_workers == worker.id):
                    try:
                        pair = self.cropping.pair(ImageOps.exif_transpose(picture))
                    except UNREADABLE as error:
                        raise unreadable(row["image"]["path"] or f"Picture {index}", error) from error
                    yield self.cropping.crop(*pair, index, row.get("label"))
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
    """uint8 `(h, w, c)` -> uint8 `(c, h, w)`."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def as_images(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch whose pictures are float32 in [-1, 1]: they travel to the device as bytes, a quarter as large."""
    return {name: x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x for name, x in batch.items()}
