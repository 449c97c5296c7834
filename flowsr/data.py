"""Training pictures through HF datasets, and the stream of aligned (hr, lr) crops made from them."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from flowsr.degradations import cut_to_multiple, degrade, downscale
from flowsr.picture_file import PICTURE_SUFFIXES, one_line
from flowsr.pipelines.image_processor import read_pil

DIV2K = "http://data.vision.ee.ethz.ch/cvl/DIV2K/"  # Agustsson and Timofte 2017
KNOWN = {"DIV2K": DIV2K + "DIV2K_train_HR.zip", "DIV2K_valid": DIV2K + "DIV2K_valid_HR.zip"}
SHUFFLE_BUFFER = 1000  # pictures of a stream among which chance picks the next
# What Pillow raises for a damaged file.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


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
        `datasets.Dataset`, or `datasets.IterableDataset` of undecoded pictures for `streaming`, with the column
        `image` (and `label`).

    Raises:
        FileNotFoundError: if a folder does not exist or holds no picture.
        ValueError: if not exactly one source is given, a zip is damaged, or a data set has no column `image`, or no
            `label` where `labels` wants it.
    """
    import datasets

    if bool(train_data_dir) == bool(dataset_name):
        raise ValueError(
            "Give either `train_data_dir` (folders or zips of pictures) or `dataset_name` (DIV2K, the URL of a zip, "
            f"or a data set on the Hub); got {train_data_dir!r} and {dataset_name!r}."
        )
    options = {"split": "train", "streaming": streaming}
    folder_options = {"path": "imagefolder", "drop_labels": not labels, **options}
    if dataset_name:
        url = KNOWN.get(dataset_name, dataset_name)
        if Path(url).is_file():
            raise ValueError(f"`dataset_name`: {url} is a file; give it as `--train_data_dir {url}`.")
        if "://" in url:
            sets = [datasets.load_dataset(**where(url, labels, streaming), **folder_options)]
        else:
            sets = [datasets.load_dataset(url, **options)]
    else:
        sets = []
        for place in map(Path, train_data_dir):
            if not place.exists():
                raise FileNotFoundError(f"`train_data_dir`: there is no {place}.")
            found = {"data_dir": str(place)} if place.is_dir() else where(str(place), labels, streaming)
            try:
                sets.append(datasets.load_dataset(**found, **folder_options))
            except (datasets.exceptions.DatasetGenerationError, FileNotFoundError) as error:
                raise FileNotFoundError(f"`train_data_dir`: no readable picture in {place} ({error}).") from error
    columns = ["image", "label"] if labels else ["image"]
    for found in sets:
        missing = [column for column in columns if column not in (found.column_names or [])]
        if missing:
            raise ValueError(f"The data set needs the columns {columns}, found {found.column_names}.")
    images = datasets.concatenate_datasets([found.select_columns(columns) for found in sets])
    if streaming:  # of a zip, whatever it holds
        images = images.cast_column("image", datasets.Image(decode=False)).filter(is_picture)
    return images


def where(archive: str, labels: bool, streaming: bool) -> dict[str, object]:
    """What HF datasets are to read of a zip, by its path or URL: the folder that it is unpacked to, in their cache.

    A stream reads the zip itself, with whatever files are in it beside pictures.
    """
    import datasets

    if streaming:
        if labels:
            raise ValueError(f"The classes in {archive} cannot be streamed: unpack it, or leave out `streaming`.")
        return {"data_files": {"train": archive}}
    manager = datasets.DownloadManager()
    path = manager.download(archive) if "://" in archive else archive
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{archive} is not a whole zip of pictures; fetch it anew, or give a folder.")
    return {"data_dir": str(manager.extract(path))}


def is_picture(row: dict) -> bool:
    """Whether an undecoded row is a picture by the name of its file, where it has one; hidden files are none."""
    path = row["image"]["path"]
    if not path:
        return True
    inside = Path(path.split("::")[0].removeprefix("zip://"))
    return inside.suffix.lower() in PICTURE_SUFFIXES and not inside.name.startswith(".")


def with_lr(images, lr_data_dir: str, scale: int):
    """The data set with the LR pictures of a folder as its column `lr`.

    An LR picture carries the name of its HR picture, with any suffix, or that with `x{scale}` behind the stem.

    Raises:
        ValueError: for a missing folder, and for pictures without an LR picture or with several.
    """
    import datasets

    if not Path(lr_data_dir).is_dir():
        raise ValueError(f"`lr_data_dir`: there is no folder {lr_data_dir}.")
    found: dict[str, list[str]] = {}
    for path in sorted(Path(lr_data_dir).rglob("*")):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            found.setdefault(path.stem, []).append(str(path))
    undecoded = images.cast_column("image", datasets.Image(decode=False))
    names = [Path(row["path"] or "").stem for row in undecoded["image"]]
    matches = [found.get(name, []) + found.get(f"{name}x{scale}", []) for name in names]
    if wrong := [f"{name} ({len(match)})" for name, match in zip(names, matches) if len(match) != 1]:
        raise ValueError(
            f"`lr_data_dir`: {lr_data_dir} must hold one LR picture for each of {len(names)} HR pictures, by "
            f"its name; it does not for {len(wrong)}: {', '.join(wrong[:5])}{' ...' if len(wrong) > 5 else ''}."
        )
    return images.add_column("lr", [path for (path,) in matches]).cast_column("lr", datasets.Image())


