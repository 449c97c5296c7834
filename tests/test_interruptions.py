"""Whatever ends a run, the newest whole checkpoint goes on from there, to the bit."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowsr.training import checkpoints

SCHEDULE = (
    "--config", "configs/tiny.yaml", "--train_batch_size", 2, "--gradient_accumulation_steps", 2,
    "--num_validation_images", 0, "--logging_steps", 1, "--lr_warmup_steps", 0,
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def equal(a: Path, b: Path) -> bool:
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def run(train_script, photo_folder):
    def run(output, *arguments, **how):
        return train_script(*SCHEDULE, "--train_data_dir", photo_folder, "--output_dir", output, *arguments, **how)

    return run


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(run, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    schedule = ("--lr_scheduler", "constant", "--checkpointing_steps", 7)
    assert run(whole, *schedule, "--max_train_steps", 14).status == 0
    assert run(parts, *schedule, "--max_train_steps", 7).status == 0
    done = run(parts, *schedule, "--max_train_steps", 14, "--resume_from_checkpoint", "latest")
    assert "7 steps, 28 crops" in done.output  # in the middle of a pass over the 9 pictures
    assert equal(whole, parts)
    last = {}
    for folder in (whole, parts):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        last[folder] = [line["loss"] for line in lines if line.get("step") == 14 and "loss" in line]
    assert last[whole] == last[parts]
    # All of the state, not only what the pipeline keeps: optimiser, average, schedule, random numbers.
    for name in ("model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"):
        a, b = ((folder / "checkpoint-14" / name) for folder in (whole, parts))
        if name.endswith(".safetensors"):
            assert all(torch.equal(x, y) for x, y in zip(load_file(a).values(), load_file(b).values()))
        else:
            a, b = (json.dumps(torch.load(path, weights_only=False), default=str) for path in (a, b))
            assert a == b


def test_after_twenty_kills_at_random_moments_the_run_ends_as_if_there_had_been_none(run, tmp_path):
    chance, out = random.Random(0), tmp_path / "killed"
    schedule = ("--lr_scheduler", "constant", "--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")

    def newest() -> int:
        return max([int(path.name.split("-")[1]) for path in checkpoints.found_in(out)], default=0)

    for _ in range(20):  # at most three checkpoints on, then at any moment of the next ones, or of the start
        ahead = chance.choice((0, 1, 2, 3))
        moment = (str(out), newest() + ahead, chance.uniform(0, 1.5 if ahead == 0 else 0.1))
        assert run(out, *schedule, "--max_train_steps", 10**6, kill=moment).status == -9
    steps = newest() + 3
    assert run(out, *schedule, "--max_train_steps", steps).status == 0
    assert run(tmp_path / "whole", *schedule, "--max_train_steps", steps).status == 0
    assert equal(tmp_path / "whole", out)


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_signal_to_end_saves_and_says_so(run, tmp_path, loaders):
    schedule = ("--max_train_steps", 200, "--checkpointing_steps", 1000, "--dataloader_num_workers", loaders)
    begun = "steps to go" if not loaders else "images_per_s="  # by when the loaders are there
    done = run(tmp_path / "stopped", *schedule, terminate_at=begun)
    assert done.status == 143
    (checkpoint,) = checkpoints.found_in(tmp_path / "stopped")
    step = int(checkpoint.name.split("-")[1])
    assert 1 <= step < 200
    assert f"Stopped by a signal after step {step}" in done.output
    assert checkpoints.damage(checkpoint) is None


def test_a_full_disk_is_named_and_costs_nothing(run, tmp_path):
    schedule = ("--checkpointing_steps", 5, "--lr_scheduler", "constant")
    assert run(tmp_path / "run", *schedule, "--max_train_steps", 5).status == 0
    resume = ("--max_train_steps", 10, "--resume_from_checkpoint", "latest")
    done = run(tmp_path / "run", *schedule, *resume, file_limit=100_000)
    assert done.status == 1
    assert "checkpoint-10 could not be written" in done.output
    assert "Checkpoints still there: checkpoint-5" in done.output
    assert "Traceback" not in done.output
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-5"]
    assert checkpoints.damage(tmp_path / "run/checkpoint-5") is None
    assert run(tmp_path / "run", *schedule, *resume).status == 0
    assert run(tmp_path / "whole", *schedule, "--max_train_steps", 10).status == 0
    assert equal(tmp_path / "run", tmp_path / "whole")


def test_a_damaged_checkpoint_is_named_and_passed_over(run, tmp_path):
    out = tmp_path / "run"
    assert run(out, "--max_train_steps", 6, "--checkpointing_steps", 3).status == 0
    broken = out / "checkpoint-6/model.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    done = run(out, "--max_train_steps", 7, "--checkpointing_steps", 3, "--resume_from_checkpoint", "latest")
    assert "checkpoint-6 is damaged and passed over: model.safetensors is not what was written" in done.output
    assert "3 steps, 12 crops" in done.output
    shutil.rmtree(out / "checkpoint-7")
    done = run(out, "--max_train_steps", 7, "--resume_from_checkpoint", out / "checkpoint-6")
    assert done.status == 0  # written again by the run before
    (out / "checkpoint-7/optimizer.bin").unlink()
    done = run(out, "--max_train_steps", 8, "--resume_from_checkpoint", out / "checkpoint-7")
    assert done.status == 1
    assert "is damaged: optimizer.bin is missing" in done.output
    for path in checkpoints.found_in(out):
        (path / "manifest.json").unlink()
    done = run(out, "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert "Every checkpoint in" in done.output


def test_a_loss_that_is_not_finite_ends_the_run_and_saves_nothing(run, tmp_path):
    done = run(tmp_path / "run", "--max_train_steps", 6, "--learning_rate", "1e30")
    assert done.status == 1
    assert "The loss is" in done.output
    assert checkpoints.found_in(tmp_path / "run") == []
