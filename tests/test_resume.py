"""What a run may do in a folder that an earlier run has used, and what a resumed run may change."""

import json

import pytest
import yaml

from flowsr import checkpoints

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
    checkpoints.remove_oldest(tmp_path, step=3, limit=1)  # checkpoint-9 is a damaged one that was passed over
    assert [path.name for path in checkpoints.found_in(tmp_path)] == ["checkpoint-3", "checkpoint-9"]
