"""Another model's estimate of the picture, from which a flow may start (posterior-mean rectified flow)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def estimate(prior: torch.nn.Module, lr: torch.Tensor, scale: int) -> torch.Tensor:
    """The prior's picture for each LR, exactly `scale` times as large.

    Args:
        prior: called with one tensor `(n, 3, h, w)` in [0, 1], in its own dtype; answers a tensor
            `(n, 3, scale * h, scale * w)` in [0, 1], or an output of transformers or diffusers whose first field is
            that. Where its config has a `window_size` (Swin2SR and its kin), sides are extended by their edge to a
            multiple of it, and the answer is cut again, so that any size will do.
        lr (`torch.Tensor` of shape `(n, 3, h, w)`, in [-1, 1]).

    Returns:
        `torch.Tensor` of shape `(n, 3, scale * h, scale * w)`, near [-1, 1], in the dtype of `lr`.

    Raises:
        ValueError: if the answer has another size, which means that the prior was made for another scale.
    """
    height, width = lr.shape[-2:]
    window = getattr(prior.config, "window_size", 1)
    padded = F.pad(lr, (0, -width % window, 0, -height % window), mode="replicate")
    answer = prior(((padded + 1) / 2).to(prior.dtype))
    picture = answer if isinstance(answer, torch.Tensor) else answer[0]
    wanted = (len(lr), lr.shape[1], padded.shape[-2] * scale, padded.shape[-1] * scale)
    if tuple(picture.shape) != wanted:
        raise ValueError(
            f"`prior` must answer pictures {scale} times as large, of shape {wanted} for an input of "
            f"{tuple(padded.shape)}, got {tuple(picture.shape)}; is {type(prior).__name__} made for another scale?"
        )
    return picture[..., : height * scale, : width * scale].to(lr) * 2 - 1
