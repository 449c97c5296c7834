"""A network that encodes the low-resolution picture once and then takes light steps along the flow.

    encoder   lr -> features, posterior mean               once per picture; alone it is the most faithful answer
    head      x_t, sigma, features, mean -> image          once per step

One self-contained file on purpose: it imports torch and diffusers alone, so that it can travel with a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn


class SREncoding(NamedTuple):
    """What a picture is encoded to.

    features (`torch.Tensor` of shape `(batch, encoder_channels, h, w)`): on the grid of the LR.
    mean (`torch.Tensor` of shape `(batch, c, H, W)`, float32, near [-1, 1]): the posterior mean E[hr | lr].
    """

    features: torch.Tensor
    mean: torch.Tensor


@dataclass
class EncodedSROutput(BaseOutput):
    """sample (`torch.Tensor` of shape `(batch, c, H, W)`): the image estimate."""

    sample: torch.Tensor


class SRBlock(nn.Module):
    """conv, leaky ReLU, conv; plus the input. Without norm (Lim et al. 2017, EDSR), and the identity at first.

    With a plain ReLU, long trainings by Muon at high rates leave whole blocks whose units never answer.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (b, c, h, w)
        return hidden_states + self.conv2(F.leaky_relu(self.conv1(hidden_states), 0.1))


