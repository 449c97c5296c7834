"""What a run may do in a folder that an earlier run has used, and what a resumed run may change."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator

import flowsr
from flowsr.training import checkpoints, record
from flowsr.training.settings import Settings, parse_settings

CONFIG = Path(__file__).resolve().parents[1] / "configs/x4_encoder.yaml"

SCHEDULE = (
    "--config", "configs/tiny.yaml", "--train_batch_size", 2, "--num_validation_images", 0, "--logging_steps", 1,
    "--lr_warmup_steps", 0, "--lr_scheduler", "constant", "--checkpointing_steps", 2,
)  # fmt: skip
RESUME = ("--resume_from_checkpoint", "latest")


@pytest.fixture
def run(train_script, photo_folder):
    def run(output, *arguments):
        return train_script(*SCHEDULE, "--train_data_dir", photo_folder, "--output_dir", output, *arguments)

    return run


def whole(folder):
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(folder.name.encode())
    checkpoints.seal(folder)
    return folder


def test_a_used_output_folder_is_refused_without_resuming(tmp_path):
    old = [whole(tmp_path / f"checkpoint-{step}") for step in (50, 100)]
    with pytest.raises(ValueError, match=r"holds checkpoint-50, checkpoint-100.*`--resume_from_checkpoint latest`"):
        checkpoints.find(None, tmp_path)
    assert checkpoints.find("latest", tmp_path) == old[1]
    assert checkpoints.find(None, tmp_path / "new") is None
    # From an older one the later ones would be those of another run.
    with pytest.raises(ValueError, match="checkpoint-100.*later than checkpoint-50"):
        checkpoints.find(str(old[0]), tmp_path)
    assert checkpoints.find(str(old[0]), tmp_path / "new") == old[0]


def test_only_older_checkpoints_make_room(tmp_path):
    for step in (1, 2, 3, 9):
        whole(tmp_path / f"checkpoint-{step}")
    checkpoints.remove_oldest(tmp_path, step=3)  # checkpoint-9 is a damaged one that was passed over
    assert [path.name for path in checkpoints.found_in(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-9"]


def test_changed_settings_are_told_or_refused():
    settings = Settings(train_data_dir=["/a/photos"], learning_rate=1e-3)
    before = asdict(settings)
    changed = replace(settings, learning_rate=1e-4, output_dir="elsewhere", train_data_dir=["/b/photos"])
    assert checkpoints.changed_settings(before, settings) == []
    assert checkpoints.changed_settings(before, changed) == [
        "`train_data_dir`: ['/a/photos'] -> ['/b/photos']",
        "`learning_rate`: 0.001 -> 0.0001",
    ]
    for name, value in {"optimizer": "muon", "seed": 1, "unet": {"patch_size": 1}, "train_data_dir": ["b"]}.items():
        with pytest.raises(ValueError, match=f"`{name}`.*Leave them as they were"):
            checkpoints.changed_settings(before, replace(settings, **{name: value}))
    del before["resolution"]  # an older version's
    assert checkpoints.changed_settings(before, replace(settings, resolution=96)) == []


def test_a_resumed_run_has_the_rate_betas_and_decay_of_its_settings(run, tmp_path):
    out = tmp_path / "run"
    done = run(out, "--max_train_steps", 2, "--learning_rate", 0.01)
    assert done.status == 0, done.output
    rate = ("--learning_rate", 0.001, "--adam", '{"betas": [0.8, 0.99]}', "--ema_decay", 0.5)
    done = run(out, "--max_train_steps", 4, *RESUME, *rate)
    assert done.status == 0, done.output
    assert "Changed from here on: `learning_rate`: 0.01 -> 0.001." in done.output
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["learning_rate"] for line in steps] == [0.01, 0.01, 0.001, 0.001]
    assert all(0 < line["gradient_norm"] < 1e3 for line in steps)
    state = torch.load(out / "checkpoint-4/optimizer.bin", weights_only=False)
    assert state["param_groups"][0]["betas"] == (0.8, 0.99)
    assert torch.load(out / "checkpoint-4/custom_checkpoint_0.pkl", weights_only=False)["decay"] == 0.5
    for folder in (out, out / "checkpoint-4"):
        assert yaml.safe_load((folder / "settings.yaml").read_text())["learning_rate"] == 0.001
    assert checkpoints.settings_of(out / "checkpoint-2")["learning_rate"] == 0.01
    # What does not fit is refused, in words.
    done = run(out, "--max_train_steps", 6, *RESUME, "--seed", 1)
    assert "`seed`: 0 -> 1" in done.output
    done = run(out, "--max_train_steps", 3, *RESUME)
    assert "has done 4 steps, but the run is to end after 3" in done.output
    for path in ("settings.yaml", "checkpoint-4/settings.yaml", "checkpoint-4/manifest.json"):
        (out / path).unlink()  # as an older version left it, which wrote no settings into checkpoints
    checkpoints.seal(out / "checkpoint-4")
    done = run(out, "--max_train_steps", 6, *RESUME, "--optimizer", "muon")
    assert "does not fit the network or the optimizer" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("wrong", ["loss", "norm", "weights"])
def test_what_is_not_finite_is_seen_before_it_is_saved(wrong):
    values = {"loss": 0.1, "norm": 2.0, "weights": 3.0, wrong: math.inf}
    weights = [torch.tensor([-values["weights"], 1.0], requires_grad=True), torch.zeros(3)]
    found = record.summary(
        Accelerator(cpu=True), [torch.tensor(values["loss"])], [torch.tensor(values["norm"])], weights
    )
    assert found == pytest.approx(tuple(values.values()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resolution: [64", "is not YAML"),
        ("- 64", "must hold lines of `setting: value`"),
        ("resolution: '64'", "`resolution` must be int, got '64'"),
        ("resolution: true", "`resolution` must be int, got True"),
        ("train_data_dir: [1]", r"`train_data_dir` must be list\[str\], got \[1\]"),
        ("mixed_precision: no", "`mixed_precision` must be str, got False; put it in quotes"),
        ("learning_rate: fast", "`learning_rate` must be float, got 'fast'"),
        ("pretrained_model_name_or_path: x4\nunet: {patch_size: 1}", "brings its own configs: leave out unet"),
    ],
)
def test_what_a_config_must_not_hold(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_settings([], tmp_path / "config.yaml")


def test_adam_is_one_setting(tmp_path):
    published = Path(flowsr.__file__).with_name("weights") / "x4/encoder_part/settings.yaml"
    assert parse_settings([], published).adam == {"betas": [0.9, 0.99], "eps": 1e-10, "weight_decay": 0.0}
    (tmp_path / "config.yaml").write_text("adam: {betas: [0.9, 0.999], weight_decay: 1e-1}\n")
    adam = parse_settings([], tmp_path / "config.yaml").adam
    assert adam == {"betas": [0.9, 0.999], "eps": 1e-10, "weight_decay": 0.1}
    assert "`adam`" in checkpoints.changed_settings(asdict(Settings(adam=adam)), Settings())[0]


def test_a_resumed_run_says_which_settings_are_no_more():
    before = {**asdict(Settings()), "max_grad_norm": 0.5}
    assert checkpoints.changed_settings(before, Settings()) == ["`max_grad_norm`: 0.5 -> no setting of this version"]


def test_a_single_folder_is_a_list_of_one(tmp_path):
    (tmp_path / "config.yaml").write_text("train_data_dir: /data/photos\nlearning_rate: 1e-4\nreport_to: null\n")
    settings = parse_settings([], tmp_path / "config.yaml")
    assert settings.train_data_dir == ["/data/photos"]
    assert settings.learning_rate == 1e-4


def test_a_checkpoint_to_start_from_brings_its_own_configs():
    start = ["--pretrained_model_name_or_path", "x4"]
    assert parse_settings(start, CONFIG).unet == {}
    with pytest.raises(ValueError, match="leave out unet, or train from the start"):
        parse_settings([*start, "--unet", "{}"], CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_warmup_steps": -1}, "must not be negative"),
        ({"num_train_epochs": -1.0}, "must be positive"),
        ({"seed": -1}, r"in \[0, 2\^32\)"),
        ({"learning_rate": 1e38}, r"at most 1\.0e\+30"),
        ({"learning_rate": 1e30, "adam": {"betas": [1 - 1e-9, 0.9]}}, r"at most 3\.4e\+29"),
        ({"learning_rate": math.nan}, "must be positive"),
        ({"adam": {"betas": [0.9, 1.0]}}, r"`betas` in \[0, 1\)"),
        ({"adam": {"beta": 0.9}}, r"unknown settings \['beta'\]"),
        ({"resize_to": 64, "resolution": 96}, "raise `resize_to` or lower `resolution`"),
        ({"lr_data_dir": "lr", "degradation": "bsrgan"}, "leave out `streaming`, `resize_to` and `degradation`"),
        ({"report_to": "swanlab"}, "needs the package: pip install swanlab"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_validating_and_saving_are_not_training_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])
    watch = record.Stopwatch()
    now[0] = 2.0
    with watch.paused():
        now[0] = 50.0
    now[0] = 53.0
    assert watch.lap() == 5
    now[0] = 57.0
    assert watch.lap() == 4
