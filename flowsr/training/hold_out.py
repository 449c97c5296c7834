"""Which pictures a run does not train on, so as to measure with them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from flowsr.degradations import degrade
from flowsr.evaluation import Pair
from flowsr.training.crops import Cropping, decoded
from flowsr.training.pictures import unfit_pictures
from flowsr.training.settings import Settings


def hold_out(images, settings: Settings, scale: int, say: Callable[[str], None] = print) -> tuple:
    """Pictures to train on and pictures to validate with: the last of a shuffle, or the first of a stream.

    Args:
        images: of [`load_images`].
        scale (`int`): HR pixels per LR pixel.
        say: called with a line on pictures that are left out.

    Raises:
        ValueError: for pictures that do not fit, where `small_images` is "refuse"; if too few are left.
    """
    count = settings.num_validation_images
    if settings.streaming:
        return images.skip(count), list(images.take(count))
    side = settings.resolution if settings.resize_to is None else 1
    if unfit := unfit_pictures(images, side, scale):
        words = f"pictures are smaller than a crop of {settings.resolution}, or do not fit or cannot be read"
        if settings.small_images == "refuse":
            raise ValueError(
                f"{len(unfit)} of {len(images)} {words}: {', '.join(list(unfit.values())[:5])}"
                f"{' ...' if len(unfit) > 5 else ''}. Leave them out with "
                "`--small_images skip`, or lower `resolution`."
            )
        images = images.select([number for number in range(len(images)) if number not in unfit])
        say(f"{len(unfit)} {words}, and are left out.")
    if len(images) <= count:
        raise ValueError(
            f"{len(images)} pictures, of which `num_validation_images` holds out {count}: none is left to train on."
        )
    images = images.shuffle(seed=settings.seed)
    kept = len(images) - count
    if settings.train_batch_size > kept:
        raise ValueError(
            f"`train_batch_size` is {settings.train_batch_size}, but there are only {kept} pictures to train on; "
            "lower it, and raise `gradient_accumulation_steps` instead."
        )
    return images.select(range(kept)), images.select([*range(kept, len(images))])


def pairs_of(held_out, cropping: Cropping, small_images: str) -> list[Pair]:
    """The held-out pictures and their LR by the degradation of the run; unreadable ones are refused or skipped."""
    pairs = []
    for number in range(len(held_out)):
        try:
            row, hr, lr = decoded(held_out, number, cropping)
        except ValueError:
            if small_images == "refuse":
                raise
            continue
        if lr is None:
            lr = degrade(hr, cropping.scale, cropping.degradation, np.random.default_rng(cropping.seed))
        pairs.append(Pair(hr, lr, label=row.get("label")))
    return pairs
