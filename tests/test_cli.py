"""The command line, with files as people have them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
from conftest import make_pipeline, random_picture, smooth_picture

import flowsr
from flowsr.cli import main
from flowsr.files import UnreadableError, read_picture, save_picture


@pytest.fixture
def checkpoint(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "checkpoint")
    return str(tmp_path / "checkpoint")


def run(checkpoint, *arguments):
    command, *rest = [str(a) for a in arguments]
    return main([command, *rest, "--checkpoint", checkpoint])


def test_upscales_files_and_folders(checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    random_picture(9, 6).save(tmp_path / "in/a.png")
    random_picture(8, 7).save(tmp_path / "in/b.jpg")
    random_picture(5, 5).save(tmp_path / "c.webp")
    assert run(checkpoint, "upscale", tmp_path / "in", tmp_path / "c.webp", "-o", tmp_path / "out", "--compare") == 0
    sizes = {p.name: PIL.Image.open(p).size for p in (tmp_path / "out").iterdir()}
    assert sizes == {
        "a.png": (36, 24), "a_compare.png": (72, 24), "b.jpg": (32, 28), "b_compare.png": (64, 28),
        "c.webp": (20, 20), "c_compare.png": (40, 20),
    }  # fmt: skip
    assert "3 of 3" in capsys.readouterr().out


def test_one_file_to_one_name_and_the_seed_repeats_it(checkpoint, tmp_path):
    random_picture(9, 6).save(tmp_path / "a.png")
    for name, seed in (("1.png", 3), ("2.png", 3), ("3.png", 4)):
        run(checkpoint, "upscale", tmp_path / "a.png", "-o", tmp_path / name, "--seed", seed, "--steps", 2)
    contents = [np.asarray(PIL.Image.open(tmp_path / f"{i}.png")) for i in (1, 2, 3)]
    assert np.array_equal(contents[0], contents[1])
    assert not np.array_equal(contents[0], contents[2])


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_orientation_is_applied_and_profile_and_exif_kept(checkpoint, tmp_path, suffix):
    picture = smooth_picture(12, 8)
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a camera"  # to be turned by 90 degrees; maker
    exif.get_ifd(0x8769)[0xA002], exif.get_ifd(0x8769)[0xA003] = 12, 8  # pixel dimensions
    profile = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
    picture.save(tmp_path / f"a.{suffix}", exif=exif.tobytes(), icc_profile=profile)
    assert run(checkpoint, "upscale", tmp_path / f"a.{suffix}", "-o", tmp_path / "out") == 0
    out = PIL.Image.open(tmp_path / f"out/a.{suffix}")
    assert out.size == (32, 48)
    assert out.info["icc_profile"] == profile
    kept = out.getexif()
    assert kept[0x010F] == "a camera"
    assert 0x0112 not in kept or kept[0x0112] == 1
    assert (kept.get_ifd(0x8769)[0xA002], kept.get_ifd(0x8769)[0xA003]) == (32, 48)


def test_alpha_is_kept(checkpoint, tmp_path):
    random_picture(6, 5, "RGBA").save(tmp_path / "a.png")
    run(checkpoint, "upscale", tmp_path / "a.png", "-o", tmp_path / "out")
    assert PIL.Image.open(tmp_path / "out/a.png").mode == "RGBA"


def bad_files(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("This is no picture.")
    random_picture(40, 40).save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:700])
    (folder / "whole.jpg").unlink()
    frames = [random_picture(4, 4, seed=i) for i in range(2)]
    frames[0].save(folder / "two.jpg", format="TIFF", save_all=True, append_images=frames[1:])
    return {"empty.png": "is empty", "text.png": "not a picture", "cut.jpg": "broken or cut", "two.jpg": "2 frames"}


def test_bad_files_are_named_and_the_others_done(checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    messages = bad_files(tmp_path / "in")
    random_picture(4, 4).save(tmp_path / "in/good.png")
    assert run(checkpoint, "upscale", tmp_path / "in", "-o", tmp_path / "out") == 1
    captured = capsys.readouterr()
    for name, message in messages.items():
        (line,) = [line for line in captured.err.splitlines() if name in line and line.startswith("flowsr:")]
        assert message in line
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]
    assert "1 of 5" in captured.out


def test_impossible_calls_say_so_and_write_nothing(checkpoint, tmp_path, capsys):
    random_picture(4, 4).save(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    random_picture(4, 4).save(tmp_path / "sub/a.png")
    (tmp_path / "empty").mkdir()
    a, sub, out = tmp_path / "a.png", tmp_path / "sub/a.png", tmp_path / "out"
    calls = {
        "There is no": ["upscale", tmp_path / "absent.png", "-o", out],
        "No pictures": ["upscale", tmp_path / "empty", "-o", out],
        "Two inputs": ["upscale", a, sub, "-o", out],
        "would be overwritten": ["upscale", a, "-o", tmp_path],
        "is one file": ["upscale", a, sub, "-o", tmp_path / "b.png"],
        "`fidelity` must lie": ["upscale", a, "-o", out, "--fidelity", "2"],
        "whole number from 1": ["upscale", a, "-o", out, "--steps", "0"],
        "bfloat16": ["upscale", a, "-o", out, "--dtype", "float16"],
    }
    for message, call in calls.items():
        assert run(checkpoint, *call) == 1
        assert message in capsys.readouterr().err, call
    assert not out.exists() or not list(out.iterdir())


def test_missing_and_damaged_checkpoints_are_named(checkpoint, tmp_path, capsys):
    random_picture(4, 4).save(tmp_path / "a.png")
    (tmp_path / "nothing").mkdir()
    cases = {"x9": "no bundled checkpoint", str(tmp_path / "absent"): "There is no checkpoint folder",
             str(tmp_path / "nothing"): "no model_index.json"}  # fmt: skip
    for name, message in cases.items():
        assert run(name, "upscale", tmp_path / "a.png", "-o", tmp_path / "out") == 1
        assert message in capsys.readouterr().err
    weights = tmp_path / "checkpoint/unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert run(checkpoint, "upscale", tmp_path / "a.png", "-o", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "cannot be loaded" in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_evaluate_prints_a_table_and_writes_json(checkpoint, tmp_path, capsys):
    (tmp_path / "hr").mkdir()
    smooth_picture(48, 40).save(tmp_path / "hr/a.png")
    assert run(checkpoint, "evaluate", tmp_path / "hr", "--steps", 1, 2, "--json", tmp_path / "result.json") == 0
    out = capsys.readouterr().out
    assert "| bicubic |" in out
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert f"{rows[2]['psnr_y']:.2f}" in out


def test_info_and_demo(checkpoint, tmp_path, capsys):
    assert run(checkpoint, "info") == 0
    out = capsys.readouterr().out
    assert "x4" in out
    assert "exact, halo 44 pixels" in out
    assert main(["info", "--json", "--checkpoint", "digits"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert set(parts["bundled"]) == {
        path.parent.name for path in Path(flowsr.__file__).parent.glob("weights/*/model_index.json")
    }
    assert {"device", "memory", "precision"} <= set(parts["machine"])
    assert parts["checkpoint"]["scale"] == "none: it generates pictures"
    assert run(checkpoint, "demo", "-o", tmp_path / "demo", "--steps", 1) == 0
    out = capsys.readouterr().out
    assert "PSNR-Y" in out
    lr, large, row = (PIL.Image.open(tmp_path / "demo" / n).size for n in ("lr.png", "flowsr.png", "comparison.png"))
    assert large == (lr[0] * 4, lr[1] * 4)
    assert row == (large[0] * 3, large[1])


def test_runs_as_a_program():
    def run_module(*arguments):
        done = subprocess.run([sys.executable, "-m", "flowsr", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for command in ("upscale", "evaluate", "info", "card", "demo"):
        assert command in run_module("--help")
        assert "flowsr " + command in run_module(command, "--help").rpartition("\nexample")[2]
    assert run_module("--version") == f"flowsr {flowsr.__version__}\n"


def test_completion_knows_commands_and_options(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    assert "upscale" in script
    assert "--fidelity" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_upscale_reports_in_json_or_not_at_all(checkpoint, tmp_path, capsys):
    random_picture(5, 4).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    pictures = tmp_path / "a.png", tmp_path / "b.png"
    assert run(checkpoint, "upscale", *pictures, "-o", tmp_path / "out", "--json") == 1
    captured = capsys.readouterr()
    good, bad = map(json.loads, captured.out.splitlines())
    assert (good["input"], good["output"]) == (str(tmp_path / "a.png"), str(tmp_path / "out/a.png"))
    assert (good["width"], good["height"]) == PIL.Image.open(good["output"]).size == (20, 16)
    assert bad["input"] == str(tmp_path / "b.png")
    assert f"flowsr: {bad['error']}" in captured.err
    assert run(checkpoint, "upscale", pictures[0], "-o", tmp_path / "out", "--quiet", "--overwrite") == 0
    assert capsys.readouterr() == ("", "")


def test_a_diffusion_in_the_demo_and_the_dial_that_it_lacks(tmp_path, capsys):
    assert main(["demo", "--checkpoint", "ddpm_x4", "-o", str(tmp_path / "demo"), "--steps", "1"]) == 0
    assert "flowsr, 1 steps" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["comparison.png", "flowsr.png", "lr.png"]
    random_picture(5, 4).save(tmp_path / "a.png")
    call = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--checkpoint"]
    assert main([*call, "ddpm_x4", "--fidelity", "0.5"]) == 1
    assert "a dial of flow matching" in capsys.readouterr().err
    assert main([*call, "digits"]) == 1
    assert "generates pictures and upscales none" in capsys.readouterr().err


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jpg"
    random_picture(4, 4).save(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="cannot hold"):
        save_picture(random_picture(4, 4, "RGBA"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.jpg"]
    with pytest.raises(ValueError, match="flowsr writes"):
        save_picture(random_picture(4, 4), tmp_path / "a.gif")


def test_sixteen_bit_colour_is_refused_rather_than_cut(tmp_path):
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(12) for _ in range(2))
    path = tmp_path / "deep.png"
    png = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    with pytest.raises(UnreadableError, match="16 bits"):
        read_picture(path)


def test_degrade_shows_the_original_and_its_draws(tmp_path, capsys):
    random_picture(34, 32).save(tmp_path / "in.png")
    call = ["degrade", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--count", "4"]
    assert main([*call, "--degradation", "bsrgan"]) == 0
    grid = np.asarray(PIL.Image.open(tmp_path / "out.png"))
    assert grid.shape == (64, 128, 3)
    assert np.array_equal(grid[:32, :32], np.asarray(PIL.Image.open(tmp_path / "in.png"))[:, :32])
    assert not np.array_equal(grid[:32, 32:64], grid[:32, 64:96])
    assert main([*call, "--degradation", "rain"]) != 0
    assert "must be one of" in capsys.readouterr().err
