"""The optimisers of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from flowsr.training.averages import placed_like
from flowsr.training.trainable import trainable

OPTIMIZERS = ("adamw", "adamw_8bit", "muon")
MAX_NORM = 1.0  # gradients are clipped to it
ADAM = {"betas": [0.9, 0.99], "eps": 1e-10, "weight_decay": 0.0}  # gradients of a mean over small residuals are small


def make_optimizer(
    name: str, network: nn.Module, learning_rate: float, adam: dict[str, object] = ADAM
) -> torch.optim.Optimizer:
    """The optimiser of the trainable weights of a network.

    Args:
        name: "adamw" (Loshchilov and Hutter 2019), "adamw_8bit" (its states in 8 bits, Dettmers et al. 2022, by
            bitsandbytes) or "muon" (see [`Muon`]).
        learning_rate (`float`): peak.
        adam (`dict`): `betas`, `eps` and `weight_decay` of AdamW.
    """
    options = {**adam, "lr": learning_rate, "betas": tuple(adam["betas"])}
    if name == "adamw":
        return torch.optim.AdamW(trainable(network), **options)
    if name == "muon":
        return Muon(network, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError("`optimizer: adamw_8bit` needs bitsandbytes: pip install bitsandbytes") from error
    return AdamW8bit(trainable(network), **options)


def apply_rate(lr_schedule: torch.optim.lr_scheduler.LambdaLR, learning_rate: float, adam: dict[str, object]) -> None:
    """Gives a peak rate and AdamW's settings to an optimiser and a schedule whose state came from a checkpoint."""
    lr_schedule.base_lrs = [learning_rate] * len(lr_schedule.base_lrs)
    rates = [
        rate * factor(lr_schedule.last_epoch) for rate, factor in zip(lr_schedule.base_lrs, lr_schedule.lr_lambdas)
    ]
    for group, rate in zip(lr_schedule.optimizer.param_groups, rates, strict=True):
        group |= {**adam, "lr": rate, "initial_lr": learning_rate, "betas": tuple(adam["betas"])}
    lr_schedule._last_lr = rates


class Muon(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the convolutions inside a network, AdamW for the rest at the same rate.

    A convolution is seen as a matrix `(out, in * kh * kw)`, and its momentum is replaced by the nearest orthogonal
    matrix, so that all directions are learned equally fast. The factor `0.2 * sqrt(max(sides))` gives the update the
    RMS of AdamW's (Liu et al. 2025, Muon is Scalable for LLM Training, eq. 4), so that one learning rate serves both.
    First and last convolutions (`conv_in`, `conv_out`), biases, embeddings and linear layers are AdamW's.

    Args:
        network (`nn.Module`): whose trainable weights are optimised.
        lr, betas, eps, weight_decay: AdamW's; `lr` and `weight_decay` hold for both.
        momentum (`float`): of the orthogonalised gradient, with Nesterov's look ahead.
    """

    def __init__(self, network: nn.Module, lr: float, momentum: float = 0.95, **adamw):
        inner, rest = [], []
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim == 4 and "conv_in" not in name and "conv_out" not in name
                (inner if matrix else rest).append(parameter)
        groups = [{"params": inner, "momentum": momentum}, {"params": rest, "momentum": None}]
        super().__init__([group for group in groups if group["params"]], lr=lr, **adamw)

    def step(self, closure: Callable | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if group["momentum"] is not None:
                    self.orthogonal_step(group)
        super().step()
        return loss

    def orthogonal_step(self, group: dict) -> None:
        """Moves the weights of a group and drops their gradients, so that AdamW's step leaves them alone."""
        ahead: dict[torch.Size, list[tuple[nn.Parameter, torch.Tensor]]] = {}  # by shape: one product serves many
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
                state["momentum_buffer"] = torch.zeros_like(weight)
            average = state["momentum_buffer"]
            average.lerp_(weight.grad, 1 - group["momentum"])
            step = weight.grad.lerp(average, group["momentum"])
            step = step.full_tensor() if hasattr(step, "full_tensor") else step  # sharded by FSDP 2
            ahead.setdefault(step.shape, []).append((weight, step))
            weight.grad = None
        for shape, pairs in ahead.items():
            updates = orthogonalised(torch.stack([step.flatten(1) for _, step in pairs]))
            size = 0.2 * max(updates.shape[1:]) ** 0.5
            for (weight, _), update in zip(pairs, updates):
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(placed_like(weight, update.view(shape)).mul_(group["lr"] * size))


def orthogonalised(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """About U V^T of the singular value decomposition U S V^T, by the Newton-Schulz iteration of Jordan et al. 2024.

    Its coefficients trade precision for speed: singular values end between 0.7 and 1.2, except the very smallest.

    Args:
        matrix (`torch.Tensor` of shape `(..., rows, columns)`).
    """
    x = matrix.float()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).to(matrix.dtype)
