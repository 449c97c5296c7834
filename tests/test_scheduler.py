"""The scheduler against flows with a known solution."""

import math

import numpy as np
import pytest
import torch

from flowsr import FlowMatchSREulerScheduler

PATHS = ["linear", "vp"]


def gaussian_velocity(path: str, x: torch.Tensor, sigma: float, hr_std: float, source_std: float) -> torch.Tensor:
    """E[d x_t / d sigma | x_t] for independent hr ~ N(0, hr_std^2) and source ~ N(0, source_std^2)."""
    if path == "linear":
        a, b, a_rate, b_rate = 1 - sigma, sigma, -1.0, 1.0
    else:
        half = math.pi / 2
        a, b = math.cos(half * sigma), math.sin(half * sigma)
        a_rate, b_rate = -half * b, half * a
    variance = a**2 * hr_std**2 + b**2 * source_std**2
    return (a * a_rate * hr_std**2 + b * b_rate * source_std**2) / variance * x


def solve(scheduler: FlowMatchSREulerScheduler, velocity, x: torch.Tensor, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        sigma = float(timestep) / scheduler.config.num_train_timesteps
        x = scheduler.step(velocity(x, sigma), timestep, x).prev_sample
    return x


@pytest.mark.parametrize("path", PATHS)
def test_gaussian_flow_converges_with_order_one_to_the_exact_transport(path):
    # The flow between two centred Gaussians scales by the ratio of their stds.
    hr_std, source_std = 0.5, 2.0
    scheduler = FlowMatchSREulerScheduler(path=path, prediction_type="velocity")
    start = torch.tensor([[1.0, -3.0, 0.25]], dtype=torch.float64)
    exact = start * hr_std / source_std
    velocity = lambda x, sigma: gaussian_velocity(path, x, sigma, hr_std, source_std)  # noqa: E731
    errors = [float((solve(scheduler, velocity, start, n) - exact).abs().max()) for n in (50, 100, 200)]
    orders = [math.log2(errors[i] / errors[i + 1]) for i in range(2)]
    assert errors[-1] < 0.02
    assert all(0.85 < order < 1.15 for order in orders), orders


def test_evaluating_at_the_middle_converges_too():
    scheduler = FlowMatchSREulerScheduler(prediction_type="velocity", evaluate_at="middle")
    start = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    velocity = lambda x, sigma: gaussian_velocity("linear", x, sigma, 0.5, 2.0)  # noqa: E731
    errors = [float((solve(scheduler, velocity, start, n) - start / 4).abs().max()) for n in (100, 200)]
    assert errors[1] < errors[0] / 1.8


def test_middle_tells_the_network_the_middle_of_each_step():
    scheduler = FlowMatchSREulerScheduler(evaluate_at="middle")
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [875.0, 625.0, 375.0, 125.0]
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_shifted_time_tells_of_more_noise_and_leaves_the_grid():
    scheduler = FlowMatchSREulerScheduler(evaluate_shift=3.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    np.testing.assert_allclose(scheduler.timesteps, [1000.0, 900.0, 750.0, 500.0])  # the odds of sigma times 3
    scheduler.set_timesteps(1000)
    assert (scheduler.timesteps.diff() < 0).all()  # each step can still be told from the others


def test_shifted_time_takes_out_what_errors_put_in():
    # Estimates that are off by independent errors leave a Gaussian flow too wide; expecting more noise narrows it.
    hr_std, source_std, error = 0.5, 0.5, 0.3
    generator = torch.Generator().manual_seed(0)
    start = source_std * torch.randn(20000, generator=generator, dtype=torch.float64)
    widths = []
    for shift in (1.0, 1.1, 1.2):
        scheduler = FlowMatchSREulerScheduler(evaluate_shift=shift)

        def estimate(x: torch.Tensor, sigma: float) -> torch.Tensor:
            gain = (1 - sigma) * hr_std**2 / ((1 - sigma) ** 2 * hr_std**2 + sigma**2 * source_std**2)
            wrong = 0.0 if sigma == 1 else error * torch.randn(x.shape, generator=generator, dtype=x.dtype)
            return gain * x + wrong

        widths.append(float(solve(scheduler, estimate, start, 16).std()))
    assert widths[0] > 1.05 * hr_std
    assert widths[0] > widths[1] > widths[2]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction_type", ["velocity", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_single_image_is_reached_exactly_in_any_number_of_steps(path, prediction_type, steps):
    scheduler = FlowMatchSREulerScheduler(path=path, prediction_type=prediction_type, source="noise")
    generator = torch.Generator().manual_seed(0)
    hr, source = (torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    scheduler.set_timesteps(steps)
    x = scheduler.add_noise(hr, source, scheduler.timesteps[0])
    for timestep in scheduler.timesteps:
        perfect = hr if prediction_type == "sample" else scheduler.get_velocity(hr, source, timestep)
        x, estimate = scheduler.step(perfect, timestep, x, return_dict=False)
        torch.testing.assert_close(estimate, hr, atol=1e-6, rtol=0)
    torch.testing.assert_close(x, hr, atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_is_the_derivative_of_the_path(path):
    scheduler = FlowMatchSREulerScheduler(path=path)
    hr, source = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps, h = torch.tensor([100.0, 300.0, 500.0, 700.0, 900.0], dtype=torch.float64), 1e-3
    ahead, behind = (scheduler.add_noise(hr, source, timesteps + d) for d in (h, -h))
    slope = (ahead - behind) / (2 * h) * scheduler.config.num_train_timesteps
    torch.testing.assert_close(scheduler.get_velocity(hr, source, timesteps), slope, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_predicted_image_means_the_same_velocity(path):
    scheduler = FlowMatchSREulerScheduler(path=path, prediction_type="sample")
    hr, source = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([100.0, 300.0, 500.0, 700.0, 1000.0])
    x_t = scheduler.add_noise(hr, source, timesteps)
    velocity = scheduler.predict_velocity(hr, x_t, timesteps)
    torch.testing.assert_close(velocity, scheduler.get_velocity(hr, source, timesteps), atol=1e-6, rtol=1e-6)


def test_linear_step_is_eulers():
    scheduler = FlowMatchSREulerScheduler(prediction_type="velocity")
    scheduler.set_timesteps(5)
    x, velocity = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stepped = scheduler.step(velocity, scheduler.timesteps[1], x).prev_sample
    torch.testing.assert_close(stepped, x - 0.2 * velocity, atol=1e-6, rtol=0)


def test_vp_path_keeps_unit_variance():
    scheduler = FlowMatchSREulerScheduler(path="vp", source="noise", source_noise_std=1.0)
    hr, source = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0))
    for timestep in (0.0, 250.0, 900.0):
        assert abs(float(scheduler.add_noise(hr, source, torch.tensor(timestep)).std()) - 1) < 0.01


def test_step_depends_on_its_arguments_alone():
    scheduler = FlowMatchSREulerScheduler()
    scheduler.set_timesteps(4)
    x, prediction = torch.randn(2, 1, 3, 4, 4)
    first = [scheduler.step(prediction, t, x).prev_sample for t in scheduler.timesteps]
    again = [scheduler.step(prediction, t, x).prev_sample for t in scheduler.timesteps.flip(0)]
    for a, b in zip(first, reversed(again)):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("source", "mean"), [("noise", 0.0), ("lr", 0.5), ("prior", -0.25)])
def test_source_has_its_mean_and_std(source, mean):
    scheduler = FlowMatchSREulerScheduler(source=source, source_noise_std=0.3)
    lr_up = torch.full((1, 3, 256, 256), 0.5)
    prior = torch.full_like(lr_up, -0.25) if source == "prior" else None
    draw = scheduler.sample_source(lr_up, prior, torch.Generator().manual_seed(0))
    assert abs(float(draw.mean()) - mean) < 0.003
    assert abs(float(draw.std()) - 0.3) < 0.003
    assert scheduler.init_noise_sigma == 0.3


def test_source_of_a_batch_is_that_of_its_pictures():
    scheduler = FlowMatchSREulerScheduler()
    lr_up = torch.rand(3, 3, 5, 7)
    together = scheduler.sample_source(lr_up, generator=[torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = scheduler.sample_source(lr_up[i : i + 1], generator=torch.Generator().manual_seed(i))
        assert torch.equal(together[i : i + 1], alone)
    shared = torch.Generator().manual_seed(5)
    one_by_one = [scheduler.sample_source(lr_up[i : i + 1], generator=shared) for i in range(3)]
    assert torch.equal(
        scheduler.sample_source(lr_up, generator=torch.Generator().manual_seed(5)), torch.cat(one_by_one)
    )


def test_grids():
    scheduler = FlowMatchSREulerScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.1])
    assert scheduler.num_inference_steps == 3
    np.testing.assert_allclose(scheduler.timesteps, [1000, 500, 100], rtol=1e-6)
    assert scheduler.sigmas[-1] == 0
    scheduler.set_timesteps(timesteps=[900.0, 300.0])
    np.testing.assert_allclose(scheduler.sigmas, [0.9, 0.3, 0.0], rtol=1e-6)
    assert len(scheduler) == 1000
    assert torch.equal(scheduler.scale_model_input(scheduler.sigmas), scheduler.sigmas)


@pytest.mark.parametrize(
    "wrong", [[0.5, 1.0], [1.0, 1.0], [1.0, 0.0], [1.2, 0.5], [], [1.0, float("nan")], [[1.0], [0.5]]]
)
def test_grids_that_do_not_fall_are_refused(wrong):
    with pytest.raises(ValueError, match="fall strictly"):
        FlowMatchSREulerScheduler().set_timesteps(sigmas=wrong)


def test_wrong_arguments_are_named():
    scheduler = FlowMatchSREulerScheduler()
    with pytest.raises(ValueError, match="num_inference_steps"):
        scheduler.set_timesteps(0)
    with pytest.raises(ValueError, match="not both"):
        scheduler.set_timesteps(sigmas=[1.0], timesteps=[1000.0])
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="element of `scheduler.timesteps`"):
        scheduler.step(torch.zeros(1, 3, 4, 4), 600.0, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="one generator per picture"):
        scheduler.sample_source(torch.zeros(2, 3, 4, 4), generator=[torch.Generator()])
    with pytest.raises(ValueError, match="needs `prior`"):
        FlowMatchSREulerScheduler(source="prior").sample_source(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(\) or \(2,\)"):
        scheduler.add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3))
    wrong = {"source": "hr", "path": "cubic", "prediction_type": "epsilon", "evaluate_at": "end", "evaluate_shift": 0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            FlowMatchSREulerScheduler(**{name: value})


def test_saves_and_loads(tmp_path):
    FlowMatchSREulerScheduler(source="noise", path="vp", source_noise_std=0.7).save_pretrained(tmp_path)
    loaded = FlowMatchSREulerScheduler.from_pretrained(tmp_path)
    assert (loaded.config.source, loaded.config.path, loaded.config.source_noise_std) == ("noise", "vp", 0.7)
    assert "FlowMatchEulerDiscreteScheduler" in [cls.__name__ for cls in loaded.compatibles]
