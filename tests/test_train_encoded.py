"""Training of the network that encodes once: encoder, then head; Muon; a teacher."""

import json

import numpy as np
import pytest
import torch
from conftest import smooth_picture
from PIL import Image
from training import FSDP, launch, launch_as_on_gpus, losses, records, tiny, weights

from flowsr import FlowMatchSRPipeline
from flowsr.conversion import convert

SIZES = {"encoder_channels": 8, "encoder_blocks": 1, "head_channels": 8, "head_blocks": 1, "time_embedding_dim": 8}
ENCODED = (
    "--unet", json.dumps({"_class_name": "EncodedSRModel", **SIZES}), "--scheduler", '{"source": "prior"}',
)  # fmt: skip
ENCODER = (*ENCODED, "--train", "encoder", "--optimizer", "muon")
FEW = ("--max_train_steps", 4, "--checkpointing_steps", 2, "--logging_steps", 1, "--validation_steps", 4)


def assert_same(found: dict, expected: dict) -> None:
    """To the bit."""
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def change(before: dict, after: dict, part: str) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part))


def test_encoder_and_head_are_trained_one_after_the_other(train_script, photo_folder, tmp_path):
    steps = ("--max_train_steps", 60, "--validation_steps", 60, "--learning_rate", 0.005)
    first, second = tmp_path / "encoder", tmp_path / "head"
    train_script(*tiny(photo_folder, first, *ENCODER, *steps, "--frequency_weight", 0.01))
    assert np.mean(losses(first)[-2:]) < 0.95 * losses(first)[0]
    encoder = weights(first)
    assert_same(convert(first / "checkpoint-60").unet.state_dict(), encoder)
    how = ("--train", "head", "--optimizer", "muon", "--sigma_atom", 0, "--unroll_weight", 0.3)
    train_script(
        *tiny(photo_folder, second, "--pretrained_model_name_or_path", first, *how, *FEW, "--max_train_steps", 12)
    )
    head = weights(second)
    assert_same(convert(second / "checkpoint-12").unet.state_dict(), head)
    assert not change(encoder, head, "encoder")
    assert change(encoder, head, "head")
    assert change(encoder, head, "time_embedding")
    *_, validation = (record for record in records(second) if record.get("event") == "validation")
    assert {"psnr_y_1", "psnr_y_4"} <= validation.keys()
    pipe = FlowMatchSRPipeline.from_pretrained(second)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(smooth_picture(20, 16)).images[0].size == (80, 64)


def test_muon_resumes_to_the_bit(train_script, photo_folder, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train_script(*tiny(photo_folder, whole, *ENCODER, *FEW))
    checkpoint = str(whole / "checkpoint-2")
    train_script(*tiny(photo_folder, resumed, *ENCODER, *FEW, "--resume_from_checkpoint", checkpoint))
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_teacher_that_knows_hr_teaches_what_hr_does(train_script, photo_folder, tmp_path):
    answers = tmp_path / "answers"
    answers.mkdir()
    for path in photo_folder.iterdir():
        picture = Image.open(path)
        picture.crop((0, 0, picture.width // 4 * 4, picture.height // 4 * 4)).save(answers / path.name)
    runs = {"hr": (), "teacher": ("--teacher", answers), "half": ("--teacher", answers, "--teacher_weight", 0.5)}
    for name, options in runs.items():
        train_script(*tiny(photo_folder, tmp_path / name, *ENCODER, *FEW, *options))
    assert losses(tmp_path / "hr") == losses(tmp_path / "teacher")
    np.testing.assert_allclose(losses(tmp_path / "hr"), losses(tmp_path / "half"), atol=2e-6)


def test_muon_in_two_processes_that_share_the_weights_is_that_of_one(photo_folder, tmp_path):
    whole, spread = tmp_path / "whole", tmp_path / "spread"
    few = ("--max_train_steps", 3, "--logging_steps", 1, "--num_validation_images", 0)
    launch_as_on_gpus(FSDP, *tiny(photo_folder, spread, *ENCODER, *few, "--train_batch_size", 2))
    done = launch(1, *tiny(photo_folder, whole, *ENCODER, *few, "--train_batch_size", 4))
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(spread), losses(whole), atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "head"), "`train` must be one of ['all'] for UNetSRModel, got 'head'"),
        (ENCODED, "`train` must be one of ['encoder', 'head'] for EncodedSRModel, got 'all'"),
        (("--teacher", "x"), "`teacher` and `frequency_weight` are for the posterior mean: set `train: encoder`"),
        ((*ENCODER, "--teacher", "x", "--degradation", "bsrgan"), "`teacher` answers to whole pictures"),
        ((*ENCODER, "--teacher_weight", 2), "`teacher_weight` must lie in [0, 1], got 2.0"),
        ((*ENCODER, "--unroll_weight", 1), "`unroll_weight` is for the head: set `train: head`, got 'encoder'"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(arguments, message, photo_folder, tmp_path):
    import train_sr

    with pytest.raises(ValueError) as error:
        train_sr.main([*map(str, tiny(photo_folder, tmp_path / "run", *arguments))])
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()
