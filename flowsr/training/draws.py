"""What chance decides for crop number k of a run: a function of (seed, k), whatever the batches and processes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

GOLDEN_RATIO = (5**0.5 - 1) / 2
SILVER_RATIO = 2**0.5 - 1

# Times.


def uniforms(index: torch.Tensor, seed: int, law: str) -> torch.Tensor:
    """A number in [0, 1) for each crop; float64 `(batch,)` on the CPU.

    "stratified" (and "logit_normal", which bends it later) is the Kronecker sequence frac(u + index * golden ratio):
    any run of consecutive crops is spread evenly, so that the loss of a batch varies less. "uniform" draws
    independently.
    """
    if law == "uniform":
        draws = [torch.rand((), generator=g, dtype=torch.float64) for g in generators_for(index.cpu(), seed + 1)]
        return torch.stack(draws)
    return kronecker(index, seed, GOLDEN_RATIO)


def logit_normal_quantile(u: torch.Tensor) -> torch.Tensor:
    """Quantile function of the law of 1 / (1 + exp(-n)), n standard normal (Esser et al. 2024, section 3.1)."""
    return torch.sigmoid(torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))


LAWS = ("stratified", "uniform", "logit_normal")


def sigmas_for(
    index: torch.Tensor, seed: int, atom: float, low: float = 0.02, law: str = "stratified"
) -> torch.Tensor:
    """The noise level at which each training crop of a flow is seen.

    With probability `atom` sigma is 1, where the network alone makes the one-step answer; else it follows the law
    over (low, 1).

    Args:
        index (`torch.LongTensor` of shape `(batch,)`): running number of each crop since the start of training.
        seed (`int`): start of the sequence.
        atom (`float` in [0, 1]): share of crops at sigma = 1.
        low (`float` in (0, 1)): smallest sigma; the velocity of a predicted image divides by it.
        law ("stratified", "uniform", "logit_normal"): see [`uniforms`] and [`logit_normal_quantile`].

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32, in (low, 1].
    """
    u = uniforms(index, seed, law)
    rest = ((u - atom) / max(1 - atom, 1e-12)).clamp(0, 1)
    if law == "logit_normal":
        rest = logit_normal_quantile(rest)
    spread = 1 - (1 - low) * rest
    return torch.where(u < atom, torch.ones_like(u), spread).float().to(index.device)


def timesteps_for(index: torch.Tensor, seed: int, count: int, law: str = "stratified") -> torch.Tensor:
    """The timestep at which each training crop of a diffusion is seen: `(batch,)`, int64, in 0..count - 1."""
    u = uniforms(index, seed, law)
    if law == "logit_normal":
        u = logit_normal_quantile(u)
    return (u * count).long().clamp(max=count - 1).to(index.device)


def unrolling_for(index: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Within how many steps of the sampler each crop is seen (2, 4 or 8), and how many heads lie behind it (0 to 2).

    The step at sigma = 1 has no head, so a crop with n steps and k heads behind it stands at sigma = 1 - (k + 1) / n.

    Returns:
        Two tensors of shape `(batch,)`: float32 and int64.
    """
    kind = (kronecker(index, seed + 2, GOLDEN_RATIO) * 3).long()
    heads = torch.tensor([1, 3, 3])[kind]  # of which the last is the one that learns
    done = (kronecker(index, seed + 3, SILVER_RATIO) * heads).long()
    return torch.tensor([2.0, 4.0, 8.0])[kind].to(index.device), done.to(index.device)


# Places, conditions and noise.


def moved_off_the_grid(index: torch.Tensor, seed: int, *images: torch.Tensor, period: int = 4) -> list[torch.Tensor]:
    """Windows of crops at pixels of every phase, turned, mirrored and every other one enlarged, alike in all `images`.

    Crops begin on the grid of the LR, and the strides of a perceptual network have its period; its filters also see
    lines of one direction less well than those of another, and single pixels less well than what is twice as large.
    What it does not see would lie at the same pixels and in the same direction in each crop, and the head would fill
    these with a mesh.

    Args:
        index (`torch.Tensor` of shape `(batch,)`): numbers of the crops, which decide with `seed`.
        *images (`torch.Tensor` of shape `(batch, c, H, H)`).
        period (`int`): pixels; windows are `(H - period + 1, H - period + 1)`, of which an enlarged one shows half
            the side, by bicubic interpolation.
    """
    phase = (kronecker(index, seed + 4, GOLDEN_RATIO) * period**2).long().tolist()
    symmetry = (kronecker(index, seed + 5, SILVER_RATIO) * 8).long().tolist()
    enlarged = (kronecker(index, seed + 6, 3**0.5) < 0.5).tolist()  # independent of the two above
    side = images[0].shape[-1] - period + 1

    def window(x: torch.Tensor, phase: int, symmetry: int, enlarged: bool) -> torch.Tensor:
        top, left = divmod(phase, period)
        x = torch.rot90(x[:, top : top + side, left : left + side], symmetry % 4, (1, 2))
        x = x.flip(2) if symmetry >= 4 else x
        if enlarged:
            half = x[None, :, : (side + 1) // 2, : (side + 1) // 2]
            x = F.interpolate(half, size=(side, side), mode="bicubic", align_corners=False)[0]
        return x

    return [torch.stack([window(*each) for each in zip(batch, phase, symmetry, enlarged)]) for batch in images]


def condition_dropped(index: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """Which crops are trained without their condition, for classifier-free guidance: `(batch,)`, bool."""
    return (kronecker(index, seed, SILVER_RATIO) < share).to(index.device)


def kronecker(index: torch.Tensor, seed: int, ratio: float) -> torch.Tensor:
    """frac(u + index * ratio): evenly spread numbers in [0, 1), float64 on the CPU, with u drawn by `seed`."""
    u = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (u + index.cpu().double() * ratio) % 1.0


def generators_for(index: torch.Tensor, seed: int, device: torch.device | None = None) -> list[torch.Generator]:
    """One generator per crop, a function of (seed, crop) alone: the noise of a crop is the same in any batch.

    Args:
        index (`torch.LongTensor` of shape `(batch,)`): running number of each crop, below 2^40.
        seed (`int`): any that is not negative.
        device: of the generators; by default that of `index`.
    """
    device = index.device if device is None else device
    return [torch.Generator(device).manual_seed(mixed(seed, i)) for i in index.tolist()]


def mixed(seed: int, number: int) -> int:
    """A seed of 64 bits of two numbers: side by side where they have the room, else by NumPy's hash of seeds."""
    if seed < 2**24:
        return seed * 2**40 + number
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0])
