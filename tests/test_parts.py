"""Parts of a picture, upscaled by themselves, are those of the whole picture."""

import random

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_encoded_pipeline, make_pipeline, make_unet, seeded

from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline
from flowsr.pipelines.consistency import make_consistent, reach
from flowsr.pipelines.tiling import enlarged
from flowsr.schedulers.scheduling_flow_match_sr_euler import normal_levels, philox, positional_noise
from flowsr.streaming import Upscaled, has_parts, stream


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)  # fmt: skip
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    found = philox(tuple(torch.tensor(word) for word in counter), key)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_levels_are_quantiles_that_no_machine_rounds_otherwise():
    levels = normal_levels(torch.device("cpu")).double()
    back = torch.special.ndtr(levels) * 2**16
    torch.testing.assert_close(back, torch.arange(2**16, dtype=torch.float64) + 0.5, atol=0.03, rtol=0)
    assert torch.equal(levels, -levels.flip(0))
    assert torch.equal(levels * 2**20, (levels * 2**20).round())
    exact = torch.special.ndtri((torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16) * 2**20
    assert float((exact - exact.floor() - 0.5).abs().min()) > 1e-6  # from where a rounding would tip over


def test_noise_is_normal_and_neighbours_are_independent():
    noise = positional_noise(7, (3, 512, 512)).double()
    count = noise.numel()
    # Each within five standard errors of what independent normal values give.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((noise**power).mean()) - moment) < 5 * (variance / count) ** 0.5 + 1e-3 * (power == 4)
    others = {
        "column": noise.roll(1, 2), "two columns": noise.roll(2, 2), "row": noise.roll(1, 1),
        "channel": noise.roll(1, 0), "diagonal": noise.roll((1, 1), (1, 2)),
        "seed": positional_noise(8, (3, 512, 512)).double(), "high seed": positional_noise(7 + 2**32, (3, 512, 512)),
    }  # fmt: skip
    for name, other in others.items():
        assert abs(float((noise * other).mean())) < 5 / count**0.5, name
        assert abs(float(((noise**2 - 1) * (other**2 - 1)).mean())) < 5 * 2 / count**0.5, name
    bins = torch.histc(torch.special.ndtr(noise), 1000, 0, 1)
    chi_squared = float(((bins - count / 1000) ** 2 / (count / 1000)).sum())
    assert abs(chi_squared - 999) < 5 * (2 * 999) ** 0.5


def test_noise_of_a_part_is_that_of_the_whole():
    whole = positional_noise(3, (5, 40, 41))
    for top, left, height, width in ((0, 0, 40, 41), (7, 3, 20, 11), (39, 40, 1, 1), (5, 8, 3, 30)):
        part = positional_noise(3, (5, height, width), (top, left))
        assert torch.equal(part, whole[:, top : top + height, left : left + width])
    assert torch.equal(positional_noise(3, (3, 2, 2), (2**31, 70000)), positional_noise(3, (3, 2, 2), (2**31, 70000)))


def test_a_generator_used_twice_gives_two_pictures_and_a_seed_one():
    scheduler, lr_up, generator = FlowMatchSREulerScheduler(noise="positional"), torch.zeros(2, 3, 4, 4), seeded(0)
    one, other = (scheduler.sample_source(lr_up, generator=generator) for _ in range(2))
    assert not torch.equal(one, other)
    assert not torch.equal(one[0], one[1])
    assert torch.equal(scheduler.sample_source(lr_up, generator=seeded(0)), one)
    assert not torch.equal(scheduler.sample_source(lr_up), scheduler.sample_source(lr_up))
    assert scheduler.sample_source(lr_up.bfloat16(), generator=seeded(0)).dtype == torch.bfloat16


def test_old_checkpoints_draw_as_they_did():
    scheduler = FlowMatchSREulerScheduler.from_config({"source": "noise", "source_noise_std": 1.0})
    drawn = scheduler.sample_source(torch.zeros(1, 3, 4, 4), generator=seeded(0))
    assert torch.equal(drawn, torch.randn(1, 3, 4, 4, generator=seeded(0)))
    with pytest.raises(ValueError, match="noise='positional'"):
        scheduler.sample_source(torch.zeros(1, 3, 4, 4), generator=seeded(0), corner=(0, 4))


def random_image(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def whole_image(pipe, image: np.ndarray, seed: int, **options) -> np.ndarray:
    return (pipe(image, generator=seeded(seed), output_type="np", **options).images[0] * 255).round().astype(np.uint8)


def test_two_hundred_random_cuts_give_the_whole_to_the_bit():
    pipes, chance = {scale: make_encoded_pipeline(scale_factor=scale) for scale in (2, 4)}, random.Random(0)
    for number in range(200):
        pipe, height = pipes[chance.choice((2, 2, 2, 4))], int(2 ** chance.uniform(3, 10))
        image = random_image(number, height, chance.randint(7000, 9000) // height, chance.choice((1, 3, 4)))
        options = {
            "num_inference_steps": chance.randint(1, 4), "fidelity": chance.choice((0.0, 0.0, 0.4, 1.0)),
            "consistency": "exact" if number % 20 == 0 else chance.choice((None, None, "soft")),
            "seed": chance.randint(0, 2**40),
        }  # fmt: skip
        result = Upscaled(image, pipe, tile=chance.randint(20, 90), **options)
        (seen_rows, rows), (seen_columns, columns) = chance.choice(result.bands), chance.choice(result.columns)
        part = result.part((seen_rows, seen_columns), (rows, columns))
        whole = whole_image(pipe, image, **options)[enlarged((rows, columns), pipe.scale_factor)]
        assert np.array_equal(part, whole), (number, image.shape, rows, columns, options)


def test_rows_and_areas_are_those_of_the_whole_picture():
    pipe, image = make_encoded_pipeline(), random_image(0, 110, 75, 3)
    whole = whole_image(pipe, image, 3, num_inference_steps=2)
    options = {"seed": 3, "num_inference_steps": 2, "tile": 40}
    written, rows, done = np.zeros_like(whole), [], []
    stream(image, written, pipe, progress=done.append, **options)
    assert np.array_equal(written, whole)
    expected = [((part, 6, 1, 2), (part, 6, 2, 2), (part + 1, 6, 0, 1)) for part in range(6)]
    assert done == [tuple(each) for part in expected for each in part]
    assert [each.share for each in done] == sorted(each.share for each in done)
    stream(image, rows.append, pipe, **options)
    assert [len(each) for each in rows] == [160, 160, 120]
    assert np.array_equal(np.concatenate(rows), whole)
    result = Upscaled(image, pipe, **options)
    for first, last in ((0, 7), (7, 200), (439, 440), (150, 330), (5, 5)):
        assert np.array_equal(result[first:last], whole[first:last])


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_readers_of_any_kind(dtype, tmp_path):
    pipe, top = make_encoded_pipeline(), 65535 if dtype == np.uint16 else 1
    small = np.memmap(tmp_path / "small", dtype, "w+", shape=(90, 91))
    small[:] = random_image(0, 90, 91) / 255.0 * top
    large = np.memmap(tmp_path / "large", dtype, "w+", shape=(360, 364))
    stream(small, large, pipe, tile=50, fidelity=1.0)
    whole = pipe(np.asarray(small), fidelity=1.0, output_type="np").images[0][..., 0]
    np.testing.assert_allclose(large, whole * top, atol=0.5 if top > 1 else 0)
    picture = PIL.Image.fromarray(random_image(0, 4, 5, 3))
    assert Upscaled(picture, pipe)[0:16].shape == (16, 20, 3)


def test_a_limit_of_memory_gives_smaller_parts_and_the_same_picture():
    pipe, image = make_encoded_pipeline(), random_image(0, 100, 110, 3)
    limits = [Upscaled(image, pipe, 2, max_memory=megabytes * 2**20) for megabytes in (20, 35)]
    assert 26 < limits[0].side < limits[1].side < 110
    assert np.array_equal(limits[0][0:200], limits[1][0:200])
    with pytest.raises(ValueError, match="raise `max_memory`"):
        Upscaled(image, pipe, max_memory=2**20)


def test_what_cannot_be_streamed_is_refused_before_any_work():
    pipe, image = make_encoded_pipeline(), random_image(0, 4, 5, 3)
    for message, reader in (("`shape`", object()), ("1 to 4 channels", np.zeros((3, 3, 5))), ("h, w", np.zeros(3))):
        with pytest.raises(ValueError, match=message):
            Upscaled(reader, pipe)
    with pytest.raises(ValueError, match=r"must have shape \(16, 20, 3\) and dtype uint8"):
        stream(image, np.zeros((16, 20, 3)), pipe)
    with pytest.raises(ValueError, match="whole number of LR pixels"):
        Upscaled(image, pipe, tile=0)
    with pytest.raises(ValueError, match="noise='positional'"):
        Upscaled(image, make_pipeline())


def test_parts_equal_the_whole_nearly_where_bicubic_weights_depend_on_the_place():
    pipe, image = make_encoded_pipeline(scale_factor=3), random_image(0, 100, 90, 3)
    part = pipe(image[40:], corner=(40, 0), generator=seeded(0), output_type="np").images[0]
    whole = pipe(image, generator=seeded(0), output_type="np").images[0]
    halo = 3 * pipe.halo()
    np.testing.assert_allclose(part[halo:], whole[120 + halo :], atol=1e-4)


@pytest.mark.parametrize("config", [{}, {"block_out_channels": (8, 8)}])
def test_parts_of_a_unet_on_its_grid_equal_the_whole(config):
    pipe, image = make_pipeline({"noise": "positional"}, **config), random_image(0, 200, 36, 3)
    options = {"num_inference_steps": 2, "seed": 5}
    part = Upscaled(image, pipe, tile=30, **options)[200:260]
    assert np.array_equal(part, whole_image(pipe, image, **options)[200:260])


@pytest.mark.parametrize(("kind", "size"), [("soft", 60), ("exact", 500)])
def test_consistency_does_not_depend_on_what_lies_beyond_its_reach(kind, size):
    lr, hr = (torch.rand(1, 1, size * side, 2 * side, generator=seeded(side)).round() * 2 - 1 for side in (1, 4))
    whole, (first, last) = make_consistent(hr, lr, 4, kind), (size // 2, size // 2 + 3)
    low, high = first - reach(4, kind), last + reach(4, kind)
    part = make_consistent(hr[:, :, 4 * low : 4 * high], lr[:, :, low:high], 4, kind)
    assert torch.equal(part[:, :, 4 * (first - low) : 4 * (last - low)], whole[:, :, 4 * first : 4 * last])


def test_what_has_no_parts_says_so():
    image = np.zeros((4, 4, 3))
    wrong = {
        "one sequence over the whole image": make_pipeline(),
        "normalises over positions": make_pipeline({"noise": "positional"}, norm="group", norm_num_groups=2),
        "A prior sees": FlowMatchSRPipeline(
            make_unet(precondition=False), FlowMatchSREulerScheduler(source="prior", noise="positional")
        ),
    }
    for message, pipe in wrong.items():
        with pytest.raises(ValueError, match=message):
            pipe(image, corner=(0, 4))
    with pytest.raises(ValueError, match="row and a column"):
        make_encoded_pipeline()(image, corner=(-1, 0))


def test_what_has_parts():
    assert has_parts(make_encoded_pipeline())
    assert not has_parts(make_pipeline())