def check_classes(images, classes: int) -> None:
    """Refuses labels that are not the classes 0..`classes` - 1 of the network."""
    import datasets

    label = images.features["label"]
    if isinstance(label, datasets.ClassLabel):
        if label.num_classes != classes:
            raise ValueError(f"`num_class_embeds` is {classes}, but the data has the classes {label.names[:20]}.")
        return
    if "int" not in str(getattr(label, "dtype", label)):
        raise ValueError(f"The column `label` must hold classes or integers, found {label}; cast it to ClassLabel.")
    beyond = [] if isinstance(images, datasets.IterableDataset) else images.unique("label")
    if beyond := sorted(number for number in beyond if not 0 <= number < classes):
        raise ValueError(f"`num_class_embeds` is {classes}, but the data has the labels {beyond[:20]}.")


def as_levels(image: Image.Image, mode: str) -> Image.Image:
    """An image of 8 bits per channel in "RGB" or "L"; greys of 16 bits keep their brightness, as in inference.

    Raises:
        ValueError: for a mode without a defined way to RGB.
    """
    if image.mode[0] in "IF" or image.mode == "LAB":  # which Pillow would clip to 255
        grey = read_pil(image).color[0, 0]
        image = Image.fromarray(((grey + 1) * 127.5).round().byte().numpy())
    return image.convert(mode)


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
        return hr, downscale(hr, self.scale) if self.scale > 1 and self.degradation == "bicubic" else None

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
        images (`datasets.Dataset`): pictures in the column `image`, classes (if any) in `label`, and in `lr` the LR
            pictures where they are given.
        cropping ([`Cropping`]): how crops are cut.
        start, length (`int`): first crop and number of crops.
        cache_gib (`float`): how much decoded data is kept in memory, in GiB.
        overfit (`int`, *optional*): only so many different crops, over and over.
        teacher: gives an answer for the name of a picture and its LR, see [`flowsr.teacher`].
        small_images ("refuse" or "skip"): what becomes of a picture that cannot be decoded: an error, or the next
            picture in its place.
    """

    def __init__(
        self, images, cropping: Cropping, start: int = 0, length: int = 0, cache_gib: float = 0.0,
        overfit: int | None = None, teacher: Callable[[str | None, np.ndarray], np.ndarray] | None = None,
        small_images: str = "refuse",
    ):  # fmt: skip
        self.images, self.cropping, self.teacher, self.small_images = images, cropping, teacher, small_images
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


def unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be read ({one_line(error)}); mend or remove it, or set `--small_images skip`.")


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


def unfit_pictures(images, side: int, scale: int = 1) -> dict[int, str]:
    """Number, name and reason of each picture that cannot be trained on; reads headers only.

    Args:
        side (`int`): least shorter side, pixels.
        scale (`int`): HR pixels per pixel of the column `lr`, where there is one.
    """
    import datasets

    unfit = {}
    columns = [name for name in ("image", "lr") if name in images.column_names]
    for column in columns:
        images = images.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(images.select_columns(columns)):
        name = row["image"]["path"] or number
        try:
            size, *lr_size = (open_size(row[column]) for column in columns)
        except UNREADABLE as error:
            unfit[number] = f"{name} (cannot be read: {one_line(error)})"
            continue
        if min(size) < side:
            unfit[number] = f"{name} ({size[0]}x{size[1]})"
        elif lr_size and sorted(lr_size[0]) != sorted(each // scale for each in size):  # as they lie, not upright
            unfit[number] = f"{name} ({size[0]}x{size[1]} with an LR of {lr_size[0][0]}x{lr_size[0][1]})"
    return unfit


def open_size(row: dict) -> tuple[int, int]:
    with open_undecoded(row) as picture:
        return picture.size


def name_of(images, picture: int) -> str | None:
    """The file name of a picture, where it came from a file."""
    import datasets

    if isinstance(images, list):  # the first of a stream
        path = images[picture]["image"]["path"]
    else:
        path = images.select([picture]).cast_column("image", datasets.Image(decode=False))[0]["image"]["path"]
    return path and Path(path).name


def open_undecoded(row: dict) -> Image.Image:
    """Opens an undecoded picture of HF datasets (bytes, or a path that may lie in a zip)."""
    from datasets.utils.file_utils import xopen

    if row["bytes"] is not None:
        return Image.open(io.BytesIO(row["bytes"]))
    return Image.open(xopen(row["path"], "rb"))
