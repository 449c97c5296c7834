"""Training pictures through HF datasets: found, checked, and read one by one."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

from PIL import Image

from flowsr.picture_file import PICTURE_SUFFIXES, one_line

DIV2K = "http://data.vision.ee.ethz.ch/cvl/DIV2K/"  # Agustsson and Timofte 2017
KNOWN = {"DIV2K": DIV2K + "DIV2K_train_HR.zip", "DIV2K_valid": DIV2K + "DIV2K_valid_HR.zip"}
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


def unreadable(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name} cannot be read ({one_line(error)}); mend or remove it, or set `--small_images skip`.")
