"""What the network is trained on: at which times, by which distance, with which further terms."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

GOLDEN_RATIO = (5**0.5 - 1) / 2
SILVER_RATIO = 2**0.5 - 1


# Distances of prediction and target, `(batch, c, h, w)` twice -> `(batch,)`.


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of |error|."""
    return mean_of_each(F.l1_loss(prediction, target, reduction="none"))


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of error^2."""
    return mean_of_each(F.mse_loss(prediction, target, reduction="none"))


def rmse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Square root of the MSE.

    Its unit is that of L1, so that the two can be mixed; its minimum, in many dimensions, is that of the MSE, with
    pictures weighted by 1 / RMSE: between MSE (all alike) and the mean of PSNR (1 / MSE).
    """
    error = (prediction - target).flatten(1)
    return torch.linalg.vector_norm(error, dim=1) / error.shape[1] ** 0.5  # whose gradient at 0 is 0, unlike sqrt's


def charbonnier(prediction: torch.Tensor, target: torch.Tensor, epsilon: float = 1e-3) -> torch.Tensor:
    """Mean of sqrt(error^2 + epsilon^2), a smooth L1 (Charbonnier et al. 1994)."""
    return mean_of_each(torch.sqrt((prediction - target).square() + epsilon**2))


def huber(prediction: torch.Tensor, target: torch.Tensor, delta: float = 0.1) -> torch.Tensor:
    """Mean of error^2 / 2 up to |error| = delta, linear beyond (Huber 1964); delta in units of the velocity."""
    return mean_of_each(F.huber_loss(prediction, target, delta=delta, reduction="none"))


def mean_of_each(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).mean(1)


LOSSES = {
    "l1": l1,  # posterior median: the vivid end of the dial then improves with every step
    "mse": mse,  # posterior mean: Lipman et al. 2023, eq. 14
    "rmse": rmse,
    "charbonnier": charbonnier,
    "huber": huber,
}


# Further terms, on the image estimate.


def perceptual_loss(lpips: nn.Module, estimate: torch.Tensor, hr: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean of (1 - sigma) * LPIPS(estimate, hr): nothing at sigma = 1, whose answer is to stay the posterior mean.

    LPIPS of the image estimate as part of a flow's loss is Lee, Lin and Fanti 2024 (Improving the Training of
    Rectified Flows), section 4.2. The factor 1 - sigma keeps the ratio of its gradient to that of the velocity about
    constant over sigma.

    Args:
        lpips: distance of two batches in [-1, 1], `(n, 3, H, W)` twice -> `(n,)`.
        estimate, hr (`torch.Tensor` of shape `(batch, 3, H, W)`, image range [-1, 1]).
        sigma (`torch.Tensor` of shape `(batch,)`, in (0, 1]).
    """
    inside = sigma < 1
    if not inside.any():
        return estimate.new_zeros(())
    distances = lpips(estimate[inside].float(), hr[inside].float())
    return ((1 - sigma[inside]) * distances).sum() / len(sigma)


def moved_off_the_grid(index: torch.Tensor, seed: int, *images: torch.Tensor, period: int = 4) -> list[torch.Tensor]:
    """Windows of crops that begin at pixels of every phase and are turned and mirrored, the same in each of `images`.

    Crops begin on the grid of the LR, and the strides of a perceptual network have its period; its filters also see
    lines of one direction less well than those of another. What it does not see would lie at the same pixels and in
    the same direction in each crop, and the head would fill these with a mesh.

    Args:
        index (`torch.Tensor` of shape `(batch,)`): numbers of the crops, which decide with `seed`.
        *images (`torch.Tensor` of shape `(batch, c, H, H)`).
        period (`int`): pixels; windows are `(H - period + 1, H - period + 1)`.
    """
    phase = (kronecker(index, seed + 4, GOLDEN_RATIO) * period**2).long().tolist()
    symmetry = (kronecker(index, seed + 5, SILVER_RATIO) * 8).long().tolist()
    side = images[0].shape[-1] - period + 1

    def window(x: torch.Tensor, phase: int, symmetry: int) -> torch.Tensor:
        top, left = divmod(phase, period)
        x = torch.rot90(x[:, top : top + side, left : left + side], symmetry % 4, (1, 2))
        return x.flip(2) if symmetry >= 4 else x

    return [torch.stack([window(*each) for each in zip(batch, phase, symmetry)]) for batch in images]


def frequency_loss(estimate: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the Fourier coefficients (Cho et al. 2021, MIMO-UNet+, eq. 6), of both their parts.

    The transform is not normalised, as in the published recipes, so for white errors it is larger than the L1 of the
    pixels by the side of the crop: their weight of 0.05 makes it the leading term.

    Args:
        estimate, target (`torch.Tensor` of shape `(batch, c, H, W)`, in the same range).
    """
    error = torch.fft.rfft2(estimate.float() - target.float())
    return torch.view_as_real(error).abs().mean()


def colour_loss(estimate: torch.Tensor, lr: torch.Tensor) -> torch.Tensor:
    """Mean square by which the low frequencies of the estimate leave the LR: a regulariser against tint.

    Args:
        estimate (`torch.Tensor` of shape `(batch, c, H, W)`), lr (`(batch, c, h, w)`): in the same range; the estimate
            is brought to the grid of the LR by antialiased bicubic downscaling, as the LR was made.
    """
    small = F.interpolate(estimate.float(), size=lr.shape[-2:], mode="bicubic", antialias=True)
    return F.mse_loss(small, lr.float())


# Times. Crop number k of a run has its own, whatever the batches, accumulation steps and processes.


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


# Chance.


def condition_dropped(index: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """Which crops are trained without their condition, for classifier-free guidance: `(batch,)`, bool."""
    return (kronecker(index, seed, SILVER_RATIO) < share).to(index.device)


def kronecker(index: torch.Tensor, seed: int, ratio: float) -> torch.Tensor:
    """frac(u + index * ratio): evenly spread numbers in [0, 1), float64 on the CPU, from a start u given by `seed`."""
    start = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (start + index.cpu().double() * ratio) % 1.0


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
