"""Pictures as the tokens of a vision encoder of transformers: a context for networks with cross-attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
            "`image_mean` and `image_std` must say how the pictures of `image_encoder` are normalised; they stand in "
            "its preprocessor_config.json (ImageNet's: [0.485, 0.456, 0.406] and [0.229, 0.224, 0.225])."
        )


def check_context(
    unet: torch.nn.Module, image_encoder: torch.nn.Module | None, prompt_embeds: torch.Tensor | None, pictures: int
) -> None:
    """Raises a ValueError where context tokens are missing, not expected, or not `(pictures, tokens, width)`."""
    width = getattr(unet.config, "cross_attention_dim", None)
    if width is not None and image_encoder is None and prompt_embeds is None:
        raise ValueError(
            f"The network attends to tokens of width {width} (its `cross_attention_dim`), but nothing makes them; "
            "give the pipeline its `image_encoder`, or the call `prompt_embeds`."
        )
    if prompt_embeds is None:
        return
    shape = tuple(prompt_embeds.shape)
    if width is None or len(shape) != 3 or (shape[0], shape[2]) != (pictures, width):
        wanted = "none: this network makes its own context" if width is None else f"({pictures}, tokens, {width})"
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

    The whole picture is resized to a square (bicubic, antialiased, clamped to [0, 1]) and normalised: what the
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
