"""The way from source to image: Euler's steps by the scheduler, and the solvers of torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

SOLVERS = {"midpoint": "midpoint", "heun": "heun2", "rk4": "rk4", "dopri5": "dopri5"}  # ours -> torchdiffeq's
SMALLEST_SIGMA = 1e-3  # where a predicted image is taken instead of at 0, at which it gives no velocity


def check_solver(solver: str, rtol: float, atol: float, callback_on_step_end: Callable | None) -> None:
    """Raises a ValueError for a solver that does not exist, that has no steps for a callback, or no tolerance."""
    if solver != "euler" and (solver not in SOLVERS or callback_on_step_end is not None):
        raise ValueError(
            f"`solver` must be one of {['euler', *SOLVERS]}, and only 'euler' has steps for a callback; "
            f"got {solver!r}."
        )
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, (int, float)) or not value > 0:
            raise ValueError(f"`{name}` must be a positive number, such as 1e-3, got {value!r}.")


class FlowMixin:
    """For a `PipelineMixin` whose scheduler is a [`FlowMatchSREulerScheduler`]."""

    def follow_flow(
        self,
        evaluate: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        x_t: torch.Tensor,
        solver: str,
        rtol: float,
        atol: float,
        bar,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        jump: bool = False,
    ) -> torch.Tensor:
        """From the source to the image along the grid of the scheduler.

        Args:
            evaluate: the network's prediction, of state and timestep.
            solver, rtol, atol: see [`integrate`].
            bar: progress bar of diffusers, moved by one for each step of the grid.
            jump (`bool`): the last step goes straight to the image estimate, whatever the solver.
        """
        scheduler, timesteps = self.scheduler, self.scheduler.timesteps
        if solver != "euler":
            sigmas = scheduler.sigmas[:-1] if jump else scheduler.sigmas
            timesteps = timesteps[len(sigmas) - 1 :]

            def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
                if scheduler.config.prediction_type == "sample":
                    sigma = sigma.clamp(min=SMALLEST_SIGMA)
                prediction = evaluate(x, scheduler.shifted(sigma) * scheduler.config.num_train_timesteps)
                return scheduler.predict_velocity(prediction, x, sigma * scheduler.config.num_train_timesteps)

            x_t, _ = integrate(velocity, x_t, sigmas, solver, rtol, atol, bar.update)
        return self.denoise(evaluate, x_t, timesteps, bar, callback_on_step_end, callback_on_step_end_tensor_inputs)


def integrate(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    solver: str,
    rtol: float,
    atol: float,
    on_step: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, int]:
    """Solves d x / d sigma = velocity(x, sigma) from the first of `sigmas` to the last, in float32 at least.

    Args:
        velocity: of the state and a scalar sigma.
        x (`torch.Tensor` of shape `(batch, c, h, w)`): the state at `sigmas[0]`.
        sigmas (`torch.Tensor` of shape `(steps + 1,)`): falling; the steps of the fixed-step solvers.
        solver (`"midpoint"`, `"heun"`, `"rk4"`, `"dopri5"`): the last chooses its own steps, so that the error stays
            below `rtol` and `atol`; one choice for the whole batch.
        on_step: called with the number of steps of `sigmas` that have been passed since it was called before.

    Returns:
        The state at `sigmas[-1]`, and the number of evaluations of `velocity`.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"The solver {solver!r} needs torchdiffeq: pip install torchdiffeq") from error
    if len(sigmas) == 1:
        return x, 0
    evaluations = passed = 0
    ends = sigmas[1:].tolist()

    def pass_steps(until: float) -> None:
        nonlocal passed
        now = max(passed, sum(end >= until for end in ends))  # a rejected step goes back
        if on_step is not None and now > passed:
            on_step(now - passed)
        passed = now

    def right_hand_side(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        pass_steps(float(sigma) + 1e-6)
        return velocity(state, sigma)

    sigmas = sigmas.to(x.device, torch.promote_types(x.dtype, torch.float32))
    times = sigmas if SOLVERS[solver] != "dopri5" else sigmas[[0, -1]]
    try:
        states = odeint(right_hand_side, x.to(sigmas.dtype), times, method=SOLVERS[solver], rtol=rtol, atol=atol)
    except AssertionError as error:  # torchdiffeq's word for a step of length 0 or NaN
        raise ValueError(
            f"The solver {solver!r} found no step ({error}): the network answers NaN, or `rtol` and `atol` are below "
            "its precision. Raise them, or take a solver with fixed steps."
        ) from error
    pass_steps(ends[-1])
    return states[-1].to(x.dtype), evaluations
