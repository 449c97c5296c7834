"""Folders of pictures: which ones there are, which belong to a shard, and which an earlier call has done already."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from flowsr.picture_file import PICTURE_SUFFIXES
from flowsr.picture_writer import remove_unfinished

DONE = ".flowsr-done{shard}.jsonl"


def find_tree(places: list[str], beside: Path) -> list[tuple[Path, Path]]:
    """The pictures among `places`, each with the name that it has below a folder of results.

    A file keeps its name; what lies in a named folder, however deep, keeps its path below that folder, in the order of
    these paths. Hidden files and folders, and links to folders, are passed by, and so is the folder of results.

    Args:
        places: files, folders, or `-` for the standard input.
        beside (`Path`): the folder of results.

    Raises:
        ValueError: for a place that does not exist or a folder without pictures.
    """
    found = []
    for place in map(Path, places):
        if place.is_dir():
            inside = sorted(path.relative_to(place) for path in pictures_below(place, beside.resolve()))
            if not inside:
                raise ValueError(f"No pictures in {place} (looked for {', '.join(sorted(PICTURE_SUFFIXES))}).")
            found += [(place / name, name) for name in inside]
        elif place.exists() or str(place) == "-":
            found.append((place, Path("stdin" if str(place) == "-" else place.name)))
        else:
            raise ValueError(f"There is no {place}.")
    return found


def pictures_below(place: Path, results: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(place):
        folders[:] = [
            name for name in folders if not name.startswith(".") and (Path(folder) / name).resolve() != results
        ]
        paths = (Path(folder) / name for name in files if not name.startswith("."))
        yield from (path for path in paths if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())


def in_shard(name: Path, shard: tuple[int, int]) -> bool:
    """Whether a picture belongs to shard (number, count), by its path below the folder: the same on every machine."""
    digest = hashlib.sha256(os.fsencode(name.as_posix())).digest()
    return int.from_bytes(digest[:8], "big") % shard[1] == shard[0] - 1


def shard_of_process(shard: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """The part of a shard, or of all pictures, that belongs to this one of the processes which a launcher has started.

    torchrun, accelerate and others number them by RANK and WORLD_SIZE in the environment.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if count == 1:
        return shard
    number, shards = shard or (1, 1)
    return number + shards * rank, shards * count  # equal to `number` modulo `shards`


class Done:
    """What earlier calls have made in a folder of results, of which pictures and with which settings.

    A line of JSON for each result in a hidden file of the folder, one file a shard, so that shards on different
    machines never write to the same one. A line is written before the work, with what lay at the place of the result
    then: whatever lies there later is the result, as files get their names when they are whole. A line that a crash
    has cut short counts as absent.

    Args:
        folder (`Path`): of the results.
        settings (`dict`): all that decides what a result looks like.
        shard (`tuple[int, int]`, *optional*): of this call.
    """

    def __init__(self, folder: Path, settings: dict, shard: tuple[int, int] | None = None):
        self.folder = folder
        self.settings = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.file = folder / DONE.format(shard="-{}-of-{}".format(*shard) if shard else "")
        self.found: dict[str, tuple] = {}
        for file in sorted(folder.glob(DONE.format(shard="*"))):
            for line in file.read_text(errors="replace").splitlines():
                try:
                    result, settings, picture, before = json.loads(line)
                except ValueError:  # cut short
                    continue
                self.found[result] = settings, picture, before
        remove_unfinished(folder)

    def has(self, source: Path, target: Path) -> bool:
        """Whether `target` was made of this very picture with these settings."""
        settings, picture, before = self.found.get(self.name(target), (None, None, None))
        return settings == self.settings and identity_of(target) not in (None, before) and picture == digest_of(source)

    def begin(self, source: Path, target: Path) -> None:
        """To be called before `target` is made of `source`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps([self.name(target), self.settings, digest_of(source), identity_of(target)])
        with open(self.file, "a") as file:
            file.write(f"\n{line}\n")  # on a line of its own, also behind one that a crash cut short

    def name(self, target: Path) -> str:
        return target.relative_to(self.folder).as_posix()


def identity_of(path: Path) -> list[int] | None:
    """Changes whenever a file is replaced; `None` where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return [found.st_ino, found.st_mtime_ns, found.st_size]


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_pipeline(pipe) -> str:
    """Of weights and scheduler, whatever their folder is called."""
    digest = hashlib.sha256(json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str).encode())
    for name, weight in pipe.unet.state_dict().items():
        digest.update(name.encode() + weight.cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
