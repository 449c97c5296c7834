"""Folders upscaled by a real local Ray of two workers."""

import contextlib
import json
import os
import signal
import threading
import time

import fsspec
import numpy as np
import PIL.Image
import psutil
import pytest
from conftest import ROOT, make_encoded_pipeline, random_picture

ray = pytest.importorskip("ray", reason="needs the extra `ray`: pip install 'flowsr[ray]'")

from flowsr.cli import main  # noqa: E402
from flowsr.files import read_file  # noqa: E402
from flowsr.ray import Place, upscale  # noqa: E402

slow = pytest.mark.slow  # a worker takes some seconds to import torch


@pytest.fixture(scope="module")
def cluster():
    os.environ.setdefault("RAY_worker_niceness", "0")  # by default workers wait for everything else
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ray.init(
        num_cpus=3, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture
def call(cluster, tmp_path):
    """`call(...)` upscales the folder `in` to `out` with two workers and a tiny network."""
    make_encoded_pipeline().save_pretrained(tmp_path / "checkpoint")
    for number in range(12):
        path = tmp_path / "in" / str(number % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_picture(24, 20, seed=number).save(path)

    def run(source="in", destination="out", **more):
        settings = {"workers": 2, "checkpoint": str(tmp_path / "checkpoint"), "steps": 2, **more}
        return upscale(str(tmp_path / source), str(tmp_path / destination), **settings)

    return run


def whole(tmp_path) -> dict[str, bytes]:
    """What the command line makes of the same pictures, one after the other."""
    arguments = [str(tmp_path / "in"), "-o", str(tmp_path / "one"), "--checkpoint", str(tmp_path / "checkpoint")]
    assert main(["upscale", *arguments, "--steps", "2", "--quiet"]) == 0
    return contents(tmp_path / "one")


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


@slow
def test_two_workers_make_each_file_once_as_one_call_does(call, tmp_path):
    reports = []
    summary = call(on_report=reports.append)
    assert (summary.made, summary.skipped, summary.failures) == (12, 0, [])
    assert len({report["output"] for report in reports}) == len(reports) == 12
    assert contents(tmp_path / "out") == whole(tmp_path)
    # Again: nothing. One more picture, one result less: these two.
    assert call().skipped == 12
    random_picture(9, 9).save(tmp_path / "in/new.png")
    (tmp_path / "out/0/0.png").unlink()
    summary = call()
    assert (summary.made, summary.skipped) == (2, 11)
    # Other settings and other pictures are not taken for done, and not replaced unless that is asked for.
    with pytest.raises(ValueError, match="exists; pass `overwrite`"):
        call(seed=1)
    random_picture(24, 20, seed=99).save(tmp_path / "in/0/2.png")
    with pytest.raises(ValueError, match="exists; pass `overwrite`"):
        call()
    summary = call(overwrite=True)
    assert (summary.made, summary.skipped) == (1, 12)


@slow
def test_a_killed_worker_loses_and_doubles_nothing(call, tmp_path):
    killed, reports = [], []

    def kill_one():
        while len(list((tmp_path / "out").rglob("*.png"))) < 2:
            time.sleep(0.01)
        killed.append(worker())
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = call(on_report=reports.append)
    killer.join()
    assert killed
    assert (summary.made, summary.failures) == (12, [])
    assert len({report["output"] for report in reports}) == len(reports) == 12
    assert contents(tmp_path / "out") == whole(tmp_path)
    assert not list((tmp_path / "out").rglob("*.partial"))


def worker() -> int:
    """A process that holds a pipeline for Ray Data, of this machine."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                return process.pid
    raise AssertionError("no worker runs")


@slow
def test_a_call_that_goes_on_after_one_that_was_cut_off_does_the_rest(call, tmp_path):
    class Stop(Exception):
        pass

    def stop(report):
        raise Stop

    with pytest.raises(Stop):
        call(on_report=stop)
    time.sleep(1)  # what a worker has in hand is finished
    there = contents(tmp_path / "out")
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in there}
    summary = call()
    assert summary.skipped >= 1
    assert summary.made + summary.skipped == 12
    assert contents(tmp_path / "out") == whole(tmp_path)
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in there} == times


@slow
def test_what_files_hold_arrives_and_what_cannot_be_read_is_named(call, tmp_path):
    deep = np.random.default_rng(0).integers(0, 2**16, (20, 24), dtype=np.uint16)
    PIL.Image.fromarray(deep).save(tmp_path / "in/deep.png", icc_profile=b"profile" * 30)
    exif = PIL.Image.Exif()
    exif[315] = "somebody"
    random_picture(16, 16).save(tmp_path / "in/photo.jpg", exif=exif)
    (tmp_path / "in/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "in/closed.png").symlink_to(tmp_path / "in/nothing")
    summary = call(filesystem=fsspec.filesystem("file"))
    assert summary.made == 14
    assert "broken.png" in summary.failures[0]
    large = read_file(tmp_path / "out/deep.png")
    assert large.bits == 16 and large.frames[0].shape[:2] == (80, 96)
    assert PIL.Image.open(tmp_path / "out/photo.jpg").getexif()[315] == "somebody"


@slow
def test_shards_and_the_command_line(call, tmp_path, capsys):
    arguments = ["--engine", "ray", "--workers", "2", "--checkpoint", str(tmp_path / "checkpoint"), "--steps", "2"]
    command = ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *arguments]
    assert main([*command, "--shard", "1/2", "--json"]) == 0
    first = [json.loads(line)["output"] for line in capsys.readouterr().out.splitlines()]
    assert main([*command, "--shard", "2/2"]) == 0
    assert f"{12 - len(first)} of {12 - len(first)} pictures" in capsys.readouterr().out
    assert main(command) == 0
    assert "12 were there already" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole(tmp_path)
    for wrong in (["--compare"], ["--dry-run"], [str(tmp_path / "in/0")]):
        assert main([*command, *wrong]) == 1
        assert "--engine ray" in capsys.readouterr().err
    assert main([*command[:3], "-", *arguments]) == 1


def test_places_are_paths_and_addresses(tmp_path):
    for place in (str(tmp_path), f"file://{tmp_path}", f"local://{tmp_path}"):
        Place.of(place).write("deep/a.txt", b"a")
        assert [name for name, _ in Place.of(place).files()] == ["deep/a.txt"]
    with pytest.raises(ValueError, match="cannot be reached"):
        Place.of("nowhere://a/b")
