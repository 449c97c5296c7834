"""Distances, further terms, and the laws of times and noise."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_ddpm, make_encoded, make_generator, make_pipeline, seeded
from diffusers import DDIMScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput as UNetOutput

from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline
from flowsr.degradations import matlab_bicubic
from flowsr.training.distances import LOSSES, charbonnier, colour_loss, huber, perceptual_loss
from flowsr.training.draws import (
    condition_dropped,
    generators_for,
    logit_normal_quantile,
    moved_off_the_grid,
    sigmas_for,
    timesteps_for,
    unrolling_for,
)
from flowsr.training.objectives import Diffusion, FlowMatching, PosteriorMean
from flowsr.training.settings import Settings


def crops_of(scale: int = 4, channels: int = 3, count: int = 6) -> dict:
    hr = torch.rand(count, channels, 8, 12, generator=seeded()) * 2 - 1
    return {"hr": hr, "lr": F.avg_pool2d(hr, scale), "index": torch.arange(10, 10 + count)}


@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize("source", ["lr", "noise"])
def test_the_true_flow_has_no_loss_and_a_false_one_its_distance(source, prediction_type):
    pipe = make_pipeline({"source": source, "prediction_type": prediction_type}, precondition=False)
    objective, crops = FlowMatching(pipe, Settings(loss="mse", sigma_atom=0.3)), crops_of()
    example = objective.example(crops)
    sigma = example.sigma[:, None, None, None]
    assert 0 < float((sigma == 1).float().mean()) < 1
    torch.testing.assert_close(example.x_t, (1 - sigma) * crops["hr"] + sigma * example.source)
    true = crops["hr"] if prediction_type == "sample" else example.source - crops["hr"]
    assert float(objective.loss(true, example)) < 1e-9
    if prediction_type == "velocity":
        assert float(objective.loss(true + 0.1, example)) == pytest.approx(0.01, rel=1e-3)
    # It starts where sampling starts: the pipeline draws the same of the same seeds.
    again = pipe.prepare_source(crops["lr"], generators_for(crops["index"], 0))
    assert torch.equal(example.source, again)


def test_generation_starts_from_noise_and_knows_classes():
    pipe = make_generator(classes=3)
    label = torch.tensor([0, 1, 2, 0, 1, 2])
    crops = {"hr": crops_of(channels=1)["hr"], "index": torch.arange(6), "label": label}
    example = FlowMatching(pipe, Settings(loss="mse")).example(crops)
    assert example.x_t.shape == (6, 1, 8, 12)
    dropped = condition_dropped(crops["index"], 0, 0.1)
    assert torch.equal(example.conditions["class_labels"], torch.where(dropped, 3, label))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_true_answer_of_a_diffusion_has_no_loss(prediction_type):
    pipe = make_ddpm(scheduler=DDIMScheduler(prediction_type=prediction_type), residual_std=0.1)
    objective, crops = Diffusion(pipe, Settings(loss="l1")), crops_of()
    example = objective.example(crops)
    residual = (crops["hr"] - pipe.upsample(crops["lr"])) / 0.1
    signal = pipe.scheduler.alphas_cumprod[example.timestep].sqrt()[:, None, None, None]
    noise = (1 - signal**2).sqrt()
    torch.testing.assert_close(example.x_t, signal * residual + noise * example.source)
    true = {"epsilon": example.source, "sample": residual, "v_prediction": signal * example.source - noise * residual}
    assert float(objective.loss(true[prediction_type], example)) < 1e-6


def test_the_posterior_mean_learns_from_hr_and_teacher():
    pipe = FlowMatchSRPipeline(make_encoded(), FlowMatchSREulerScheduler(source="prior"))
    crops = crops_of() | {"teacher": torch.zeros(6, 3, 8, 12)}
    for teacher_weight in (0.0, 0.25, 1.0):
        settings = Settings(train="encoder", teacher="somewhere", teacher_weight=teacher_weight, loss="mse")
        objective = PosteriorMean(pipe, settings)
        example = objective.example(crops)
        assert float(objective.loss((1 - teacher_weight) * crops["hr"], example)) < 1e-12
        assert pipe.unet(example.x_t, example.timestep, **example.conditions).sample.shape == crops["hr"].shape


def test_the_head_is_shown_states_of_its_own_sampler():
    """With an image that does not move, Euler's steps from the mean lie on the line to that image."""
    pipe = FlowMatchSRPipeline(make_encoded(), FlowMatchSREulerScheduler(source="prior"))
    objective, crops = (
        FlowMatching(pipe, Settings(train="head", unroll_weight=1.0, sigma_atom=0.0)),
        crops_of(count=30),
    )
    example = objective.example(crops)
    mean, image = pipe.encode(crops["lr"]).mean, torch.full((), 0.5)
    torch.testing.assert_close(example.conditions["encoding"].mean, mean)

    def unet(x_t, timestep, **conditions):
        return UNetOutput(image.expand(x_t.shape))

    own = objective.unrolled(unet, example)
    steps, done = unrolling_for(crops["index"], 0)
    torch.testing.assert_close(own.timestep / 1000, 1 - (done + 1) / steps)
    first = (1 - 1 / steps)[:, None, None, None]
    first_state = (1 - first) * mean + first * example.source
    sigma = (own.timestep / 1000)[:, None, None, None]
    torch.testing.assert_close(own.x_t, image + (first_state - image) * sigma / first)


