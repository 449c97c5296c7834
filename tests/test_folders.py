"""Folders of pictures: which are found, which shard has them, and going on after any end."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_pipeline, random_picture

from flowsr.cli import main
from flowsr.folders import Done, find_tree, in_shard
from flowsr.picture_writer import partial_prefix


@pytest.fixture
def checkpoint(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "in"
    for number, name in enumerate(("a.png", "deep/a.png", "deep/er/b.png", "deep/er/c.png")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        random_picture(9, 6, seed=number).save(root / name)
    return root


def upscale(checkpoint, *arguments) -> int:
    return main(["upscale", *map(str, arguments), "--checkpoint", checkpoint])


def contents(folder) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_folders_are_kept_and_results_are_no_inputs(checkpoint, tree):
    (tree / ".hidden").mkdir()
    random_picture(4, 4).save(tree / ".hidden/d.png")
    for _ in range(2):  # the second time the results lie among the inputs
        assert upscale(checkpoint, tree, "-o", tree / "large", "--overwrite") == 0
    made = {path.relative_to(tree / "large").as_posix() for path in (tree / "large").rglob("*") if path.is_file()}
    assert made == {"a.png", "deep/a.png", "deep/er/b.png", "deep/er/c.png"}


def test_shards_share_the_pictures_out_by_their_paths(tree, tmp_path):
    names = [name for _, name in find_tree([str(tree)], tmp_path)]
    parts = [[name for name in names if in_shard(name, (number, 3))] for number in (1, 2, 3)]
    assert sorted(sum(parts, [])) == names
    (tmp_path / "elsewhere").mkdir()
    tree.rename(tmp_path / "elsewhere/in")
    moved = [name for _, name in find_tree([str(tmp_path / "elsewhere/in")], tmp_path)]
    assert [name for name in moved if in_shard(name, (2, 3))] == parts[1]


def test_two_shards_make_what_one_call_makes(checkpoint, tree, tmp_path):
    assert upscale(checkpoint, tree, "-o", tmp_path / "whole") == 0
    for number in (1, 2):
        call = (tree, "-o", tmp_path / "shards", "--shard", f"{number}/2", "--skip-existing")
        assert upscale(checkpoint, *call) == 0
    assert contents(tmp_path / "shards") == contents(tmp_path / "whole")


def test_what_was_made_alike_is_left_and_all_else_is_refused(checkpoint, tree, tmp_path, capsys):
    out = tmp_path / "out"
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing") == 0
    times = {name: (out / name).stat().st_mtime_ns for name in contents(out)}
    random_picture(5, 5).save(tree / "new.png")
    capsys.readouterr()
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing") == 0
    assert "1 of 1 pictures" in (told := capsys.readouterr().out) and "4 were there already" in told
    assert all((out / name).stat().st_mtime_ns == when for name, when in times.items())
    # Another picture under an old name, other settings, other weights: not what this call would make.
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing", "--steps", 1) == 1
    assert "exists; pass `--overwrite`" in capsys.readouterr().err
    random_picture(9, 6, seed=9).save(tree / "a.png")
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing") == 1
    assert f"{out / 'a.png'} exists" in capsys.readouterr().err
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing", "--overwrite") == 0
    assert "1 of 1 pictures" in (told := capsys.readouterr().out) and "4 were there already" in told
    # A result that is gone is made again, and a line that a crash has cut short is no line.
    (out / "deep/a.png").unlink()
    with open(out / ".flowsr-done.jsonl", "a") as file:
        file.write('["deep/er/b.png", "0123')
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing") == 0
    assert "1 of 1 pictures" in capsys.readouterr().out
    assert upscale(checkpoint, tree, "-o", out, "--skip-existing") == 0
    assert "0 of 0 pictures" in capsys.readouterr().out


def test_a_result_whose_making_was_cut_off_is_made_again_and_one_that_has_its_name_is_not(tmp_path):
    source, target = tmp_path / "a.png", tmp_path / "out/a.png"
    (tmp_path / "out").mkdir()
    source.touch()
    target.write_text("old")
    Done(target.parent, {}).begin(source, target)
    assert not Done(target.parent, {}).has(source, target)
    (tmp_path / "out/new").write_text("new")
    os.replace(tmp_path / "out/new", target)
    assert Done(target.parent, {}).has(source, target)
    assert not Done(target.parent, {"seed": 1}).has(source, target)


def test_unfinished_files_of_dead_processes_are_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {pid: tmp_path / "deep" / f"{partial_prefix(pid)}x.partial" for pid in (ended.pid, os.getpid())}
    (tmp_path / "deep").mkdir()
    for path in names.values():
        path.touch()
    Done(tmp_path, {})
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [names[os.getpid()].name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["-o", "-", "--format", "png"], "need a folder"), (["-o", "one.png"], "needs a folder of results")],
)
def test_going_on_needs_a_folder(checkpoint, tmp_path, monkeypatch, capsys, arguments, message):
    random_picture(4, 4).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    assert upscale(checkpoint, "a.png", *arguments, "--skip-existing") == 1
    assert message in capsys.readouterr().err


def test_a_folder_killed_twenty_times_ends_with_the_same_bytes(checkpoint, tmp_path):
    chance, root, out = random.Random(0), tmp_path / "many", tmp_path / "killed"
    for number in range(40):
        (root / str(number % 3)).mkdir(parents=True, exist_ok=True)
        random_picture(48, 48, seed=number).save(root / str(number % 3) / f"{number}.png")
    torch.set_num_threads(1)
    assert upscale(checkpoint, root, "-o", tmp_path / "whole") == 0
    arguments = ["upscale", str(root), "-o", str(out), "--skip-existing", "--checkpoint", checkpoint, "--quiet"]

    def count() -> int:
        return len(contents(out)) if out.exists() else 0

    for _ in range(20):  # in forks, which need not import torch anew
        before, child = count(), os.fork()
        if child == 0:
            os._exit(main(arguments))
        wanted = before + chance.choice((0, 1, 2))
        while count() < wanted and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it had ended
    assert main(arguments) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.rglob("*.partial"))
    assert all(np.asarray(PIL.Image.open(out / name)).shape == (192, 192, 3) for name in contents(out))
