"""What the network is trained on: at which noise levels, and by which distance."""

from __future__ import annotations

import torch
import torch.nn.functional as F

GOLDEN_RATIO = (5**0.5 - 1) / 2
SILVER_RATIO = 2**0.5 - 1

LOSSES = {
    "l1": F.l1_loss,  # posterior median: the vivid end of the dial then improves with every step
    "mse": F.mse_loss,  # posterior mean: Lipman et al. 2023, eq. 14
}


def sigmas_for(index: torch.Tensor, seed: int, atom: float, low: float = 0.02) -> torch.Tensor:
    """The noise level at which each training crop is seen.

    With probability `atom` sigma is 1, where the network alone makes the one-step answer; else it is uniform in
    (low, 1). The uniform numbers behind it are the Kronecker sequence frac(u + index * golden ratio), so that any run
    of consecutive crops is spread evenly, however it is cut into batches, accumulation steps and processes.

    Args:
        index (`torch.LongTensor` of shape `(batch,)`): running number of each crop since the start of training.
        seed (`int`): start of the sequence.
        atom (`float` in [0, 1]): share of crops at sigma = 1.
        low (`float` in (0, 1)): smallest sigma; the velocity of a predicted image divides by it.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32, in (low, 1].
    """
    u = kronecker(index, seed, GOLDEN_RATIO)
    spread = 1 - (1 - low) * (u - atom) / max(1 - atom, 1e-12)
    return torch.where(u < atom, torch.ones_like(u), spread).float().to(index.device)


def condition_dropped(index: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """Which crops are trained without their LR features, for classifier-free guidance: `(batch,)`, bool."""
    return (kronecker(index, seed, SILVER_RATIO) < share).to(index.device)


def kronecker(index: torch.Tensor, seed: int, ratio: float) -> torch.Tensor:
    """frac(u + index * ratio): evenly spread numbers in [0, 1), float64 on the CPU, from a start u given by `seed`."""
    start = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (start + index.cpu().double() * ratio) % 1.0


def generators_for(index: torch.Tensor, seed: int) -> list[torch.Generator]:
    """One generator per crop, a function of (seed, crop) alone: the noise of a crop is the same in any batch."""
    return [torch.Generator(index.device).manual_seed(seed * 2**40 + int(i)) for i in index]