class SRFiLMBlock(nn.Module):
    """[`SRBlock`] with scale and shift by the time embedding (FiLM, Perez et al. 2018) before its SiLU."""

    def __init__(self, channels: int, time_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Linear(time_channels, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        for module in (self.film, self.conv2):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.conv1(hidden_states), 1 + scale)
        return hidden_states + self.conv2(F.silu(h))


def run_block(owner: nn.Module, block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """`block(*args)`, with gradient checkpointing where `owner` has been told to."""
    if torch.is_grad_enabled() and owner.gradient_checkpointing:
        return owner._gradient_checkpointing_func(block, *args)
    return block(*args)


class SREncoder(nn.Module):
    """LR and its detail -> features, and the residual over the upsampled LR in units of `residual_std`."""

    def __init__(self, in_channels: int, channels: int, blocks: int, scale_factor: int, residual_std: float):
        super().__init__()
        self.scale_factor, self.residual_std = scale_factor, residual_std
        self.conv_in = nn.Conv2d(2 * in_channels, channels, 3, padding=1)
        self.blocks = nn.ModuleList(SRBlock(channels) for _ in range(blocks))
        self.conv_mid = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, in_channels * scale_factor**2, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, lr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lr = lr.float()
        local_mean = F.avg_pool2d(lr, 5, stride=1, padding=2, count_include_pad=False)
        detail = (lr - local_mean) / (2 * self.residual_std)  # what is to be sharpened, at about unit variance
        h = torch.cat([lr, detail], dim=1).to(self.conv_in.weight.dtype)
        h = first = self.conv_in(h.contiguous(memory_format=torch.channels_last))  # what convolutions are fastest in
        for block in self.blocks:
            h = run_block(self, block, h)
        features = first + self.conv_mid(h)
        residual = F.pixel_shuffle(
            self.conv_out(features).float(), self.scale_factor
        )  # (b, c s s, h, w) -> (b, c, H, W)
        lr_up = F.interpolate(lr, scale_factor=float(self.scale_factor), mode="bicubic", antialias=True)
        return features, lr_up + self.residual_std * residual


class SRFlowHead(nn.Module):
    """State and features -> correction of the linear estimate, at about unit variance."""

    def __init__(
        self, in_channels: int, channels: int, blocks: int, features: int, scale_factor: int, time_channels: int
    ):
        super().__init__()
        self.scale_factor = scale_factor
        self.conv_in = nn.Conv2d(2 * in_channels * scale_factor**2 + features, channels, 3, padding=1)
        self.blocks = nn.ModuleList(SRFiLMBlock(channels, time_channels) for _ in range(blocks))
        self.conv_out = nn.Conv2d(channels, in_channels * scale_factor**2, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.gradient_checkpointing = False

    def forward(self, state: torch.Tensor, features: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        state = F.pixel_unshuffle(state, self.scale_factor).to(features.dtype)  # (b, 2 c, H, W) -> (b, 2 c s s, h, w)
        h = torch.cat([state, features], dim=1).to(self.conv_in.weight.dtype)
        h = first = self.conv_in(h.contiguous(memory_format=torch.channels_last))
        for block in self.blocks:
            h = run_block(self, block, h, temb)
        return F.pixel_shuffle(self.conv_out(first + h).float(), self.scale_factor)


class EncodedSRModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    r"""Encoder of the low-resolution picture, and a time-conditioned head for the flow that starts at its estimate.

    The encoder gives the posterior mean, which is the most faithful answer and the start of the flow: x_t runs from
    mean + noise at sigma = 1 to the image at sigma = 0 (posterior-mean rectified flow, Ohayon et al. 2024, with the
    prior inside the network). The head answers with the image. For the error e = hr - mean of std s_e, source noise of
    std s and v = ((1 - sigma) s_e)^2 + (sigma s)^2:

        estimate = (1 - sigma) s_e^2 / v * (x_t - mean)
        image = mean + estimate + sigma s s_e / sqrt(v) * F(estimate / s_e, (x_t - mean) / sqrt(v), sigma, features)

    The estimate is the best linear one of e, and the factor of F its error, so that F is to answer with unit variance:
    Karras et al. 2022 (EDM), table 1 and appendix B.6, for x_t - mean = (1 - sigma) e + sigma s noise. At sigma = 1
    the image is the mean, whatever the state: a sampler that knows this has its first step for free.

    It goes with [`FlowMatchSREulerScheduler`] of `source="prior"`, `path="linear"`, `prediction_type="sample"` and the
    same `source_noise_std`. All of it is convolutions without norm on the grid of the LR, so tiles are exact.

    Args:
        in_channels, out_channels, lr_channels (`int`): channels of x_t, answer and LR, all the same: 3 for RGB, 1 for
            grey.
        scale_factor (`int`): HR pixels per LR pixel, each way.
        encoder_channels, encoder_blocks (`int`): width and residual blocks of the encoder.
        head_channels, head_blocks (`int`): width and residual blocks of the head.
        time_embedding_dim (`int`): width of the sinusoidal embedding of sigma and of its two-layer MLP.
        residual_std (`float`): std of hr - lr_up, in units of the [-1, 1] range.
        mean_error_std (`float`): s_e, std of hr - mean.
        source_noise_std (`float`): s, as in the scheduler.

    Raises:
        ValueError: for a setting that cannot be, naming it.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SRBlock", "SRFiLMBlock"]
    _repeated_blocks = ["SRBlock", "SRFiLMBlock"]
    _skip_layerwise_casting_patterns = ["time_embedding", "conv_in", "conv_out"]
    _group_offload_block_modules = ["encoder", "head"]  # each is called by itself: `encode` does not pass `forward`
    trainable_parts = ("encoder", "head")  # one after the other: the flow starts where the encoder ends

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        lr_channels: int = 3,
        scale_factor: int = 4,
        encoder_channels: int = 64,
        encoder_blocks: int = 8,
        head_channels: int = 64,
        head_blocks: int = 4,
        time_embedding_dim: int = 64,
        residual_std: float = 0.09,
        mean_error_std: float = 0.075,
        source_noise_std: float = 0.1,
    ):
        super().__init__()
        if not in_channels == out_channels == lr_channels:
            raise ValueError(
                "State, answer and LR must have equal channels, got `in_channels` "
                f"{in_channels}, `out_channels` {out_channels}, `lr_channels` {lr_channels}."
            )
        sizes = {
            "in_channels": in_channels,
            "scale_factor": scale_factor,
            "encoder_channels": encoder_channels,
            "encoder_blocks": encoder_blocks,
            "head_channels": head_channels,
            "head_blocks": head_blocks,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number from 1, got {value!r}.")
        stds = {"residual_std": residual_std, "mean_error_std": mean_error_std, "source_noise_std": source_noise_std}
        for name, value in stds.items():
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value!r}.")
        self.encoder = SREncoder(in_channels, encoder_channels, encoder_blocks, scale_factor, residual_std)
        self.time_embedding = TimestepEmbedding(time_embedding_dim, time_embedding_dim)
        self.head = SRFlowHead(
            in_channels, head_channels, head_blocks, encoder_channels, scale_factor, time_embedding_dim
        )
        self.gradient_checkpointing = False

    @property
    def size_multiple(self) -> int:
        """Sides of x_t must be multiples of this many HR pixels."""
        return self.config.scale_factor

    @property
    def encoder_receptive_field(self) -> int:
        """HR pixels that features and mean can depend on beyond their own place, each way."""
        # Detail (2), conv_in, two convolutions a block, conv_mid, conv_out; the upsampling reaches 2 LR pixels.
        return (2 + 1 + 2 * self.config.encoder_blocks + 1 + 1) * self.config.scale_factor

    @property
    def head_receptive_field(self) -> int:
        """HR pixels of state, features and mean that an answer of the head can depend on, each way."""
        return (1 + 2 * self.config.head_blocks + 1) * self.config.scale_factor

    @property
    def receptive_field(self) -> int:
        """HR pixels that one answer can depend on beyond its own place, each way: encoder and head."""
        return self.encoder_receptive_field + self.head_receptive_field

    @apply_forward_hook
    def encode(self, lr: torch.Tensor) -> SREncoding:
        """Encodes the low-resolution picture.

        Args:
            lr (`torch.Tensor` of shape `(batch, c, h, w)`, in [-1, 1]).
        """
        if lr.ndim != 4 or lr.shape[1] != self.config.lr_channels:
            raise ValueError(f"`lr` must have shape (batch, {self.config.lr_channels}, h, w), got {tuple(lr.shape)}.")
        features, mean = self.encoder(lr)
        return SREncoding(features=features, mean=mean)

    def forward(
        self,
        sample: torch.Tensor | None,
        timestep: torch.Tensor | float | None,
        lr: torch.Tensor,
        encoding: SREncoding | None = None,
        return_dict: bool = True,
    ) -> EncodedSROutput | tuple[torch.Tensor]:
        """Predicts the image from a state of the flow.

        Args:
            sample (`torch.Tensor` of shape `(batch, c, H, W)`, image range [-1, 1]): the state x_t; `None` for the
                posterior mean, by the encoder alone.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch,)`): sigma * 1000, in [0, 1000].
            lr (`torch.Tensor` of shape `(batch, c, H / scale_factor, W / scale_factor)`, in [-1, 1]).
            encoding ([`SREncoding`], *optional*): of `lr`, where it is known already; else it is made here.

        Raises:
            ValueError: where sizes do not fit.
        """
        if encoding is None:
            encoding = self.encode(lr)
        mean = encoding.mean
        if sample is None:
            return EncodedSROutput(sample=mean) if return_dict else (mean,)
        if sample.shape != mean.shape:
            raise ValueError(
                f"`sample` must have shape {tuple(mean.shape)} for an `lr` of {tuple(lr.shape)} at scale "
                f"{self.config.scale_factor}, got {tuple(sample.shape)}."
            )
        config = self.config
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(sample.shape[0])
        temb = get_timestep_embedding(timestep, config.time_embedding_dim, downscale_freq_shift=1)
        temb = self.time_embedding(temb.to(encoding.features.dtype))
        sigma = (timestep / 1000.0)[:, None, None, None]
        s_e, s = config.mean_error_std, config.source_noise_std
        variance = ((1 - sigma) * s_e) ** 2 + (sigma * s) ** 2  # of the deviation
        deviation = sample.float() - mean
        estimate = (1 - sigma) * s_e**2 / variance * deviation
        state = torch.cat([estimate / s_e, deviation * variance.rsqrt()], dim=1)
        correction = sigma * s * s_e * variance.rsqrt() * self.head(state, encoding.features, temb)
        image = torch.where(sigma < 1, mean + estimate + correction, mean).to(sample.dtype)
        return EncodedSROutput(sample=image) if return_dict else (image,)
