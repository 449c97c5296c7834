"""How far a prediction is from its target: distances of each crop, and further terms on an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

# Distances of prediction and target, `(batch, c, h, w)` twice -> `(batch,)`.


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of |error|."""
    return mean_of_each(F.l1_loss(prediction, target, reduction="none"))


def mse(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean of error^2."""
    return mean_of_each(F.mse_loss(prediction, target, reduction="none"))


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
