"""Solvers against a flow with a known solution, and the pipelines that use them."""

import io
import math
import re

import pytest
import torch
from conftest import make_generator, make_pipeline, random_picture, seeded

from flowsr import FlowMatchPipeline
from flowsr.pipelines.flow import integrate

ORDERS = {"midpoint": 2, "heun": 2, "rk4": 4}


def gaussian_velocity(x, sigma):
    """Between N(0, 0.5^2) at 0 and N(0, 2^2) at 1 on the linear path; the flow scales by the ratio of the stds."""
    variance = (1 - sigma) ** 2 * 0.25 + sigma**2 * 4
    return (-(1 - sigma) * 0.25 + sigma * 4) / variance * x


@pytest.mark.parametrize("solver", ORDERS)
def test_order_of_convergence(solver):
    start = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    errors = []
    for steps in (40, 80):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end, evaluations = integrate(gaussian_velocity, start, sigmas, solver, 0, 0)
        errors.append(float((end - start / 4).abs().max()))
        assert evaluations == steps * ORDERS[solver]
    assert math.log2(errors[0] / errors[1]) > ORDERS[solver] - 0.3


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6])
def test_dopri5_meets_its_tolerance(tolerance):
    start = torch.tensor([[1.0, -3.0]], dtype=torch.float64)
    sigmas = torch.tensor([1.0, 0.0], dtype=torch.float64)
    end, evaluations = integrate(gaussian_velocity, start, sigmas, "dopri5", tolerance, tolerance)
    assert (end - start / 4).abs().max() < 20 * tolerance  # the tolerance is that of one step
    assert evaluations > 6


@pytest.mark.parametrize("solver", [*ORDERS, "dopri5"])
def test_super_resolution_approaches_many_euler_steps(solver):
    pipe = make_pipeline(block_out_channels=(4,))
    picture, options = random_picture(6, 5), {"output_type": "latent"}
    many = pipe(picture, 400, generator=seeded(), **options).images
    few = pipe(picture, 20, generator=seeded(), **options).images
    solved = pipe(picture, 20, solver=solver, generator=seeded(), **options).images
    assert (solved - many).abs().mean() < 0.3 * (few - many).abs().mean()
    assert pipe.num_evaluations >= 20
    for steps in (1, 4):  # the faithful end is one evaluation, whatever the solver
        faithful = pipe(picture, steps, fidelity=1.0, solver=solver, generator=seeded(), **options).images
        assert pipe.num_evaluations == 1
        assert torch.equal(faithful, pipe(picture, steps, fidelity=1.0, generator=seeded(), **options).images)


@pytest.mark.parametrize("shift", [1.0, 1.5])
def test_every_solver_tells_the_network_of_the_shifted_noise_level(shift):
    pipe, times = make_pipeline({"evaluate_shift": shift}), []
    pipe.unet.register_forward_pre_hook(lambda _, inputs: times.append(float(inputs[1])))
    pipe(random_picture(6, 5), 2, solver="midpoint")
    expected = [1000 * shift * s / (1 + (shift - 1) * s) for s in (1.0, 0.75, 0.5, 0.25)]
    assert times == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("solver", ["euler", *ORDERS, "dopri5"])
@pytest.mark.parametrize("fidelity", [0.0, 0.5])
def test_the_bar_moves_with_the_steps_of_every_solver(solver, fidelity):
    pipe, out = make_pipeline(block_out_channels=(4,)), io.StringIO()
    pipe.set_progress_bar_config(file=out, mininterval=0, miniters=1)
    pipe(random_picture(6, 5), 4, solver=solver, fidelity=fidelity)
    positions = [int(number) for number in re.findall(r"(\d+)/4 ", out.getvalue())]
    assert positions == sorted(positions)
    assert set(positions) >= ({0, 4} if solver == "dopri5" else {0, 1, 2, 3, 4})


@pytest.mark.parametrize("solver", ["euler", *ORDERS, "dopri5"])
def test_generation_by_class_and_seed(solver):
    pipe = make_generator()
    call = lambda labels, seed: pipe(  # noqa: E731
        class_labels=labels, num_inference_steps=3, solver=solver, rtol=1e-2, atol=1e-2,
        generator=[seeded(seed + i) for i in range(2)], output_type="latent",
    ).images  # fmt: skip
    first, again, other_class, other_seed = call([0, 1], 0), call([0, 1], 0), call([0, 2], 0), call([0, 1], 9)
    assert first.shape == (2, 1, 8, 12)
    assert torch.equal(first, again)
    assert not torch.allclose(first[1], other_class[1])
    assert not torch.allclose(first, other_seed)
    assert pipe.num_evaluations == {"euler": 3, "midpoint": 6, "heun": 6, "rk4": 12}.get(solver, pipe.num_evaluations)


def test_guidance_extrapolates_from_no_class():
    pipe, latents = make_generator(), torch.randn(1, 1, 8, 12, generator=seeded())
    outs = [
        pipe(class_labels=1, num_inference_steps=1, guidance_scale=g, latents=latents, output_type="latent").images
        for g in (0.0, 1.0, 2.0)
    ]
    torch.testing.assert_close(outs[2] - outs[1], outs[1] - outs[0], atol=1e-5, rtol=1e-5)
    none = pipe(num_inference_steps=1, latents=latents, output_type="latent").images
    torch.testing.assert_close(outs[0], none)


def test_forms_of_output_and_round_trip(tmp_path):
    pipe = make_generator(classes=None, data_range=[0.0, 1.0])
    pil, array, tensor = (
        pipe(2, num_inference_steps=1, generator=seeded(), output_type=kind).images for kind in ("pil", "np", "pt")
    )
    assert [image.size for image in pil] == [(12, 8)] * 2
    assert pil[0].mode == "L"
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    pipe.save_pretrained(tmp_path)
    loaded = FlowMatchPipeline.from_pretrained(tmp_path, disable_mmap=True)
    assert torch.equal(loaded(2, num_inference_steps=1, generator=seeded(), output_type="pt").images, tensor)


def test_wrong_arguments_are_named():
    pipe = make_generator()
    cases = {
        "class_labels": {"class_labels": [3]},
        "Nothing to do": {"class_labels": []},
        "no class to be guided to": {"guidance_scale": 2.0},
        "`solver`": {"solver": "rk5"},
        "`output_type`": {"output_type": "gif"},
        "`latents`": {"latents": torch.zeros(1, 1, 4, 4)},
    }
    for message, arguments in cases.items():
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    with pytest.raises(ValueError, match="knows no classes"):
        make_generator(classes=None)(class_labels=1)
    with pytest.raises(ValueError, match="`solver`"):
        make_pipeline()(random_picture(4, 4), solver="rk5")
