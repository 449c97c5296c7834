"""Training pictures through HF datasets, and the stream of aligned (hr, lr) crops made from them."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from flowsr.degradations import CHAINS, cut_to_multiple, degrade, downscale

DIV2K = "http://data.vision.ee.ethz.ch/cvl/DIV2K/"  # Agustsson and Timofte 2017
KNOWN = {"DIV2K": DIV2K + "DIV2K_train_HR.zip", "DIV2K_valid": DIV2K + "DIV2K_valid_HR.zip"}
SHUFFLE_BUFFER = 1000  # pictures of a stream among which chance picks the next


def load_images(
    train_data_dir: list[str] | str | None, dataset_name: str | None, labels: bool = False, streaming: bool = False
):
    """Pictures of folders (or zips of them), or of a named data set, as one data set of HF datasets.

    Args:
        train_data_dir (`list[str]`): folders or zips; files in them that are no pictures are left out.
        dataset_name (`str`): "DIV2K" or "DIV2K_valid", the official zips; or the URL of a zip; or a data set on the
            Hub (or in a local folder) with a column `image`.
        labels (`bool`): keep the column `label`; in folders and zips it is the name of the folder of each picture.
        streaming (`bool`): read from the start to the end instead of by number; nothing is stored.

    Returns:
        `datasets.Dataset`, or `datasets.IterableDataset` for `streaming`, with the column `image` (and `label`).

    Raises:
        FileNotFoundError: if a folder does not exist or holds no picture, or a zip is broken.
        ValueError: if not exactly one source is given, or a data set lacks `image`, or `label` where it is wanted.
    """
    import datasets

    if bool(train_data_dir) == bool(dataset_name):
        raise ValueError(
            "Give either `train_data_dir` (folders or zips of pictures) or `dataset_name` (DIV2K, the URL of a zip, "
            f"or a data set on the Hub); got {train_data_dir!r} and {dataset_name!r}."
        )
    if dataset_name:
        url = KNOWN.get(dataset_name, dataset_name)
        if Path(url).is_file():
            raise ValueError(f"`dataset_name`: {url} is a file; give a zip or a folder as `train_data_dir`.")
        if "://" in url:
            sets = [from_files(url, {"data_files": {"train": url}}, labels, streaming)]
        else:
            sets = [datasets.load_dataset(url, split="train", streaming=streaming)]
    else:
        sets = []
        for place in map(Path, [train_data_dir] if isinstance(train_data_dir, str) else train_data_dir):
            if not place.exists():
                raise FileNotFoundError(f"`train_data_dir`: there is no {place}.")
            where = {"data_dir": str(place)} if place.is_dir() else {"data_files": {"train": str(place)}}
            sets.append(from_files(place, where, labels, streaming))
    columns = ["image", "label"] if labels else ["image"]
    for found in sets:
        missing = [column for column in columns if column not in (found.column_names or [])]
        if missing:
            raise ValueError(f"The data set needs the columns {columns}, found {found.column_names}.")
    return datasets.concatenate_datasets([found.select_columns(columns) for found in sets])


def from_files(place: str | Path, where: dict, labels: bool, streaming: bool):
    """The pictures of a folder or zip, with the names of their folders as classes where `labels` are wanted.

    HF datasets lists them. It takes every file of a zip for a picture and finds no classes there, so both are done
    here, by the paths alone.
    """
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    try:
        found = datasets.load_dataset("imagefolder", drop_labels=True, split="train", streaming=streaming, **where)
        paths = [row["image"]["path"] or "" for row in undecoded(found)]
    except (datasets.exceptions.DatasetGenerationError, FileNotFoundError, zipfile.BadZipFile) as error:
        raise FileNotFoundError(f"No readable picture in {place} ({error}).") from error

    def is_picture(path: str) -> bool:
        name = inner(path).name
        return Path(name).suffix.lower() in ImageFolder.EXTENSIONS and not name.startswith(".")

    kept = [number for number, path in enumerate(paths) if is_picture(path)]
    if not kept:
        raise FileNotFoundError(f"No readable picture in {place}: none of its {len(paths)} files has a known suffix.")
    if len(kept) < len(paths):
        if streaming:
            found = undecoded(found).filter(lambda row: is_picture(row["image"]["path"]))
        else:
            found = found.select(kept)
    if labels and "label" not in (found.column_names or []):
        folders = [inner(paths[number]).parent.name for number in kept]
        classes = datasets.ClassLabel(names=sorted(set(folders)))
        features = datasets.Features({"image": datasets.Image(), "label": classes})
        if streaming:
            found = undecoded(found).map(
                lambda row: {"label": classes.str2int(inner(row["image"]["path"]).parent.name)}, features=features
            )
        else:
            found = found.add_column("label", classes.str2int(folders)).cast_column("label", classes)
    return found.cast_column("image", datasets.Image())


def check_classes(images, count: int) -> None:
    """Raises `ValueError` where the column `label` does not hold the classes 0..count - 1."""
    import datasets

    feature = images.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        if feature.num_classes != count:
            raise ValueError(f"`num_class_embeds` is {count}, but the data has the classes {feature.names[:20]}.")
        return
    if isinstance(images, datasets.IterableDataset) or "int" not in getattr(feature, "dtype", ""):
        raise ValueError(
            f"The column `label` is {feature}, whose classes are not known: store it as a ClassLabel, or (for whole "
            "numbers) leave out `streaming`."
        )
    low, high = min(images["label"]), max(images["label"])
    if low < 0 or high >= count:
        raise ValueError(f"`num_class_embeds` is {count}, but the column `label` goes from {low} to {high}.")


@dataclass(frozen=True)
class Cropping:
    """How a crop is cut from a picture: all that chance decides is a function of (seed, number of the crop).

    Attributes:
        resolution (`int`): side of a crop in HR pixels, a multiple of `scale`.
        scale (`int`): HR pixels per LR pixel; 1 makes no LR.
        seed (`int`): which stream.
        channels (1 or 3): grey or RGB.
        degradation: "bicubic" makes the LR from the whole picture, so that crops have no edges of their own; the
            random chains of [`degrade`] make it from the crop; else a folder of LR pictures, each with the name of
            its HR picture (any suffix).
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

    def pair(self, picture: Image.Image, name: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """A picture cut to a multiple of the scale, and the LR of the whole of it, if any; uint8 `(h, w, c)`.

        Args:
            name: of the picture's file, by which its LR is found in a folder.

        Raises:
            ValueError: if the folder has no LR of that name, or one that is not `1 / scale` as large.
        """
        mode = "RGB" if self.channels == 3 else "L"
        picture = picture.convert(mode)
        if self.resize_to is not None:
            factor = self.resize_to / min(picture.size)
            picture = picture.resize([round(side * factor) for side in picture.size], Image.BICUBIC)
        hr = cut_to_multiple(np.atleast_3d(np.asarray(picture)), self.scale)
        if self.scale == 1 or self.degradation in CHAINS:
            return hr, None
        if self.degradation == "bicubic":
            return hr, downscale(hr, self.scale)
        path = paired_with(self.degradation, name)
        lr = np.atleast_3d(np.asarray(read_picture({"bytes": None, "path": str(path)}).convert(mode)))
        if hr.shape[:2] != (lr.shape[0] * self.scale, lr.shape[1] * self.scale):
            raise ValueError(wrong_size(name, hr.shape[1::-1], path, lr.shape[1::-1], self.scale))
        return hr, lr

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
        self.images, self.cropping, self.teacher = undecoded(images), cropping, teacher
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
        name = name_of(row["image"])
        hr, lr = self.cropping.pair(read_picture(row["image"]), name)
        answer = self.teacher(name, lr) if self.teacher is not None else None
        found = hr, lr, row["label"] if self.labelled else None, answer
        size = sum(array.nbytes for array in (hr, lr, answer) if array is not None)
        if size <= self.cache_left:
            self.cache_left -= size
            self.cache[picture] = found
        return found


class CropStream(IterableDataset):
    """The training stream of pictures that come one after the other; pictures smaller than a crop are left out.

    Each pass is shuffled within a buffer. A stream that begins at `start` reads past what an earlier one has used,
    without decoding it, and continues it to the bit. Loader processes read the same stream, and each decodes the
    crops of its own batches.

    Args:
        images (`datasets.IterableDataset`), cropping, start, length: as for [`CropDataset`].
        batch_size (`int`): crops of a batch of the loader.
    """

    def __init__(self, images, cropping: Cropping, start: int, length: int, batch_size: int = 1):
        self.images = undecoded(images).shuffle(seed=cropping.seed, buffer_size=SHUFFLE_BUFFER)
        self.cropping, self.start, self.length, self.batch_size = cropping, start, length, batch_size

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        index, epoch = 0, 0
        while index < self.start + self.length:
            self.images.set_epoch(epoch)
            before = index
            for rows in self.images.iter(batch_size=1):  # unlike `iter(self.images)` not split over loader processes
                row = {name: column[0] for name, column in rows.items()}
                if self.cropping.resize_to is None and min(size_of(row["image"])) < self.cropping.resolution:
                    continue
                batch = (index - self.start) // self.batch_size  # of the loader, which asks its processes in turn
                if index >= self.start and (worker is None or batch % worker.num_workers == worker.id):
                    pair = self.cropping.pair(read_picture(row["image"]), name_of(row["image"]))
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
    """uint8 `(h, w, c)` -> float32 `(c, h, w)` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 127.5 - 1


def smaller_than(images, resolution: int) -> dict[int, str]:
    """The pictures whose shorter side is below `resolution` pixels, as number: name and size; reads headers only."""
    small = {}
    for number, row in enumerate(undecoded(images)):
        width, height = size_of(row["image"])
        if min(width, height) < resolution:
            small[number] = f"{row['image']['path'] or number} ({width}x{height})"
    return small


def check_pairs(images, cropping: Cropping) -> None:
    """Raises `ValueError` unless each picture has its LR in the folder of `cropping`; reads headers only."""
    for row in undecoded(images):
        name = name_of(row["image"])
        path = paired_with(cropping.degradation, name)
        hr, lr = size_of(row["image"]), size_of({"bytes": None, "path": str(path)})
        if sorted(side // cropping.scale for side in hr) != sorted(lr):  # EXIF may turn either
            raise ValueError(wrong_size(name, hr, path, lr, cropping.scale))


def wrong_size(name: str, hr: tuple[int, int], path: Path, lr: tuple[int, int], scale: int) -> str:
    return (
        f"`degradation`: {path} has {lr[0]}x{lr[1]} pixels, but its HR picture {name} has {hr[0]}x{hr[1]}: at scale "
        f"{scale} the LR must have {hr[0] // scale}x{hr[1] // scale}."
    )


def paired_with(folder: str, name: str | None) -> Path:
    """The file in a folder (or the folders in it) that has the name of a picture, whatever its suffix."""
    found = files_by_stem(folder).get(Path(name or "").stem, [])
    if len(found) != 1:
        raise ValueError(
            f"`degradation`: {folder} must hold one LR picture for {name}, named as it, found "
            f"{', '.join(map(str, found)) or 'none'}."
        )
    return found[0]


@lru_cache(maxsize=4)
def files_by_stem(folder: str) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    return found


# Undecoded pictures of HF datasets: `{"bytes": ..., "path": ...}`, where a path may lie in a zip.


def undecoded(images):
    """The same data set, whose pictures are files that nobody has decoded."""
    import datasets

    return images.cast_column("image", datasets.Image(decode=False))


def inner(path: str) -> Path:
    """A path, without the zip that it lies in: "zip://a/1.png::/photos.zip" -> a/1.png."""
    return Path(path.split("::")[0].removeprefix("zip://"))


def name_of(row: dict) -> str | None:
    """The file name of a picture, where it came from a file."""
    return inner(row["path"]).name if row["path"] else None


def size_of(row: dict) -> tuple[int, int]:
    """Width and height as the header has them, before EXIF turns the picture."""
    try:
        with open_undecoded(row) as file, Image.open(file) as picture:
            return picture.size
    except Exception as error:
        raise unreadable(row, error) from error


def read_picture(row: dict) -> Image.Image:
    """A picture in 8-bit RGB, upright, as the pipelines read it: 16 bits are rounded, alpha is left out.

    Raises:
        ValueError: if it is damaged, with its name.
    """
    from flowsr.pipelines.image_processor import read_pil

    try:
        with open_undecoded(row) as file:
            picture = ImageOps.exif_transpose(Image.open(file))
            if picture.mode in ("L", "RGB"):
                return picture.convert("RGB")  # the same levels, sooner
            color = read_pil(picture).color[0]
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ... for broken files
        raise unreadable(row, error) from error
    return Image.fromarray(((color + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def unreadable(row: dict, error: Exception) -> ValueError:
    name = row["path"] or "without a name"
    return ValueError(f"The training picture {name} cannot be read ({error}): repair it, or take it out.")


def open_undecoded(row: dict) -> BinaryIO:
    from datasets.utils.file_utils import xopen

    return io.BytesIO(row["bytes"]) if row["bytes"] is not None else xopen(row["path"], "rb")
