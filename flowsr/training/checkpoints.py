"""Training checkpoints that survive whatever ends a run: whole or absent, checked before use, never the last one lost.

A checkpoint is a folder `checkpoint-STEP` that Accelerate has written under another name, with a list of its files
and their digests; it gets its name when all of it is on the disk. So a folder of that name is whole, unless the disk
has damaged it later, which the digests tell.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import yaml

from flowsr.picture_file import one_line
from flowsr.training.settings import Settings

MANIFEST = "manifest.json"
SETTINGS = "settings.yaml"
KEPT = 2  # checkpoints, beside the best pipeline
# What a resumed run must not change: network, optimiser, data and seed. All else is applied from then on.
FIXED = (
    "pipeline unet scheduler pretrained_model_name_or_path lora_rank train optimizer seed train_data_dir dataset_name "
    "lr_data_dir streaming small_images resolution resize_to augmentation degradation overfit "
    "num_validation_images"
).split()
OF_THE_CALL = ("output_dir", "resume_from_checkpoint")  # say nothing about the training


class Progress:
    """What a checkpoint must remember beyond weights, optimiser and schedule."""

    def __init__(self):
        self.step = 0  # optimiser steps done
        self.images = 0  # crops seen, over all processes
        self.best = -math.inf  # of the validations, as `validation_inference_steps` has it

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def save(accelerator, output_dir: Path, step: int, settings: dict) -> Path:
    """Writes `checkpoint-STEP` with the settings that it was trained with, then removes the oldest beyond `KEPT`.

    Raises:
        OSError: if it cannot be written, as on a full disk; older checkpoints are as they were.
    """
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_settings(settings, partial)
            seal(partial)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
    except Exception as error:  # torch and safetensors have errors of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        kept = ", ".join(path.name for path in found_in(output_dir)) or "none"
        raise OSError(
            f"checkpoint-{step} could not be written in {output_dir} ({type(error).__name__}: {error}). Checkpoints "
            f"still there: {kept}. Make room and go on with `--resume_from_checkpoint latest`."
        ) from error
    if accelerator.is_main_process:
        remove_oldest(output_dir, step)
    return final


def remove_oldest(output_dir: Path, step: int) -> None:
    """Keeps the newest `KEPT` checkpoints up to `step`; later ones, which resuming has passed over, stay."""
    for old in [path for path in found_in(output_dir) if step_of(path) <= step][:-KEPT]:
        shutil.rmtree(old)


def write_settings(settings: dict, folder: Path) -> None:
    (folder / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False))


def settings_of(checkpoint: Path) -> dict:
    """The settings that a checkpoint was trained with; those beside it where it holds none, or an empty dict."""
    for folder in (checkpoint, checkpoint.parent):
        if (folder / SETTINGS).is_file():
            return yaml.safe_load((folder / SETTINGS).read_text())
    return {}


def seal(folder: Path) -> None:
    """Brings all files of the folder to the disk and writes their digests beside them."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        digests[str(path.relative_to(folder))] = digest(path)
    with open(folder / MANIFEST, "w") as file:
        json.dump(digests, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; `None` if nothing is."""
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, expected in digests.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if digest(folder / name) != expected:
            return f"{name} is not what was written"
    return None


def found_in(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def step_of(folder: Path) -> int:
    """The optimiser step in the name of a checkpoint; -1 for a folder of another name."""
    step = folder.name.removeprefix("checkpoint-")
    return int(step) if step.isdigit() else -1


def find(wanted: str | None, output_dir: Path, say=print) -> Path | None:
    """The checkpoint to resume from.

    Args:
        wanted: a folder; or "latest", the newest whole one of the run, or nothing where it has none; or `None` for a
            new run.
        say: called with a line for each damaged checkpoint that "latest" passes over.

    Raises:
        ValueError: if a folder that was named is not there or is damaged, or all checkpoints of the run are; if a new
            run would write among checkpoints of another one, or after a checkpoint older than those of the folder.
    """
    if wanted is None:
        if found := found_in(output_dir):
            raise ValueError(
                f"{output_dir} holds {', '.join(path.name for path in found)} of an earlier run. Go on with it by "
                "`--resume_from_checkpoint latest`, or choose another `output_dir`."
            )
        return None
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint`: there is no folder {wanted}.")
        if wrong := damage(Path(wanted)):
            raise ValueError(
                f"`resume_from_checkpoint`: {wanted} is damaged: {wrong}. Take an older one, or `latest`."
            )
        later = [path for path in found_in(output_dir) if step_of(path) > step_of(Path(wanted)) and not damage(path)]
        if later:
            raise ValueError(
                f"{output_dir} holds {', '.join(path.name for path in later)}, later than {Path(wanted).name}. Move "
                "them away, or choose another `output_dir`."
            )
        return Path(wanted)
    newest_first = found_in(output_dir)[::-1]
    for path in newest_first:
        wrong = damage(path)
        if not wrong:
            return path
        say(f"{path} is damaged and passed over: {wrong}.")
    if newest_first:
        raise ValueError(f"Every checkpoint in {output_dir} is damaged; start anew in another `output_dir`.")
    return None


def load(accelerator, checkpoint: Path, progress: Progress, total_steps: int) -> None:
    """Puts the state of a checkpoint into all that was prepared by, and registered with, an accelerator.

    Raises:
        ValueError: if it is that of another network or optimiser, or has done more steps than the run is to have.
    """
    try:
        accelerator.load_state(str(checkpoint))
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{checkpoint} does not fit the network or the optimizer ({one_line(error)}): resume with the settings of "
            "its run, or start anew from its pipeline by `--pretrained_model_name_or_path`."
        ) from error
    if progress.step > total_steps:
        raise ValueError(
            f"{checkpoint} has done {progress.step} steps, but the run is to end after {total_steps}: raise "
            "`max_train_steps` or `num_train_epochs`."
        )


def changed_settings(before: dict, settings: Settings) -> list[str]:
    """The settings that differ from those of a checkpoint, as `name: before -> now`.

    Raises:
        ValueError: if one of them cannot be changed within a run.
    """
    now = asdict(settings)
    differing = [name for name in now if name in before and name not in OF_THE_CALL and before[name] != now[name]]
    lines = {name: f"`{name}`: {before[name]} -> {now[name]}" for name in differing}
    names_before, names_now = (
        [Path(place).name for place in each.get("train_data_dir", [])] for each in (before, now)
    )
    moved = ["train_data_dir"] if names_before == names_now else []  # the same folders in another place
    if refused := [lines[name] for name in differing if name in FIXED and name not in moved]:
        raise ValueError(
            f"A resumed run keeps its network, optimizer, data and seed, but the settings differ from those of the "
            f"checkpoint: {', '.join(refused)}. Leave them as they were, or start a new run from its pipeline by "
            "`--pretrained_model_name_or_path`."
        )
    gone = [f"`{name}`: {before[name]} -> no setting of this version" for name in sorted(before.keys() - now.keys())]
    return [*lines.values(), *gone]
