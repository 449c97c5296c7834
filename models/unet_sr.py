"""The U-Net of flowsr: image x_t, noise level and low-resolution picture in, image (or velocity) out.

One self-contained file on purpose: it imports torch and diffusers alone, so that it can travel with a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
class UNetSROutput(BaseOutput):
    """sample (`torch.Tensor` of shape `(batch, out_channels, h, w)`): the prediction, on the grid of the input."""

    sample: torch.Tensor


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel alone: normalises without mixing positions, so tiles stay exact."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # (b, c, h, w)
        return super().forward(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(kind: str, channels: int, groups: int) -> nn.Module:
    """ "none", "group" (GroupNorm: mixes the whole picture) or "layer" (each pixel by itself)."""
    if kind == "none":
        return nn.Identity()
    if kind == "layer":
        return ChannelLayerNorm(channels)
    if channels % groups:
        raise ValueError(f"`norm_num_groups` must divide every width, got {groups} groups for {channels} channels.")
    return nn.GroupNorm(groups, channels)


class SRResBlock(nn.Module):
    """norm, SiLU, conv, norm, FiLM by the time embedding, SiLU, conv; plus the input (1x1 conv where widths differ).

    Source: Perez et al. 2018 (FiLM) in the residual block of Ho et al. 2020.
    """

    def __init__(self, in_channels: int, out_channels: int, temb_channels: int, norm: str, groups: int):
        super().__init__()
        self.norm1 = make_norm(norm, in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.film = nn.Linear(temb_channels, 2 * out_channels)
        self.norm2 = make_norm(norm, out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        nn.init.zeros_(self.film.weight)  # a new block is the identity at every noise level
        nn.init.zeros_(self.film.bias)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.film(F.silu(temb))[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(hidden_states)))
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.shortcut(hidden_states) + self.conv2(F.silu(h))


class SRAttnProcessor:
    """Self-attention over a token sequence through the attention backend that diffusers has been told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: SRAttention, hidden_states: torch.Tensor) -> torch.Tensor:  # (b, tokens, c)
        if attn.fused_projections:
            projections = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            projections = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (p.unflatten(-1, (attn.heads, -1)) for p in projections)  # (b, tokens, heads, c / heads)
        out = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).to(query.dtype)))


class SRAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention with diffusers' names, so that its backends, LoRA and fused projections apply."""

    _default_processor_cls = SRAttnProcessor
    _available_processors = [SRAttnProcessor]

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(
                f"`num_attention_heads` must divide the width, got {heads} heads for {channels} channels."
            )
        self.heads, self.inner_dim, self.query_dim = heads, channels, channels
        self.use_bias, self.is_cross_attention = True, False
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels), nn.Dropout(0.0)])
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class SRAttentionBlock(nn.Module):
    """Residual global self-attention over all pixels of a feature map."""

    def __init__(self, channels: int, heads: int, norm: str, groups: int):
        super().__init__()
        self.norm = make_norm(norm, channels, groups)
        self.attn = SRAttention(channels, heads)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)  # (b, c, h, w) -> (b, h * w, c)
        return hidden_states + self.attn(tokens).transpose(1, 2).reshape(hidden_states.shape)


