"""What a pipeline gives its network beside the state: classes, tokens of an encoder, another model's estimate."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def read_class_labels(
    unet: torch.nn.Module, class_labels: int | list[int] | torch.Tensor | None, count: int, device: torch.device
) -> torch.Tensor | None:
    """Class indices of `count` images, `(count,)`; no class where there is no label; `None` for a network without.

    Raises:
        ValueError: for labels that the network does not know, or more or fewer than there are images.
    """
    classes = getattr(unet.config, "num_class_embeds", None)
    if classes is None:
        if class_labels is not None:
            raise ValueError("`class_labels` were given, but this network knows no classes.")
        return None
    labels = list(class_labels) if np.ndim(class_labels) else [class_labels] * count
    if len(labels) != count:
        raise ValueError(f"`class_labels` must hold one label per image, got {len(labels)} for {count}.")
    wrong = [label for label in labels if label is not None and label not in range(classes)]
    if wrong:
        raise ValueError(f"`class_labels` must be whole numbers in 0..{classes - 1}, got {wrong}.")
    return torch.tensor([classes if label is None else int(label) for label in labels], device=device)


def repeat(conditions: dict, copies: int) -> dict:
    """Each condition, and each tensor of an encoding, `copies` times next to each other."""
    each = {name: value for name, value in conditions.items() if name != "encoding"}
    repeated = {name: value.repeat_interleave(copies, dim=0) for name, value in each.items()}
    if "encoding" in conditions:
        encoding = conditions["encoding"]
        repeated["encoding"] = type(encoding)(*(value.repeat_interleave(copies, dim=0) for value in encoding))
    return repeated


# The prior: an estimate of the image, from which a flow may start (posterior-mean rectified flow).


def estimate(prior: torch.nn.Module, lr: torch.Tensor, scale: int) -> torch.Tensor:
    """The prior's image for each LR, exactly `scale` times as large.

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
    image = answer if isinstance(answer, torch.Tensor) else answer[0]
    wanted = (len(lr), lr.shape[1], padded.shape[-2] * scale, padded.shape[-1] * scale)
    if tuple(image.shape) != wanted:
        raise ValueError(
            f"`prior` must answer images {scale} times as large, of shape {wanted} for an input of "
            f"{tuple(padded.shape)}, got {tuple(image.shape)}; is {type(prior).__name__} made for another scale?"
        )
    return image[..., : height * scale, : width * scale].to(lr) * 2 - 1


# The context: tokens of a vision encoder of transformers, for networks with cross-attention.


def check_encoder(
    unet: torch.nn.Module,
    image_encoder: torch.nn.Module | None,
    image_mean: list[float] | None,
    image_std: list[float] | None,
) -> None:
    """Raises a ValueError where network and encoder do not fit each other, or the encoder's normalisation is missing.

    Args:
        unet: what attends to the tokens; its `config.cross_attention_dim` is their width.
        image_encoder: a model of transformers whose `last_hidden_state` is a sequence of tokens `config.hidden_size`
            wide; or `None`.
        image_mean, image_std: see [`context_tokens`].
    """
    if image_encoder is None:
        return
    width = getattr(unet.config, "cross_attention_dim", None)
    hidden_size = getattr(image_encoder.config, "hidden_size", None)
    if not isinstance(hidden_size, int):
        raise ValueError(
            f"`image_encoder` must give a sequence of tokens of one width; {type(image_encoder).__name__} has no "
            "`hidden_size` in its config. Take a vision transformer, such as Dinov2Model or CLIPVisionModel."
        )
    if hidden_size != width:
        raise ValueError(
            f"`image_encoder` gives tokens {hidden_size} wide, but the network's `cross_attention_dim` is {width}; "
            f"build the network with `cross_attention_dim={hidden_size}`, or take the encoder of its training."
        )
    if image_mean is None or image_std is None:
        raise ValueError(
            "`image_mean` and `image_std` must say how the images of `image_encoder` are normalised; they stand in "
            "its preprocessor_config.json (ImageNet's: [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225])."
        )


def check_context(
    unet: torch.nn.Module, image_encoder: torch.nn.Module | None, prompt_embeds: torch.Tensor | None, images: int
) -> None:
    """Raises a ValueError where context tokens are missing, not expected, or not `(images, tokens, width)`."""
    width = getattr(unet.config, "cross_attention_dim", None)
    if width is not None and image_encoder is None and prompt_embeds is None:
        raise ValueError(
            f"The network attends to tokens of width {width} (its `cross_attention_dim`), but nothing makes them; "
            "give the pipeline its `image_encoder`, or the call `prompt_embeds`."
        )
    if prompt_embeds is None:
        return
    shape = tuple(prompt_embeds.shape)
    if width is None or len(shape) != 3 or (shape[0], shape[2]) != (images, width):
        wanted = "none: this network makes its own context" if width is None else f"({images}, tokens, {width})"
        raise ValueError(f"`prompt_embeds` must have shape {wanted}, got {shape}.")


@torch.no_grad()
def context_tokens(
    image_encoder: torch.nn.Module,
    lr: torch.Tensor,
    image_mean: list[float],
    image_std: list[float],
    image_size: int | None = None,
) -> torch.Tensor:
    """Last hidden state of a vision encoder, which stays as it is; training and sampling share it.

    The whole image is resized to a square (bicubic, antialiased, clamped to [0, 1]) and normalised: what the
    encoder's image processor does, without its crop, and in torch.

    Args:
        image_encoder: a vision model of transformers.
        lr (`torch.Tensor` of shape `(n, 3, h, w)`, in [-1, 1]).
        image_mean, image_std (`list[float]`): of red, green and blue in [0, 1], as the encoder was trained.
        image_size (`int`, *optional*): side of the square in pixels; by default the encoder's own.

    Returns:
        `torch.Tensor` of shape `(n, tokens, hidden_size)`, of the type of `lr`.
    """
    size = image_size or image_encoder.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    pixels = F.interpolate((lr + 1) / 2, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (image_mean, image_std))
    pixels = ((pixels - mean) / std).to(image_encoder.dtype)
    return image_encoder(pixel_values=pixels).last_hidden_state.to(lr.dtype)
