"""A U-Net that sees the LR picture by cross-attention: the network of the DDPM super-resolution project.

One self-contained file on purpose: it imports torch and diffusers alone, so that it can travel with a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn


@dataclass
class ContextUNetSROutput(BaseOutput):
    """sample (`torch.Tensor` of shape `(batch, out_channels, h, w)`): the prediction, on the grid of the input."""

    sample: torch.Tensor


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """GroupNorm with the most groups up to `groups` that divide `channels`."""
    return nn.GroupNorm(next(g for g in range(min(groups, channels), 0, -1) if channels % g == 0), channels)


class ContextResBlock(nn.Module):
    """norm, SiLU, conv, norm, SiLU, FiLM, conv; plus the input. FiLM after the activation, convs without bias."""

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.film = nn.Linear(temb_channels, 2 * out_channels)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), group_norm(out_channels, groups)
            )

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(hidden_states)))
        h = torch.addcmul(shift, F.silu(self.norm2(h)), 1 + scale)
        return self.shortcut(hidden_states) + self.conv2(h)


def run_block(owner: nn.Module, block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """`block(*args)`, with gradient checkpointing where `owner` has been told to."""
    if torch.is_grad_enabled() and owner.gradient_checkpointing:
        return owner._gradient_checkpointing_func(block, *args)
    return block(*args)


class ContextStage(nn.ModuleList):
    """Residual blocks at one resolution; called as one, so that what is hooked to it (offloading) takes place."""

    gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = hidden_states if skip is None else torch.cat([hidden_states, skip], dim=1)
        for block in self:
            h = run_block(self, block, h, temb)
        return h


class ContextAttnProcessor:
    """Attention of a token sequence to itself or to a context, through the backend that diffusers is told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: ContextAttention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projections = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query, key, value = (p.unflatten(-1, (attn.heads, -1)) for p in projections)  # (b, tokens, heads, c / heads)
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).to(query.dtype)))


class ContextAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with diffusers' names."""

    _default_processor_cls = ContextAttnProcessor
    _available_processors = [ContextAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(self, channels: int, heads: int, context_dim: int | None = None):
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"`num_attention_heads` must divide the deepest width, got {heads} heads for {channels} channels."
            )
        self.heads, self.inner_dim, self.query_dim = heads, channels, channels
        self.use_bias, self.is_cross_attention = True, context_dim is not None
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(context_dim or channels, channels)
        self.to_v = nn.Linear(context_dim or channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        return self.processor(self, hidden_states, encoder_hidden_states)


class ContextTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the context, feed-forward; each behind a layer norm, each added."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(channels), ContextAttention(channels, heads)
        self.norm2, self.attn2 = nn.LayerNorm(channels), ContextAttention(channels, heads, context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (b, c, h, w) -> (b, h * w, c)
        tokens = tokens + self.attn1(self.norm1(tokens))
        tokens = tokens + self.attn2(self.norm2(tokens), context)
        tokens = tokens + self.ff(self.norm3(tokens))
        return tokens.transpose(1, 2).reshape(hidden_states.shape)


class LRContextExtractor(nn.Module):
    """The LR picture as a sequence of tokens, one a pixel: `(b, c, h, w)` -> `(b, h * w, context_dim)`."""

    def __init__(self, lr_channels: int, channels: int, context_dim: int, groups: int):
        super().__init__()
        self.conv1 = nn.Conv2d(lr_channels, channels, 3, padding=1, bias=False)
        self.norm1 = group_norm(channels, groups)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(channels, groups)
        self.projection = nn.Conv2d(channels, context_dim, 1)

    def forward(self, lr: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.norm1(self.conv1(lr)))
        h = F.silu(self.norm2(self.conv2(h)))
        return self.projection(h).flatten(2).transpose(1, 2)


class ContextUNetSRModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    """Time-conditioned U-Net on the HR grid; transformer blocks at its deepest level attend to the LR picture.

    Args:
        in_channels, out_channels, lr_channels (`int`): of x_t, of the prediction and of the LR.
        scale_factor (`int`): HR pixels per LR pixel, each way.
        block_out_channels (`tuple[int]`): width of each level, finest first; each next level has half the resolution.
        layers_per_block (`int`): residual blocks on the way down and again on the way up, per level.
        norm_num_groups (`int`): most groups of a GroupNorm.
        num_attention_heads (`int`): of every attention.
        time_embedding_dim (`int`): sines and cosines of the timestep; the MLP behind them is 4 times as wide.
        context_channels (`int`): width of the convolutions that read the LR.
        context_dim (`int`, *optional*): width of the context tokens that they end in; by default that of the deepest
            level.
        cross_attention_dim (`int`, *optional*): width of the context tokens that the caller gives, those of a vision
            encoder for instance; by default the network makes its own by convolutions on the LR.
        concatenate_lr (`bool`): also put the LR, upsampled by bicubic interpolation, beside the state: for contexts
            that tell what a picture shows, but not its pixels.
        condition_dropout (`float`): share of training crops whose context was zeroed; guidance needs more than 0.

    Raises:
        ValueError: for settings that do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ContextStage", "ContextResBlock", "ContextTransformerBlock"]
    _repeated_blocks = ["ContextResBlock", "ContextTransformerBlock"]
    _skip_layerwise_casting_patterns = ["time_embedding", "norm", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        lr_channels: int = 3,
        scale_factor: int = 4,
        block_out_channels: tuple[int, ...] = (32, 64, 128),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        num_attention_heads: int = 4,
        time_embedding_dim: int = 32,
        context_channels: int = 128,
        cross_attention_dim: int | None = None,
        concatenate_lr: bool = False,
        condition_dropout: float = 0.0,
        context_dim: int | None = None,
    ):
        super().__init__()
        if cross_attention_dim is not None and context_dim is not None:
            raise ValueError(
                f"`context_dim={context_dim}` is the width of tokens that the network makes, and with "
                f"`cross_attention_dim={cross_attention_dim}` the caller gives them; leave one out."
            )
        if layers_per_block < 1 or not block_out_channels:
            raise ValueError(
                "The network needs at least one level and one block in it, got "
                f"`block_out_channels={block_out_channels}`, `layers_per_block={layers_per_block}`."
            )
        widths, last = list(block_out_channels), block_out_channels[-1]
        temb_dim = 4 * time_embedding_dim

        def stage(first: int, width: int) -> ContextStage:
            ins = [first] + [width] * (layers_per_block - 1)
            return ContextStage(ContextResBlock(i, width, temb_dim, norm_num_groups) for i in ins)

        self.time_embedding = TimestepEmbedding(time_embedding_dim, temb_dim)
        self.context_extractor, tokens_dim = None, cross_attention_dim
        if cross_attention_dim is None:
            tokens_dim = context_dim or last
            self.context_extractor = LRContextExtractor(lr_channels, context_channels, tokens_dim, norm_num_groups)
        self.conv_in = nn.Conv2d(in_channels + lr_channels * concatenate_lr, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(stage(widths[max(level - 1, 0)], w) for level, w in enumerate(widths))
        self.up_blocks = nn.ModuleList(stage(2 * w, w) for w in widths)
        self.downsamplers = nn.ModuleList(nn.Conv2d(w, w, 4, stride=2, padding=1) for w in widths[:-1])
        self.upsamplers = nn.ModuleList(nn.Conv2d(b, a, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.mid_blocks = nn.ModuleList(ContextResBlock(last, last, temb_dim, norm_num_groups) for _ in range(2))
        # On the way down, in the middle, on the way up.
        self.transformer_blocks = nn.ModuleList(
            ContextTransformerBlock(last, num_attention_heads, tokens_dim) for _ in range(3)
        )
        self.norm_out = group_norm(widths[0], norm_num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 1)
        self.gradient_checkpointing = False

    @property
    def size_multiple(self) -> int:
        """Sides of x_t must be multiples of this many HR pixels."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def receptive_field(self) -> None:
        """`None`: norm and attention see the whole picture, so tiles are blended, not exact."""
        return None

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        lr: torch.Tensor,
        drop_condition: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> ContextUNetSROutput | tuple[torch.Tensor]:
        """The network's prediction (epsilon, v or sample: as trained) at a noisy state.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, H, W)`): the state x_t.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch,)`): in [0, 1000).
            lr (`torch.Tensor` of shape `(batch, lr_channels, H / scale_factor, W / scale_factor)`, in [-1, 1]).
            drop_condition (`torch.BoolTensor` of shape `(batch,)`): where true the context is zeroed, and so is the LR
                beside the state.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, tokens, cross_attention_dim)`): the context, for a
                network that does not make its own.

        Raises:
            ValueError: where sizes do not fit, or the context is missing or not expected.
        """
        config, (height, width) = self.config, sample.shape[-2:]
        if sample.shape[1] != config.in_channels or height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"`sample` must have {config.in_channels} channels and sides that are multiples of "
                f"{self.size_multiple}, got shape {tuple(sample.shape)}."
            )
        wanted = (sample.shape[0], config.lr_channels, height // config.scale_factor, width // config.scale_factor)
        if tuple(lr.shape) != wanted:
            raise ValueError(f"`lr` must have shape {wanted} for this sample, got {tuple(lr.shape)}.")
        given, width = None if encoder_hidden_states is None else tuple(encoder_hidden_states.shape), None
        if config.cross_attention_dim is not None:
            width = (sample.shape[0], "tokens", config.cross_attention_dim)
        if (given is None) != (width is None) or (given is not None and (given[0], given[-1]) != (width[0], width[2])):
            raise ValueError(f"`encoder_hidden_states` must have shape {width} for this network, got {given}.")

        # Time and context.
        dtype = self.conv_in.weight.dtype
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(sample.shape[0])
        temb = get_timestep_embedding(timestep, config.time_embedding_dim, downscale_freq_shift=0)
        temb = self.time_embedding(temb.to(dtype))
        context = encoder_hidden_states
        if context is None:
            context = self.context_extractor(lr.to(dtype))  # (b, h * w, context_dim)
        context, state = context.to(dtype), sample.to(dtype)
        if drop_condition is not None:
            context = context * ~drop_condition[:, None, None]
        if config.concatenate_lr:
            lr_up = F.interpolate(lr.float(), size=sample.shape[-2:], mode="bicubic", antialias=True).to(dtype)
            if drop_condition is not None:
                lr_up = lr_up * ~drop_condition[:, None, None, None]
            state = torch.cat([state, lr_up], dim=1)

        # Down, middle, up.
        levels, (down, middle, up) = len(self.down_blocks), self.transformer_blocks
        h, skips = self.conv_in(state), []
        for level in range(levels):
            h = self.down_blocks[level](h, temb)
            if level == levels - 1:
                h = run_block(self, down, h, context)
            skips.append(h)
            if level < levels - 1:
                h = self.downsamplers[level](h)
        h = run_block(self, self.mid_blocks[0], h, temb)
        h = run_block(self, middle, h, context)
        h = run_block(self, self.mid_blocks[1], h, temb)
        for level in reversed(range(levels)):
            h = self.up_blocks[level](h, temb, skips[level])
            if level == levels - 1:
                h = run_block(self, up, h, context)
            if level > 0:
                h = self.upsamplers[level - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.conv_out(F.silu(self.norm_out(h))).to(sample.dtype)
        return ContextUNetSROutput(sample=h) if return_dict else (h,)