def run_block(owner: nn.Module, block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """`block(*args)`, with gradient checkpointing where `owner` has been told to."""
    if torch.is_grad_enabled() and owner.gradient_checkpointing:
        return owner._gradient_checkpointing_func(block, *args)
    return block(*args)


class SRStage(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the stage has it.

    A module that is called as one, so that what diffusers and accelerate hook to it (offloading, devices) takes place.
    """

    def __init__(self, widths: list[tuple[int, int]], temb_channels: int, norm: str, groups: int, heads: int | None):
        super().__init__()
        self.resnets = nn.ModuleList(SRResBlock(i, o, temb_channels, norm, groups) for i, o in widths)
        self.attentions = None
        if heads:
            self.attentions = nn.ModuleList(SRAttentionBlock(o, heads, norm, groups) for _, o in widths)
        self.gradient_checkpointing = False

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, skip: torch.Tensor | None = None
    ) -> torch.Tensor:
        h = hidden_states if skip is None else torch.cat([hidden_states, skip], dim=1)
        for index, block in enumerate(self.resnets):
            h = run_block(self, block, h, temb)
            if self.attentions is not None:
                h = run_block(self, self.attentions[index], h)
        return h


class UNetSRModel(ModelMixin, ConfigMixin, AttentionMixin, PeftAdapterMixin, CacheMixin):
    r"""Time-conditioned U-Net for super-resolution, and without `lr_channels` for plain generation.

    With `patch_size` = `scale_factor` the network works on the grid of the low-resolution picture: the state x_t is
    pixel-unshuffled (Shi et al. 2016), which leaves `scale_factor ** 2` times fewer positions than `patch_size=1`.
    With one entry in `block_out_channels` there is no down-sampling: a flat residual network with one long skip.

    With `precondition=True` the network predicts the image as a residual over the upsampled LR and over what the state
    tells of it linearly. For r = hr - lr_up of std s_r, source noise of std s and
    v = ((1 - sigma) s_r)^2 + (sigma s)^2:

        estimate = (1 - sigma) s_r^2 / v * (x_t - lr_up)
        hr = lr_up + estimate + sigma s s_r / sqrt(v) * F(estimate / s_r, sigma, lr)

    The estimate is the best linear one, and the factor of F its error, so that F is to answer with unit variance:
    Karras et al. 2022 (EDM), table 1 and appendix B.6, for x_t - lr_up = (1 - sigma) r + sigma s noise, that is for
    the source "lr" of the scheduler on its linear path. The input departs from EDM, which scales the state to unit
    variance: here noise that tells nothing does not reach the network. At sigma = 1, where the state is noise alone,
    the answer is a function of the LR.

    Args:
        in_channels, out_channels (`int`): channels of x_t and of the prediction.
        lr_channels (`int`, *optional*, default 3): channels of the low-resolution condition; `None` for generation.
        scale_factor (`int`): HR pixels per LR pixel, each way.
        patch_size (`int`): HR pixels per network position, each way.
        block_out_channels (`tuple[int]`): width of each level, finest first; each next level has half the resolution.
        layers_per_block (`int`): residual blocks on the way down and again on the way up, per level.
        mid_layers (`int`): residual blocks between the two.
        norm (`"none"`, `"group"`, `"layer"`): "none" and "layer" keep tiles exact, "group" mixes the whole picture.
        norm_num_groups (`int`): groups of `norm="group"`.
        attention_levels (`tuple[int]`): levels with global self-attention behind each residual block (0 is the
            finest).
        mid_attention (`bool`): global self-attention between the middle blocks.
        num_attention_heads (`int`): heads of every attention.
        time_embedding_dim (`int`): width of the sinusoidal embedding and of its two-layer MLP.
        time_embedding_scale (`float`): factor on the timestep before its sines and cosines.
        time_embedding_max_period (`float`): longest wave length of these, over 2 pi.
        num_class_embeds (`int`, *optional*): number of classes; index `num_class_embeds` then means "no class".
        precondition (`bool`): see above.
        lr_detail (`bool`, *optional*, defaults to `precondition`): shows the network, beside the LR, how that differs
            from its local mean, in units of `residual_std`; without norm the network learns faster with it.
        residual_std (`float`): s_r, in units of the [-1, 1] range.
        source_noise_std (`float`): s, as in the scheduler.
        bicubic_coefficient (`-0.5` or `-0.75`): the cubic of the internal upsampling: MATLAB's and Pillow's, or
            torch's.
        condition_dropout (`float`): share of training crops whose LR features were dropped; guidance needs more than
            0.

    Raises:
        ValueError: for settings that do not fit each other, naming them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["SRStage", "SRResBlock"]
    _repeated_blocks = ["SRResBlock"]
    _skip_layerwise_casting_patterns = ["time_embedding", "class_embedding", "norm", "conv_in", "conv_out"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        lr_channels: int | None = 3,
        scale_factor: int = 4,
        patch_size: int = 4,
        block_out_channels: tuple[int, ...] = (96,),
        layers_per_block: int = 4,
        mid_layers: int = 2,
        norm: Literal["none", "group", "layer"] = "none",
        norm_num_groups: int = 8,
        attention_levels: tuple[int, ...] = (),
        mid_attention: bool = False,
        num_attention_heads: int = 4,
        time_embedding_dim: int = 256,
        time_embedding_scale: float = 1.0,
        time_embedding_max_period: float = 10000.0,
        num_class_embeds: int | None = None,
        precondition: bool = True,
        lr_detail: bool | None = None,
        residual_std: float = 0.09,
        source_noise_std: float = 0.1,
        bicubic_coefficient: float = -0.5,
        condition_dropout: float = 0.0,
    ):
        super().__init__()
        if norm not in ("none", "group", "layer"):
            raise ValueError(f"`norm` must be 'none', 'group' or 'layer', got {norm!r}.")
        if precondition and (lr_channels != out_channels or in_channels != out_channels):
            raise ValueError(
                "`precondition=True` predicts a residual over the upsampled LR and needs equal channels, got "
                f"in {in_channels}, out {out_channels}, lr {lr_channels}; set `precondition=False`."
            )
        if precondition and not (residual_std > 0 and source_noise_std > 0):
            raise ValueError(
                "`precondition=True` needs positive `residual_std` and `source_noise_std`, got "
                f"{residual_std} and {source_noise_std}."
            )
        if lr_detail and not residual_std > 0:
            raise ValueError(f"`lr_detail=True` needs a positive `residual_std`, its unit, got {residual_std}.")
        if bicubic_coefficient not in (-0.5, -0.75):
            raise ValueError(f"`bicubic_coefficient` must be -0.5 or -0.75, got {bicubic_coefficient}.")
        if layers_per_block < 1 or not block_out_channels:
            raise ValueError(
                "The network needs at least one level and one block in it, got "
                f"`block_out_channels={block_out_channels}`, `layers_per_block={layers_per_block}`."
            )
        if not set(attention_levels) <= set(range(len(block_out_channels))):
            raise ValueError(
                f"`attention_levels` must lie in 0..{len(block_out_channels) - 1}, got {tuple(attention_levels)}."
            )

        # Time and class.
        self.time_embedding = TimestepEmbedding(time_embedding_dim, time_embedding_dim)
        self.class_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Embedding(num_class_embeds + 1, time_embedding_dim)

        # Down, middle, up. One skip connection per level joins the end of its way down to the start of its way up.
        cond_channels = 0
        if lr_channels is not None:
            cond_channels = lr_channels if patch_size == scale_factor else lr_channels * patch_size**2
            cond_channels *= 2 if self.sees_lr_detail else 1
        widths = list(block_out_channels)
        last = widths[-1]
        common = {"temb_channels": time_embedding_dim, "norm": norm, "groups": norm_num_groups}
        heads = dict.fromkeys(attention_levels, num_attention_heads)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2 + cond_channels, widths[0], 3, padding=1)
        self.down_stages, self.up_stages = nn.ModuleList(), nn.ModuleList()
        self.downsamplers, self.upsamplers = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            below = widths[max(level - 1, 0)]
            above = widths[min(level + 1, len(widths) - 1)]
            down = [(below, width)] + [(width, width)] * (layers_per_block - 1)
            up = [(above + width, width)] + [(width, width)] * (layers_per_block - 1)
            self.down_stages.append(SRStage(down, heads=heads.get(level), **common))
            self.up_stages.append(SRStage(up, heads=heads.get(level), **common))
            if level < len(widths) - 1:
                self.downsamplers.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                self.upsamplers.append(nn.Conv2d(above, above, 3, padding=1))
        self.mid_stage = SRStage([(last, last)] * mid_layers, heads=None, **common)
        self.mid_attn = None
        if mid_attention:
            self.mid_attn = SRAttentionBlock(last, num_attention_heads, norm, norm_num_groups)
        if mid_attention or attention_levels:  # FSDP refuses names of what is not there
            self._no_split_modules = [*self._no_split_modules, "SRAttentionBlock"]
        self.norm_out = make_norm(norm, widths[0], norm_num_groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels * patch_size**2, 3, padding=1)
        self.gradient_checkpointing = False

    @property
    def size_multiple(self) -> int:
        """Sides of x_t must be multiples of this many HR pixels."""
        return self.config.patch_size * 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def receptive_field(self) -> int | None:
        """HR pixels that a prediction can depend on beyond its own place, each way; `None` where it sees everything.

        An upper bound, to be used as the halo of exact tiles (together with tile corners on `size_multiple`).
        """
        config = self.config
        if config.norm == "group" or config.attention_levels or config.mid_attention:
            return None
        levels = len(config.block_out_channels)
        radius = 2  # conv_in, conv_out
        for level in range(levels):
            radius += 2 * 2 * config.layers_per_block * 2**level  # two 3x3 convolutions a block, down and up
        radius += 2 * config.mid_layers * 2 ** (levels - 1)
        radius += sum(2**level + 2 * 2**level for level in range(levels - 1))  # strided conv; nearest and conv
        return radius * config.patch_size + 3 * config.scale_factor  # and the upsampling or the detail of lr

    @property
    def sees_lr_detail(self) -> bool:
        """Whether the LR's detail stands beside the LR."""
        return self.config.precondition if self.config.lr_detail is None else self.config.lr_detail

    def preconditioning(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_skip and c_out, the two factors of the class docstring, of the shape of `sigma` (in [0, 1])."""
        s_r, s = self.config.residual_std, self.config.source_noise_std
        variance = ((1 - sigma) * s_r) ** 2 + (sigma * s) ** 2
        return (1 - sigma) * s_r**2 / variance, sigma * s * s_r * variance.rsqrt()

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        lr: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        drop_condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetSROutput | tuple[torch.Tensor]:
        """Predicts the image (or the velocity: as trained) from a noisy state.

        Args:
            sample (`torch.Tensor` of shape `(batch, in_channels, H, W)`, image range [-1, 1]): the state x_t.
            timestep (`float` or `torch.Tensor` of shape `()` or `(batch,)`): sigma * 1000, in [0, 1000].
            lr (`torch.Tensor` of shape `(batch, lr_channels, H / scale_factor, W / scale_factor)`, in [-1, 1]).
            class_labels (`torch.LongTensor` of shape `(batch,)`): 0..num_class_embeds, the last meaning "no class".
            drop_condition (`torch.BoolTensor` of shape `(batch,)`): where true the LR features are zeroed, for
                classifier-free guidance (Ho and Salimans 2022); the residual over the upsampled LR stays.

        Raises:
            ValueError: where sizes do not fit, or a condition is missing or not expected.
        """
        config = self.config
        self._check_forward(sample, lr, class_labels)

        # Time and class embedding.
        timestep = torch.as_tensor(timestep, device=sample.device, dtype=torch.float32).expand(sample.shape[0])
        temb = get_timestep_embedding(  # (b, time_embedding_dim): sines, then cosines
            timestep,
            config.time_embedding_dim,
            downscale_freq_shift=1,
            scale=config.time_embedding_scale,
            max_period=config.time_embedding_max_period,
        )
        dtype = self.conv_in.weight.dtype  # the convolutions' own; the picture itself stays as precise as it came
        temb = self.time_embedding(temb.to(dtype))
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(class_labels)

        # Input: the state, and the LR: as it is where the grids agree, else upsampled and unshuffled like the state.
        x, skip, lr_up = sample, None, None
        if lr is not None and (config.precondition or config.patch_size != config.scale_factor):
            antialias = config.bicubic_coefficient == -0.5  # torch's antialiased kernel is the cubic with -0.5
            lr_up = F.interpolate(lr.float(), size=sample.shape[-2:], mode="bicubic", antialias=antialias)
        if config.precondition:
            sigma = (timestep / 1000.0)[:, None, None, None]
            c_skip, c_out = self.preconditioning(sigma)
            estimate = c_skip * (sample - lr_up)
            x, skip = estimate / config.residual_std, lr_up + estimate
        h = F.pixel_unshuffle(x, config.patch_size).to(dtype)  # (b, c, H, W) -> (b, c * p * p, H / p, W / p)
        if lr is not None:
            same_grid = config.patch_size == config.scale_factor
            condition = lr if same_grid else F.pixel_unshuffle(lr_up, config.patch_size)
            if self.sees_lr_detail:  # at the scale of the residual that it is to explain
                mean = F.avg_pool2d(condition, 5, stride=1, padding=2, count_include_pad=False)
                condition = torch.cat([condition, (condition - mean) / config.residual_std], dim=1)
            if drop_condition is not None:
                condition = condition * ~drop_condition[:, None, None, None]
            h = torch.cat([h, condition.to(dtype)], dim=1)

        # Down, middle, up.
        h = self.conv_in(h.contiguous(memory_format=torch.channels_last))  # what convolutions are fastest in
        skips = []
        for level, stage in enumerate(self.down_stages):
            h = stage(h, temb)
            skips.append(h)
            if level < len(self.downsamplers):
                h = self.downsamplers[level](h)
        for index, block in enumerate(self.mid_stage.resnets):
            h = run_block(self, block, h, temb)
            if index == 0 and self.mid_attn is not None:
                h = run_block(self, self.mid_attn, h)
        for level in reversed(range(len(self.up_stages))):
            h = self.up_stages[level](h, temb, skips[level])
            if level > 0:
                h = self.upsamplers[level - 1](F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), config.patch_size)
        if config.precondition:
            h = skip + c_out * h
        h = h.to(sample.dtype)
        return UNetSROutput(sample=h) if return_dict else (h,)

    def _check_forward(self, sample: torch.Tensor, lr: torch.Tensor | None, class_labels: torch.Tensor | None):
        config, (height, width) = self.config, sample.shape[-2:]
        if sample.shape[1] != config.in_channels:
            raise ValueError(f"`sample` must have {config.in_channels} channels, got shape {tuple(sample.shape)}.")
        if height % self.size_multiple or width % self.size_multiple:
            raise ValueError(
                f"The sides of `sample` must be multiples of {self.size_multiple}, got {height}x{width}; "
                "pad it, or call the pipeline, which pads and crops."
            )
        if (lr is None) != (config.lr_channels is None):
            wanted = "needs" if lr is None else "was built without (`lr_channels=None`)"
            raise ValueError(f"This network {wanted} a low-resolution condition `lr`.")
        if lr is not None:
            wanted = (sample.shape[0], config.lr_channels, height // config.scale_factor, width // config.scale_factor)
            if tuple(lr.shape) != wanted:
                raise ValueError(
                    f"`lr` must have shape {wanted} for a sample of {height}x{width} at scale "
                    f"{config.scale_factor}, got {tuple(lr.shape)}."
                )
        if (class_labels is None) != (self.class_embedding is None):
            wanted = "needs" if class_labels is None else "was built without (`num_class_embeds=None`)"
            raise ValueError(f"This network {wanted} `class_labels`.")
