"""A folder of pictures, of which some fail, and one that several machines share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import torch
from conftest import ROOT, make_ddpm, make_encoded_pipeline, random_picture

from flowsr import upscaler
from flowsr.cli import main
from flowsr.folders import in_shard, shard_of_process


@pytest.fixture
def call(tmp_path):
    make_encoded_pipeline().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "in").mkdir()
    for number in range(4):
        random_picture(8, 6 + number).save(tmp_path / f"in/{number}.png")
    place = ["--checkpoint", str(tmp_path / "checkpoint"), "--steps", "1"]
    return ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *place]


def failing(monkeypatch, error: Exception, name: str, below_tile: int):
    """The network's work on one picture fails, in tiles larger than `below_tile`; the rest is as it is."""
    whole = upscaler.upscale_file

    def upscale_file(pipe, source, target, **options):
        if target.name == name and (options["tile"] or 9999) > below_tile:
            raise error
        return whole(pipe, source, target, **options)

    monkeypatch.setattr(upscaler, "upscale_file", upscale_file)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."),
              RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")]
)  # fmt: skip
def test_memory_that_runs_out_is_tried_once_more_in_small_tiles(call, tmp_path, monkeypatch, capsys, error):
    failing(monkeypatch, error, "1.png", 128)
    assert main(call) == 0
    assert "1.png: out of memory; once more in tiles of 128" in capsys.readouterr().err
    assert PIL.Image.open(tmp_path / "out/1.png").size == (32, 28)


@pytest.mark.parametrize("error", [MemoryError(), OSError(28, "No space left on device"), RuntimeError("broken")])
def test_after_any_failure_the_rest_is_done(call, tmp_path, monkeypatch, capsys, error):
    failing(monkeypatch, error, "1.png", 0)
    assert main(call) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "1.png" in line and "once more" not in line]
    assert (str(error) or "out of memory") in line
    assert "3 of 4 pictures" in captured.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "2.png", "3.png"]


def test_shards_do_each_picture_once(call, tmp_path, capsys):
    assert main(call) == 0
    whole = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    made = {}
    for shard in ("1/3", "2/3", "3/3"):
        out = tmp_path / shard.replace("/", "of")
        assert main([*call, "--shard", shard, "-o", str(out)]) == 0
        part = {path.name: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        assert not made.keys() & part.keys()
        made |= part
    assert made == whole
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit):
            main([*call, "--shard", wrong])
        assert "a shard is I/N" in capsys.readouterr().err


@pytest.mark.parametrize("make", [make_encoded_pipeline, make_ddpm])
def test_lines_of_json_tell_the_steps_of_every_picture(make, call, tmp_path, capsys):
    make().save_pretrained(tmp_path / "checkpoint")
    assert main([*call, "--steps", "3", "--json-progress"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for number in range(4):
        mine = [line for line in lines if line["input"].endswith(f"{number}.png")]
        steps = [(line["step"], line["steps"]) for line in mine if line.get("step")]
        assert steps == [(1, 3), (2, 3), (3, 3)]
        assert all(line["seconds_left"] >= 0 for line in mine[:-1])
        assert mine[-1]["width"] == 32
    assert main([*call, "--overwrite", "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_time_is_told_before_work_of_above_a_minute(call, tmp_path, capsys, monkeypatch):
    random_picture(500, 400).save(tmp_path / "in/large.png")
    monkeypatch.setattr("flowsr.estimate.measure", lambda *shape, **options: 1.0)  # second for an LR pixel
    upscaled = []
    monkeypatch.setattr("flowsr.upscaler.upscale_file", lambda *given, **how: upscaled.append(given) or (1, 1))
    assert main(call) == 0
    assert "about 55:" in capsys.readouterr().err.splitlines()[0]  # 500x400 pixels and four of 8x6 to 8x9: 55 hours
    assert main([*call, "--quiet"]) == 0
    assert "about" not in capsys.readouterr().err
    assert len(upscaled) == 10


def test_a_picture_in_one_piece_that_does_not_fit_is_refused(call, tmp_path, capsys, monkeypatch):
    make_ddpm().save_pretrained(tmp_path / "checkpoint")
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 50_000}))
    assert main(call) == 1
    assert "in one piece" in capsys.readouterr().err


def test_launched_processes_share_what_one_would_do(monkeypatch):
    names = [Path(f"{number}.png") for number in range(50)]
    for shard in (None, (2, 3)):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert shard_of_process(shard) == shard
        shares = []
        for rank in range(4):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "4")
            shares += [name for name in names if in_shard(name, shard_of_process(shard))]
        assert sorted(shares) == sorted(name for name in names if shard is None or in_shard(name, shard))


def test_two_launched_processes_make_what_one_makes(call, tmp_path):
    for number in range(4, 8):
        random_picture(8, 6, seed=number).save(tmp_path / f"in/{number}.png")
    assert main([*call, "-o", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "flowsr"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *call], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, expected = ({path.name: path.read_bytes() for path in (tmp_path / at).iterdir()} for at in ("out", "one"))
    assert made == expected
    counts = [int(line.split()[0]) for line in done.stdout.splitlines() if "pictures written" in line]
    assert len(counts) == 2 and sum(counts) == 8 and 0 < min(counts)