def test_distances_have_their_closed_forms():
    target = torch.zeros(2, 3, 4, 4, dtype=torch.float64)
    for error in (0.0, 0.03, 0.5, -2.0):
        expected = {
            "l1": abs(error),
            "mse": error**2,
            "charbonnier": math.hypot(error, 1e-3),
            "huber": error**2 / 2 if abs(error) <= 0.1 else 0.1 * (abs(error) - 0.05),
        }
        for name, distance in LOSSES.items():
            assert (distance(target + error, target) - expected[name]).abs().max() < 1e-12, name
    # Each picture by itself: a batch is its pictures one by one.
    a, b = torch.rand(2, 5, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for distance in LOSSES.values():
        one_by_one = torch.cat([distance(x[None], y[None]) for x, y in zip(a, b)])
        torch.testing.assert_close(distance(a, b), one_by_one)


@pytest.mark.parametrize("distance", [charbonnier, huber])
def test_smooth_distances_have_the_gradient_of_l1_far_away_and_are_flat_at_zero(distance):
    x = torch.tensor([0.0, 5.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(distance(x[None], torch.zeros_like(x[None])).sum() * 2, x)
    assert gradient[0] == 0
    slope = {charbonnier: 1.0, huber: 0.1}[distance]
    assert abs(float(gradient[1]) - slope) < 1e-6


def test_colour_loss_sees_tint_and_not_texture():
    generator = torch.Generator().manual_seed(0)
    hr = torch.rand(2, 3, 64, 64, generator=generator)
    lr = F.interpolate(hr, size=16, mode="bicubic", antialias=True)
    tint = torch.tensor([0.1, 0.0, -0.05])[:, None, None]
    assert float(colour_loss(hr, lr)) < 1e-12
    assert abs(float(colour_loss(hr + tint, lr)) - float(tint.square().mean())) < 1e-6
    checkers = 0.1 * (-1.0) ** (torch.arange(64)[:, None] + torch.arange(64))
    assert float(colour_loss(hr + checkers, lr)) < 1e-5
    # Its downscaling is that of the data: MATLAB's, up to rounding, away from the edges.
    levels = (hr[0].permute(1, 2, 0) * 255).round().byte().numpy()
    ours = F.interpolate(
        torch.from_numpy(levels.transpose(2, 0, 1)[None]).float(), size=16, mode="bicubic", antialias=True
    )
    theirs = matlab_bicubic(levels, 4, rounded=False).transpose(2, 0, 1)
    assert np.abs(ours[0].numpy() - theirs)[:, 3:-3, 3:-3].max() < 0.01


def test_windows_of_every_phase_and_symmetry_are_the_same_in_all_images():
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    places = torch.stack([y, x]).expand(512, 2, 12, 12)
    index = torch.arange(100, 612)
    windows, doubled = moved_off_the_grid(index, 0, places, 2 * places)
    assert windows.shape == (512, 2, 9, 9)
    torch.testing.assert_close(doubled, 2 * windows)
    # A window is known by where it sends the two axes: the steps in y and x along the rows and along the columns.
    steps = torch.cat([windows[:, :, 5, 4] - windows[:, :, 4, 4], windows[:, :, 4, 5] - windows[:, :, 4, 4]], 1)
    plain = steps.abs().amax(1) > 0.9
    assert 240 < int(plain.sum()) < 272  # the others show half the side, at twice the size
    assert len({tuple(each.tolist()) for each in steps[plain].round()}) == 8
    corners = {tuple(window.amin((1, 2)).tolist()) for window in windows[plain]}
    assert corners == {(row, column) for row in range(4) for column in range(4)}
    (again,) = moved_off_the_grid(index[10:11], 0, places[:1])
    assert torch.equal(again[0], windows[10])


def test_perceptual_loss_weighs_each_crop_by_one_minus_sigma():
    hr = torch.zeros(4, 3, 8, 8)
    estimate = torch.stack([torch.full((3, 8, 8), value) for value in (1.0, 2.0, 3.0, 4.0)])
    distance = lambda a, b: (a - b).abs().mean((1, 2, 3))  # noqa: E731
    sigma = torch.tensor([1.0, 0.75, 0.5, 1.0])
    assert abs(float(perceptual_loss(distance, estimate, hr, sigma)) - (0.25 * 2 + 0.5 * 3) / 4) < 1e-6
    assert float(perceptual_loss(distance, estimate, hr, torch.ones(4))) == 0


@pytest.mark.parametrize("law", ["stratified", "uniform"])
def test_noise_levels_follow_their_law(law):
    index = torch.arange(5000, 9000)
    sigmas = sigmas_for(index, seed=1, atom=0.4, law=law)
    tolerance = {"stratified": 0.002, "uniform": 0.03}[law]
    assert sigmas.dtype == torch.float32
    assert abs(float((sigmas == 1).float().mean()) - 0.4) < tolerance
    spread = sigmas[sigmas < 1].double()
    assert 0.02 <= spread.min()
    quantiles = torch.quantile(spread, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    np.testing.assert_allclose(quantiles, 0.02 + 0.98 * np.array([0.25, 0.5, 0.75]), atol=5 * tolerance)
    assert torch.equal(sigmas[10:20], sigmas_for(index[10:20], 1, 0.4, law=law))


def test_stratified_levels_are_spread_in_every_run_of_crops():
    sigmas = sigmas_for(torch.arange(1000), seed=1, atom=0.4)
    for start in range(0, 1000, 8):  # any eight neighbours hold 2 to 4 at sigma = 1
        assert 2 <= int((sigmas[start : start + 8] == 1).sum()) <= 4


def test_logit_normal_levels_are_the_sigmoid_of_a_normal():
    sigmas = sigmas_for(torch.arange(20000), seed=0, atom=0.0, low=1e-6, law="logit_normal").double()
    normal = torch.logit(sigmas.clamp(1e-6, 1 - 1e-6))
    assert abs(float(normal.mean())) < 0.01
    assert abs(float(normal.std()) - 1) < 0.01
    within = float((normal.abs() < 1).double().mean())
    assert abs(within - math.erf(1 / math.sqrt(2))) < 0.01
    assert float(logit_normal_quantile(torch.tensor(0.5, dtype=torch.float64))) == 0.5


def test_timesteps_cover_their_range_evenly():
    counts = torch.bincount(timesteps_for(torch.arange(10000), seed=3, count=10), minlength=10)
    assert counts.shape == (10,)
    assert (counts - 1000).abs().max() <= 3
    several = timesteps_for(torch.arange(1000), 3, 1000, "logit_normal")
    assert several.dtype == torch.int64
    assert 0 <= several.min()
    assert several.max() < 1000


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


def test_unrolled_crops_stand_on_grids_of_the_sampler():
    steps, done = unrolling_for(torch.arange(9000), seed=3)
    stands = {(int(n), int(k)) for n, k in zip(steps, done)}
    assert stands == {(2, 0), (4, 0), (4, 1), (4, 2), (8, 0), (8, 1), (8, 2)}
    for count in (2, 4, 8):
        assert float((steps == count).float().mean()) == pytest.approx(1 / 3, abs=0.01)
    halves = [unrolling_for(part, seed=3) for part in torch.arange(9000).chunk(2)]
    assert torch.equal(torch.cat([half[1] for half in halves]), done)


def test_noise_of_any_seed():
    first = lambda seed, index: int(generators_for(torch.tensor([index]), seed)[0].initial_seed())  # noqa: E731
    assert first(5, 7) == 5 * 2**40 + 7  # as ever
    assert first(2**24 - 1, 0) == (2**24 - 1) * 2**40
    large = [first(seed, index) for seed in (2**24, 2**24 + 1, 2**32) for index in (0, 1, 2**39)]
    assert len({*large, first(0, 0), first(0, 1)}) == len(large) + 2
    assert sigmas_for(torch.arange(4), 2**31, 0.4, law="uniform").min() > 0
