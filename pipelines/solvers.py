"""Higher-order and adaptive solvers of the flow, by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable

import torch

SOLVERS = {"midpoint": "midpoint", "heun": "heun2", "rk4": "rk4", "dopri5": "dopri5"}  # ours -> torchdiffeq's
SMALLEST_SIGMA = 1e-3  # where a predicted image is taken instead of at 0, at which it gives no velocity


def check_solver(solver: str, callback: Callable | None) -> None:
    """Raises a ValueError for a solver that does not exist, or that has no steps for a callback."""
    if solver != "euler" and (solver not in SOLVERS or callback is not None):
        raise ValueError(
            f"`solver` must be one of {['euler', *SOLVERS]}, and only 'euler' has steps for a callback; "
            f"got {solver!r}."
        )


def integrate(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    sigmas: torch.Tensor,
    solver: str,
    rtol: float,
    atol: float,
) -> tuple[torch.Tensor, int]:
    """Solves d x / d sigma = velocity(x, sigma) from the first of `sigmas` to the last, in float32 at least.

    Args:
        velocity: of the state and a scalar sigma.
        x (`torch.Tensor` of shape `(batch, c, h, w)`): the state at `sigmas[0]`.
        sigmas (`torch.Tensor` of shape `(steps + 1,)`): falling; the steps of the fixed-step solvers.
        solver (`"midpoint"`, `"heun"`, `"rk4"`, `"dopri5"`): the last chooses its own steps, so that the error stays
            below `rtol` and `atol`; one choice for the whole batch.

    Returns:
        The state at `sigmas[-1]`, and the number of network evaluations.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise ImportError(f"The solver {solver!r} needs torchdiffeq: pip install torchdiffeq") from error
    if len(sigmas) == 1:
        return x, 0
    evaluations = 0

    def right_hand_side(sigma: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        return velocity(state, sigma)

    sigmas = sigmas.to(x.device, torch.promote_types(x.dtype, torch.float32))
    times = sigmas if SOLVERS[solver] != "dopri5" else sigmas[[0, -1]]
    states = odeint(right_hand_side, x.to(sigmas.dtype), times, method=SOLVERS[solver], rtol=rtol, atol=atol)
    return states[-1].to(x.dtype), evaluations
