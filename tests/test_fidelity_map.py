"""The dial as a map: its ends and steps against numbers, parts and tiles against the whole, and the command line."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_encoded_pipeline, make_pipeline, random_picture, seeded

from flowsr import FlowMatchSRPipeline, stream
from flowsr.cli import main
from flowsr.fidelity_map import read_map, stretch
from flowsr.files import read_file

FLOWS = {
    "network that encodes": make_encoded_pipeline,
    "U-Net": make_pipeline,
    "velocity on the vp path": lambda: make_pipeline(
        {"path": "vp", "prediction_type": "velocity", "source": "lr"}, precondition=False
    ),
}


def upscale(pipe: FlowMatchSRPipeline, image, fidelity, **options) -> torch.Tensor:
    return pipe(image, 4, fidelity=fidelity, generator=seeded(3), output_type="latent", **options).images


@pytest.fixture(params=FLOWS)
def flow(request) -> FlowMatchSRPipeline:
    return FLOWS[request.param]()


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 17, 3), dtype=np.uint8)


def test_the_ends_of_a_map_are_those_of_the_dial_to_the_bit(flow, image):
    half = np.zeros((12, 17), np.float32)
    half[:, 9:] = 1
    made, vivid, faithful = (upscale(flow, image, fidelity) for fidelity in (half, 0.0, 1.0))
    assert torch.equal(made[..., : 8 * 4], vivid[..., : 8 * 4])
    assert torch.equal(made[..., 10 * 4 :], faithful[..., 10 * 4 :])
    assert torch.equal(upscale(flow, image, np.zeros((12, 17))), vivid)
    assert torch.equal(upscale(flow, image, np.ones((12, 17))), faithful)


def test_a_constant_map_is_the_estimate_on_the_grid_or_between_two(flow, image):
    """Against an own loop over the steps of the scheduler."""
    estimates = []
    step = flow.scheduler.step

    def watched(*args, **kwargs):
        answer = step(*args, **kwargs)
        estimates.append(answer[1])
        return answer

    flow.scheduler.step = watched
    upscale(flow, image, 0.0)
    flow.scheduler.step = step
    assert flow.scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    for fidelity, wanted in ((0.5, estimates[2]), (0.1, estimates[3]), (0.625, (estimates[1] + estimates[2]) / 2)):
        made = upscale(flow, image, np.full((12, 17), fidelity))
        assert torch.allclose(made, wanted, atol=1e-5)


def test_every_kind_of_map_means_the_same(flow, image):
    levels = np.random.default_rng(1).integers(0, 256, (12, 17), dtype=np.uint8)
    kinds = [
        levels,
        torch.from_numpy(levels),
        PIL.Image.fromarray(levels),
        levels / 255,
        torch.from_numpy(levels) / 255,
    ]
    first, *others = (upscale(flow, image, kind) for kind in kinds)
    assert all(torch.allclose(first, other, atol=1e-5) for other in others)
    twice = upscale(flow, [image, image], levels, num_images_per_prompt=2)
    assert twice.shape[0] == 4


def test_tiles_and_parts_are_the_whole():
    pipe = make_encoded_pipeline()
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    fidelity = np.random.default_rng(1).random((50, 61))
    assert torch.allclose(upscale(pipe, image, fidelity, tile=20), upscale(pipe, image, fidelity), atol=1e-4)
    call = {"num_inference_steps": 3, "fidelity": fidelity, "consistency": "soft"}
    whole = pipe(image, generator=seeded(5), output_type="np", **call).images[0]
    large = np.zeros((200, 244, 3), np.uint8)
    stream(image, large, pipe, seed=5, tile=24, **call)
    assert np.array_equal(large, (whole * 255).round().astype(np.uint8))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.zeros((3, 4)), "height and width"), (np.full((12, 17), 1.1), r"\[0, 1\]"), ("half", r"\[0, 1\]"),
        (np.full((12, 17), np.nan), r"\[0, 1\]"), (PIL.Image.new("RGB", (17, 12)), "mode 'L'"),
    ],
)  # fmt: skip
def test_what_is_no_map_is_refused(image, wrong, words):
    with pytest.raises(ValueError, match=words):
        upscale(make_pipeline(), image, wrong)


def test_a_map_needs_the_steps_of_euler_and_its_own_grid(image):
    with pytest.raises(ValueError, match="'euler'"):
        upscale(make_pipeline(), image, np.zeros((12, 17)), solver="heun")
    with pytest.raises(ValueError, match="not both"):
        upscale(make_pipeline(), image, np.zeros((12, 17)), sigmas=[1.0, 0.5])


def test_a_stretched_map_keeps_its_values():
    assert np.allclose(stretch(np.full((3, 4), 0.3, np.float32), (20, 31)), 0.3)
    halves = stretch(np.array([[0, 1]], np.float32), (5, 80))
    assert halves[:, :20].max() == 0 and halves[:, 60:].min() == 1 and (np.diff(halves[0]) >= 0).all()


def test_the_command_line_takes_a_picture_as_a_map(tmp_path, capsys):
    make_encoded_pipeline().save_pretrained(tmp_path / "checkpoint")
    for name in "ab":
        random_picture(10, 8, seed=ord(name)).save(tmp_path / f"{name}.png")
    PIL.Image.new("L", (5, 5), 255).save(tmp_path / "white.png")
    assert np.array_equal(read_map(tmp_path / "white.png"), np.ones((5, 5), np.float32))
    call = ["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--checkpoint", str(tmp_path / "checkpoint")]
    assert main([*call, "-o", str(tmp_path / "map"), "--fidelity-map", str(tmp_path / "white.png")]) == 0
    assert main([*call, "-o", str(tmp_path / "one"), "--fidelity", "1"]) == 0
    for name in "ab":
        made, wanted = (read_file(tmp_path / folder / f"{name}.png") for folder in ("map", "one"))
        assert np.array_equal(made.frames[0], wanted.frames[0])
        assert b'flowsr:fidelity="map"' in made.xmp
    assert main([*call, "-o", str(tmp_path / "x"), "--fidelity-map", "white.png", "--fidelity", "1"]) == 1
    assert "leave one" in capsys.readouterr().err
