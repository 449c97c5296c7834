"""What a picture will take, against what it takes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import make_encoded_pipeline, make_pipeline, random_picture

from flowsr.cli import main
from flowsr.estimate import estimate
from flowsr.streaming import Upscaled


def test_size_parts_and_disk_are_those_of_the_work():
    pipe, done = make_encoded_pipeline(), []
    found = pipe.estimate((75, 110), 2, tile=40)
    image = np.zeros((110, 75, 3), np.uint8)
    large = Upscaled(image, pipe, 2, tile=40, progress=done.append)[:]
    assert (found.width, found.height) == (300, 440)
    assert found.parts == done[-1].part == done[-1].parts == 6
    assert found.disk == large.nbytes
    assert found.seconds > 0


def test_memory_grows_with_the_width_of_a_part_and_not_with_the_height_of_the_picture():
    pipe = make_encoded_pipeline()
    estimate(pipe, (500, 500), num_inference_steps=2)  # the first call takes memory of its own
    base, tall, wide, coarse = (
        estimate(pipe, size, tile=tile, num_inference_steps=2).memory / 2**20
        for size, tile in (((500, 500), 100), ((500, 5000), 100), ((5000, 500), 100), ((500, 500), 400))
    )
    assert abs(tall - base) < 8
    assert 12 < wide - base < 32  # a band of 400 rows of 20,000 pixels instead of 2,000, one byte a channel
    assert coarse > base + 5


def test_what_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="raise `max_memory`"):
        estimate(make_encoded_pipeline(), (500, 500), max_memory=2**20)
    with pytest.raises(ValueError, match="in one piece"):
        estimate(make_pipeline(), (200_000, 200_000))


def test_memory_of_a_part_is_within_a_factor_of_what_a_process_takes():
    """In processes of their own, since memory that was let go of is taken again. One step takes less: no head runs."""
    script = """
import os, resource, sys
import numpy as np
sys.path.insert(0, "tests")
from conftest import make_encoded_pipeline
from flowsr.streaming import bytes_per_pixel
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
pipe = make_encoded_pipeline(encoder_channels=64, head_channels=64)
pipe(np.zeros((16, 16, 3), np.uint8), 3)
for steps, side in ((1, 220), (2, 180), (2, 260), (4, 220)):
    if os.fork() == 0:
        before = peak()
        pipe(np.zeros((side, side, 3), np.uint8), steps, output_type="np")
        print(steps, bytes_per_pixel(pipe) * side**2 / (peak() - before), flush=True)
        os._exit(0)
    os.wait()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    (_, alone), *others = (map(float, line.split()) for line in done.stdout.splitlines())
    assert alone > 1
    assert len(others) == 3
    for _, ratio in others:
        assert 1 / 1.5 < ratio < 1.5


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    make_encoded_pipeline().save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "in").mkdir()
    random_picture(20, 10).save(tmp_path / "in/a.png")
    random_picture(8, 8, "L").save(tmp_path / "in/b.png")
    call = ["upscale", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--dry-run", "--steps", "1"]
    call += ["--checkpoint", str(tmp_path / "checkpoint")]
    assert main(call) == 0
    assert "20x10 -> 80x40 in 1 parts" in capsys.readouterr().out
    assert main([*call, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["width"], line["disk"]) for line in lines] == [(80, 80 * 40 * 3), (32, 32 * 32)]
    assert main([*call, "--max-pixels", "2000"]) == 1
    assert "raise `--max-pixels`" in capsys.readouterr().err
    (tmp_path / "in/c.png").write_text("no picture")
    assert main(call) == 1
    assert "c.png: not a picture" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
