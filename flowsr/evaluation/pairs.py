"""Pictures with their truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowsr.degradations import cut_to_multiple, matlab_bicubic
from flowsr.files import PICTURE_SUFFIXES, as_levels, find_pictures, read_picture


@dataclass
class Pair:
    """A picture and its LR, uint8 `(h, w, 3)`; its name, and its class where the network knows classes."""

    hr: np.ndarray
    lr: np.ndarray
    name: str = ""
    label: int | None = None


def load_pairs(hr_dir: str, lr_dir: str | None, scale: int) -> list[Pair]:
    """Test pictures of a folder, with the LR of another folder or made in MATLAB's convention.

    An LR picture carries the name of its HR picture, or that with `x{scale}` behind the stem.

    Raises:
        ValueError: for a missing or empty folder, a missing LR picture, or sizes that do not fit the scale.
    """
    for folder in (hr_dir, lr_dir):
        if folder is not None and not Path(folder).is_dir():
            raise ValueError(f"There is no folder {folder}.")
    lr_paths = list(Path(lr_dir).iterdir()) if lr_dir is not None else []
    pairs = []
    for path in find_pictures([hr_dir]):
        hr = cut_to_multiple(np.asarray(as_levels(read_picture(path), "RGB")), scale)
        if lr_dir is None:
            pairs.append(Pair(hr, matlab_bicubic(hr, scale), path.name))
            continue
        names = (path.stem, f"{path.stem}x{scale}")
        found = [p for p in lr_paths if p.stem in names and p.suffix.lower() in PICTURE_SUFFIXES]
        if len(found) != 1:
            raise ValueError(f"{lr_dir} must hold one LR picture for {path.name}, found {[p.name for p in found]}.")
        lr = np.asarray(as_levels(read_picture(found[0]), "RGB"))
        if (lr.shape[0] * scale, lr.shape[1] * scale) != hr.shape[:2]:
            raise ValueError(
                f"{found[0].name} is {lr.shape[1]}x{lr.shape[0]}; at x{scale} it must be {hr.shape[1] // scale}x"
                f"{hr.shape[0] // scale} for {path.name} of {hr.shape[1]}x{hr.shape[0]}. Is the scale right?"
            )
        pairs.append(Pair(hr, lr, path.name))
    return pairs
