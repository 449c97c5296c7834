"""Whatever ends a run, the newest whole checkpoint goes on from there, to the bit."""

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flowsr import checkpoints

SCHEDULE = (
    "--config", "configs/tiny.yaml", "--train_batch_size", 2, "--gradient_accumulation_steps", 2,
    "--num_validation_images", 0, "--logging_steps", 1, "--lr_warmup_steps", 0,
)  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def lines_of(folder: Path) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


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


def test_a_signal_to_end_saves_and_says_so(run, tmp_path):
    schedule = ("--max_train_steps", 200, "--checkpointing_steps", 1000)
    done = run(tmp_path / "stopped", *schedule, terminate_at="steps to go")
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
    assert checkpoints.damage(broken.parent) is None  # written again
    (out / "checkpoint-7/optimizer.bin").unlink()
    done = run(out, "--max_train_steps", 8, "--resume_from_checkpoint", out / "checkpoint-7")
    assert done.status == 1
    assert "is damaged: optimizer.bin is missing" in done.output
    for path in checkpoints.found_in(out):
        (path / "manifest.json").unlink()
    done = run(out, "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert "Every checkpoint in" in done.output


@pytest.mark.parametrize("weight", ["1e39", "1e30"], ids=["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_and_saves_nothing(run, tmp_path, weight):
    blown_up = ("--colour_weight", weight, "--max_train_steps", 2, "--checkpointing_steps", 1)
    done = run(tmp_path / "run", *blown_up)
    assert done.status == 1
    assert f"The {'loss' if weight == '1e39' else 'norm of the gradient'} is inf at step 1." in done.output
    assert checkpoints.found_in(tmp_path / "run") == []


def test_changes_on_the_way_are_printed_and_hold_or_are_refused(run, tmp_path):
    out, resume = tmp_path / "run", ("--resume_from_checkpoint", "latest", "--max_train_steps", 8)
    schedule = ("--lr_scheduler", "constant", "--checkpointing_steps", 3)
    assert run(out, *schedule, "--max_train_steps", 6).status == 0
    for changed, message in (
        (("--optimizer", "muon"), "`optimizer` is 'muon', but"),
        (("--unet", '{"block_out_channels": [8]}'), "checkpoint-6 does not fit the network"),
        (("--max_train_steps", 5), "checkpoint-6 has 6 steps done, more than the 5"),
    ):
        done = run(out, *schedule, *resume, *changed)
        assert done.status == 1
        assert message in done.output
        assert "Traceback" not in done.output
    assert yaml.safe_load((out / "settings.yaml").read_text())["max_train_steps"] == 6  # as it was
    rates = ("--learning_rate", 0.0005, "--adam_beta1", 0.5, "--ema_decay", 0.5)
    done = run(out, *schedule, *resume, *rates)
    assert done.status == 0, done.output
    assert "Changed since then: ema_decay from 0.9 to 0.5." in done.output
    assert [line["learning_rate"] for line in lines_of(out)][-2:] == [0.0005] * 2
    state = torch.load(out / "checkpoint-8/optimizer.bin")["param_groups"][0]
    assert (state["lr"], state["betas"][0]) == (0.0005, 0.5)
    assert torch.load(out / "checkpoint-8/custom_checkpoint_0.pkl")["decay"] == 0.5
    # Without a change of the rates a run goes on as ever.
    assert "Changed since then" not in run(out, *schedule, *resume, *rates).output


def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(run, tmp_path):
    out, schedule = tmp_path / "run", ("--checkpointing_steps", 3, "--max_train_steps", 6)
    assert run(out, *schedule).status == 0
    before = (out / "metrics.jsonl").read_text()
    for how in ((), ("--resume_from_checkpoint", out / "checkpoint-3")):
        done = run(out, *schedule, *how)
        assert done.status == 1
        assert "run has checkpoint-6 of an earlier run" in done.output
    assert (out / "metrics.jsonl").read_text() == before
    fork = tmp_path / "fork"  # from an earlier checkpoint, elsewhere
    assert run(fork, *schedule, "--resume_from_checkpoint", out / "checkpoint-3").status == 0
    assert [path.name for path in checkpoints.found_in(fork)] == ["checkpoint-6"]
    assert equal(out, fork)
