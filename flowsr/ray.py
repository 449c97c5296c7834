"""Folders and buckets of any number of pictures, upscaled by the workers of a Ray cluster (extra `ray`).

flowsr.ray.upscale("s3://mine/photos", "s3://mine/large", workers=8, gpus=0.5, checkpoint="x4", steps=4)

Ray Data carries whole files, so that EXIF, profiles and 16 bits arrive. Tasks fetch them, and an object that cannot be
read costs its own line and no more; actors, which load the pipeline once, upscale them and write the results.

What is done is known by a list in the folder of results, which the caller writes before the work: each picture, the
settings, and what lay at the place of its result. Whatever lies there later is the result, as no file gets its name
before it is whole. A worker that takes the place of a killed one, and a call that goes on after another, do the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

try:
    import ray

    from flowsr.places import Fetch, Place
except ImportError:
    raise ImportError("Ray is not installed: pip install 'flowsr[ray]'.") from None

from flowsr.files import PICTURE_SUFFIXES
from flowsr.folders import in_shard
from flowsr.upscale_files import FileUpscaler, UpscaleSettings, result_name

PLANS = ".flowsr-ray"  # folder of lists of what was begun, in that of the results
BLOCKS = 20_000  # at most, into which the pictures are shared out; fewer have one each


@dataclass
class Summary:
    """What came of a call.

    Attributes:
        made: pictures upscaled by it.
        skipped: pictures that earlier calls had upscaled alike.
        failures: a line for each of the others.
    """

    made: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)


def upscale(
    source: str,
    destination: str,
    workers: int | None = None,
    gpus: float = 0.0,
    cpus: float = 1.0,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    filesystem: Any = None,
    on_report: Callable[[dict], None] = lambda report: None,
    **settings,
) -> Summary:
    """Upscales every picture below `source` that no earlier call has upscaled alike.

    Args:
        source, destination: folders, or URIs that pyarrow or fsspec know, such as `s3://bucket/photos`; the folders
            below `source` are kept.
        workers (`int`, *optional*): that upscale at once; by default as many as the cluster has room for beside a
            core that reads.
        gpus, cpus (`float`): of each worker; 0.5 GPUs puts two on each.
        shard: number and count: only these of the pictures, by a hash of their paths.
        overwrite: replace results that are of other settings or pictures, which are refused without it.
        filesystem (*optional*): of pyarrow or fsspec, for both places.
        on_report: called with the report of each picture, as [`FileUpscaler`] makes it.
        settings: of [`UpscaleSettings`].

    Raises:
        ValueError: for places, settings or a cluster that cannot be, before any work.
    """
    settings = UpscaleSettings(**settings)
    if settings.compare or settings.uncertainty:
        raise ValueError("`compare` and `uncertainty` write a second picture beside each; leave them here.")
    here, there = Place.of(source, filesystem), Place.of(destination, filesystem)
    if there.holds(here, ""):
        raise ValueError(f"The results need a folder of their own, got {destination} for {source}.")
    deciding = FileUpscaler(replace(settings, device="cpu")).deciding()
    rows, summary = plan(here, there, settings, deciding, shard, overwrite)
    if not rows:
        return summary
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    workers = workers or room(gpus, cpus)
    pictures = ray.data.from_items(rows, override_num_blocks=min(len(rows), BLOCKS)).map(
        Fetch(here), num_cpus=0.5, max_retries=-1
    )
    reports = pictures.map(
        Worker,
        fn_constructor_args=(settings, there),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    for row in reports.iter_rows():
        report = json.loads(row["report"])
        on_report(report)
        if "error" in report:
            summary.failures.append(report["error"])
        else:
            summary.made += 1
    return summary


def room(gpus: float, cpus: float) -> int:
    """Workers that the cluster has room for, beside one core."""
    found = ray.cluster_resources()
    most = [found.get("GPU", 0) / gpus] if gpus else []
    most += [(found.get("CPU", 0) - 1) / cpus] if cpus else []
    workers = math.floor(min(most, default=1))
    if workers < 1:
        raise ValueError(
            f"The cluster has {found.get('CPU', 0):g} CPUs and {found.get('GPU', 0):g} GPUs: no room for a worker of "
            f"{cpus:g} and {gpus:g} beside a core that reads."
        )
    return workers


def plan(
    here: Place,
    there: Place,
    settings: UpscaleSettings,
    deciding: dict,
    shard: tuple[int, int] | None,
    overwrite: bool,
) -> tuple[list[dict], Summary]:
    """A row for each picture that is left, written into a list first, and how many are not."""

    pictures = {name: identity for name, identity in here.files() if is_picture(name) and not there.holds(here, name)}
    if not pictures:
        raise ValueError(f"No pictures in {here.folder} (looked for {', '.join(sorted(PICTURE_SUFFIXES))}).")
    there_already, begun = dict(there.files()), {}
    for name in sorted(there_already):
        if name.startswith(f"{PLANS}/"):
            begun |= {line[0]: line[1:] for line in json.loads(there.read(name))}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
    rows, lines, summary, planned = [], [], Summary(), set()
    for name, picture in sorted(pictures.items()):
        result = result_name(Path(name), settings).as_posix()
        if result in planned:
            raise ValueError(
                f"Two pictures would be written to {there.path(result)}; choose a `suffix` or a `format`."
            )
        planned.add(result)
        if shard and not in_shard(Path(name), shard):
            continue
        lies = there_already.get(result)
        made, of, before = begun.get(result, (None, None, None))
        if (made, of) == (digest, picture) and lies not in (None, before):
            summary.skipped += 1
            continue
        if lies is not None and not overwrite:
            raise ValueError(f"{there.path(result)} exists; pass `overwrite` to replace it, or another place.")
        rows.append({"name": name, "result": result, "replaces": lies is not None})
        lines.append([result, digest, picture, lies])
    if lines:
        number = sum(name.startswith(f"{PLANS}/") for name in there_already)
        there.write(f"{PLANS}/{number:06d}-{uuid.uuid4().hex[:8]}.json", json.dumps(lines).encode())
    return rows, summary


def is_picture(name: str) -> bool:
    """By its suffix; nothing hidden, and nothing in a hidden folder."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not any(part.startswith(".") for part in path.parts)


class Worker:
    """Upscales the files of rows with a pipeline that is loaded once.

    Args:
        settings, there: of the call.
    """

    def __init__(self, settings: UpscaleSettings, there: Place):
        self.upscaler, self.there = FileUpscaler(settings), there

    def __call__(self, row: dict) -> dict:
        return {"report": json.dumps(self.report(**row))}

    def report(self, name: str, result: str, replaces: bool, path: str, content: bytes, error: str) -> dict:
        if error:
            return {"input": path, "error": f"{path}: {error}"}
        output = self.there.path(result)
        if not replaces and self.there.exists(result):  # by a worker that was killed behind it
            return {"input": path, "output": output}
        notes: list[str] = []
        whole = Whole(self.there, result)
        report = self.upscaler(Path(path), Path(output), content=content, stream=whole, say=notes.append)
        return report | ({"notes": notes} if notes else {})


@dataclass
class Whole:
    """Takes the content of a file at once, as a stream."""

    there: Place
    name: str

    def write(self, content: bytes) -> None:
        self.there.write(self.name, content)
