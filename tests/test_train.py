"""The training script as a user runs it; results are read back from disk. And the parts it is made of."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import random_picture, smooth_picture
from safetensors.torch import load_file

from flowsr import FlowMatchSRPipeline, UNetSRModel
from flowsr.data import CropDataset, load_images, to_tensor, turn
from flowsr.degradations import downscale
from flowsr.objectives import condition_dropped, generators_for, sigmas_for

ROOT = Path(__file__).resolve().parents[1]


def train(*arguments, launch=False):
    program = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"] if launch else [sys.executable]
    call = [*program, str(ROOT / "train_sr.py"), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT)


def tiny(photos, output, *arguments, **kwargs):
    done = train(
        "--config", "configs/tiny.yaml", "--train_data_dir", photos, "--output_dir", output, *arguments, **kwargs
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def test_a_run_learns_and_leaves_a_pipeline_with_its_record(photo_folder, tmp_path):
    out = tmp_path / "run"
    tiny(photo_folder, out, "--max_train_steps", 150, "--learning_rate", 0.004, launch=True)
    losses = [r["loss"] for r in records(out) if "loss" in r]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:2])
    validations = [r for r in records(out) if r.get("event") == "validation"]
    assert validations[-1]["step"] == 150
    assert validations[-1]["psnr_y_1"] > validations[0]["psnr_y_1"]
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert settings["max_train_steps"] == 150
    assert settings["resolution"] == 64
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-100", "checkpoint-150"]
    pipe = FlowMatchSRPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    lr = smooth_picture(24, 20)
    assert pipe(lr).images[0].size == (96, 80)


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(photo_folder, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = ("--lr_scheduler", "constant", "--gradient_accumulation_steps", 2, "--checkpointing_steps", 7)
    tiny(photo_folder, whole, "--max_train_steps", 14, *schedule)
    tiny(photo_folder, parts, "--max_train_steps", 7, *schedule)
    done = tiny(photo_folder, parts, "--max_train_steps", 14, *schedule, "--resume_from_checkpoint", "latest")
    assert "7 steps, 56 crops" in done.stdout
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [r["loss"] for r in records(whole) if r.get("step") == 14 and "loss" in r] == [
        r["loss"] for r in records(parts) if r.get("step") == 14 and "loss" in r
    ]


def test_accumulation_equals_a_large_batch(photo_folder, tmp_path):
    runs = {"large": (8, 1), "small": (2, 4)}
    for name, (batch, accumulation) in runs.items():
        tiny(
            photo_folder, tmp_path / name, "--max_train_steps", 3, "--train_batch_size", batch,
            "--gradient_accumulation_steps", accumulation, "--logging_steps", 1,
        )  # fmt: skip
    large, small = ([r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in runs)
    np.testing.assert_allclose(large, small, atol=2e-6)
    a, b = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


def test_bf16_and_fine_tuning(photo_folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    tiny(photo_folder, first, "--max_train_steps", 20, "--mixed_precision", "bf16")
    tiny(
        photo_folder, second, "--max_train_steps", 1, "--learning_rate", "1e-9", "--ema_decay", 0,
        "--pretrained_model_name_or_path", first,
    )  # fmt: skip
    a, b = weights(first), weights(second)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)


def test_condition_dropout_is_trained_and_recorded(photo_folder, tmp_path):
    unet = {"block_out_channels": [8], "layers_per_block": 1, "mid_layers": 0, "time_embedding_dim": 8}
    tiny(
        photo_folder, tmp_path / "run", "--max_train_steps", 2, "--num_validation_images", 0,
        "--unet", json.dumps({**unet, "condition_dropout": 0.5}),
    )  # fmt: skip
    assert UNetSRModel.from_pretrained(tmp_path / "run/unet").config.condition_dropout == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "66"], "multiple of 4"),
        (["--resolution", "128"], "are smaller than a crop of 128"),
        (["--mixed_precision", "fp16"], "on a CPU use bf16"),
        (["--train_data_dir", "absent"], "there is no absent"),
        (["--loss", "l3"], "`loss` must be one of"),
        (["--max_train_steps", "0"], "must be positive"),
        (["--num_validation_images", "4"], "none is left to train on"),
        (["--unet", '{"widths": [8]}'], "unknown settings ['widths']"),
        (["--unet", "{"], "`unet` is not JSON"),
        (["--resume_from_checkpoint", "absent"], "there is no folder absent"),
        (["--config", "absent.yaml"], "there is no file absent.yaml"),
        (["--dataset_name", "x/y"], "Give either"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(photo_folder, tmp_path, arguments, message, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    import train_sr

    base = ["--train_data_dir", str(photo_folder), "--output_dir", str(tmp_path / "run")]
    config = [] if "--config" in arguments else ["--config", "configs/tiny.yaml"]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        train_sr.main([*config, *base, *arguments])
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unknown_keys_in_the_config_are_named(photo_folder, tmp_path):
    (tmp_path / "wrong.yaml").write_text("resolutoin: 64\n")
    done = train("--config", tmp_path / "wrong.yaml", "--train_data_dir", photo_folder)
    assert done.returncode == 1
    assert "unknown settings ['resolutoin']" in done.stderr
    assert "Traceback" not in done.stderr


def test_every_config_is_known():
    sys.path.insert(0, str(ROOT))
    import train_sr

    for path in sorted((ROOT / "configs").glob("*.yaml")):
        settings = train_sr.parse_settings(["--config", str(path), "--seed", "7"])
        assert settings.seed == 7
        with torch.device("meta"):
            UNetSRModel(**settings.unet)


# The parts.


def test_crops_are_aligned_and_a_function_of_seed_and_index(photo_folder):
    images = load_images([str(photo_folder)], None)
    stream = CropDataset(images, 32, 4, seed=3, start=0, length=40, cache_gib=1.0)
    later = CropDataset(images, 32, 4, seed=3, start=10, length=30, cache_gib=0.0)
    for i in (0, 7, 25):
        for key in ("hr", "lr", "index"):
            assert torch.equal(stream[10 + i][key], later[i][key])
    assert not torch.equal(stream[0]["hr"], CropDataset(images, 32, 4, 4, 0, 1, 1.0)[0]["hr"])
    crop = stream[5]
    assert crop["hr"].shape == (3, 32, 32)
    # Away from the edges of the crop its LR is that of the crop alone.
    levels = ((crop["hr"].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    again = to_tensor(downscale(levels, 4))
    assert (again - crop["lr"])[:, 2:-2, 2:-2].abs().max() <= 1 / 127.5 + 1e-6


def test_each_pass_sees_every_picture_once(photo_folder):
    images = load_images([str(photo_folder)], None)
    stream = CropDataset(images, 32, 4, seed=0, start=0, length=8, cache_gib=1.0)
    seen = []
    stream.pair = lambda picture: seen.append(picture) or CropDataset.pair(stream, picture)
    for i in range(8):
        stream[i]
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_turns_are_the_eight_symmetries():
    square = np.arange(9).reshape(3, 3)
    assert len({turn(square, s).tobytes() for s in range(8)}) == 8


def test_pictures_come_from_zips_too(photo_folder, tmp_path):
    import shutil

    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", photo_folder)
    images = load_images([archive, str(photo_folder)], None)
    assert len(images) == 8
    assert images[0]["image"].size == images[4]["image"].size


def test_folders_without_pictures_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no readable picture"):
        load_images([str(tmp_path)], None)


def test_noise_levels_follow_their_law_in_every_run_of_crops():
    index = torch.arange(5000, 7000)
    sigmas = sigmas_for(index, seed=1, atom=0.4)
    assert sigmas.dtype == torch.float32
    assert abs(float((sigmas == 1).float().mean()) - 0.4) < 0.002
    spread = sigmas[sigmas < 1].double()
    assert 0.02 < spread.min()
    quantiles = torch.quantile(spread, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    np.testing.assert_allclose(quantiles, 0.02 + 0.98 * np.array([0.25, 0.5, 0.75]), atol=0.01)
    for start in range(0, 1000, 8):  # any eight neighbours hold 3 or 4 at sigma = 1
        assert 2 <= int((sigmas[start : start + 8] == 1).sum()) <= 4
    assert torch.equal(sigmas[10:20], sigmas_for(index[10:20], 1, 0.4))


def test_dropped_conditions_have_their_share_independent_of_the_noise_level():
    index = torch.arange(20000)
    dropped = condition_dropped(index, 0, 0.1)
    assert abs(float(dropped.float().mean()) - 0.1) < 0.002
    atom = sigmas_for(index, 0, 0.4) == 1
    assert abs(float(dropped[atom].float().mean()) - 0.1) < 0.01


def test_noise_of_a_crop_does_not_depend_on_its_batch():
    draw = lambda index: [torch.rand(3, generator=g) for g in generators_for(torch.tensor(index), 5)]  # noqa: E731
    assert torch.equal(draw([4, 9])[1], draw([9])[0])
    assert not torch.equal(draw([4])[0], draw([9])[0])


def test_small_pictures_are_listed(tmp_path):
    from flowsr.data import smaller_than

    random_picture(40, 90).save(tmp_path / "small.png")
    random_picture(90, 90).save(tmp_path / "large.png")
    (found,) = smaller_than(load_images([str(tmp_path)], None), 64)
    assert "small.png (40x90)" in found
