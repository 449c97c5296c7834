"""The two original super-resolution projects: their networks, and the names that their weights have here.

Each gives a pipeline of the sizes that the shapes of the weights tell, and the renamed weights.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from flowsr import (
    ContextUNetSRModel,
    DDPMSRPipeline,
    FlowMatchSREulerScheduler,
    FlowMatchSRPipeline,
    UNetSRModel,
)

# The flow-matching project: pictures in [0, 1], t from 0 (noise) to 1 (picture), velocity = picture - noise, the state
# concatenated with torch's bicubic of the LR, each Euler step evaluated at its middle.


FLOW_MATCHING = {"in_conv.weight", "mid_attn.qkv.weight", "time_mlp.net.0.weight"}  # the weights that tell it


def flow_matching(state: dict[str, torch.Tensor], scale: int) -> tuple[FlowMatchSRPipeline, dict[str, torch.Tensor]]:
    levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("down_blocks.")) // 2
    blocks = 1 + max(int(key.split(".")[2]) for key in state if re.match(r"down_blocks\.0\.\d+\.", key))
    widths = tuple(state[f"down_blocks.{2 * level}.0.conv1.weight"].shape[0] for level in range(levels))
    time_dim = state["time_mlp.net.0.weight"].shape[1]
    unet = UNetSRModel(
        scale_factor=scale,
        patch_size=1,
        block_out_channels=widths,
        layers_per_block=blocks,
        mid_layers=2,
        norm="group",
        norm_num_groups=8,
        mid_attention=True,
        num_attention_heads=4,
        time_embedding_dim=time_dim,
        time_embedding_scale=1 / 1000,
        time_embedding_max_period=math.exp(4),
        precondition=False,
        bicubic_coefficient=-0.75,
    )
    renamed = {}
    for key, value in state.items():
        name = flow_matching_name(key, levels)
        if name.endswith("qkv"):
            for letter, part in zip("qkv", value.flatten(1).chunk(3) if value.ndim > 1 else value.chunk(3)):
                renamed[f"{name.removesuffix('qkv')}to_{letter}.{key.rsplit('.')[-1]}"] = part
        else:
            renamed[name] = value.flatten(1) if "to_out" in name and value.ndim > 1 else value
    first = "time_embedding.linear_1.weight"
    renamed[first] = reverse_time(renamed[first])
    for name in ("conv_out.weight", "conv_out.bias"):  # d x / d sigma = - d x / d t
        renamed[name] = -renamed[name]
    scheduler = FlowMatchSREulerScheduler(
        source="noise", source_noise_std=1.0, prediction_type="velocity", evaluate_at="middle"
    )
    return FlowMatchSRPipeline(unet.eval(), scheduler, data_range=[0.0, 1.0]), renamed


def flow_matching_name(key: str, levels: int) -> str:
    """The name of a weight here; `...qkv` for the joint projection, which is split."""
    swaps = {
        r"^time_mlp\.net\.0": "time_embedding.linear_1",
        r"^time_mlp\.net\.2": "time_embedding.linear_2",
        r"^in_conv": "conv_in",
        r"^out_conv": "conv_out",
        r"^out_norm": "norm_out",
        r"^mid1": "mid_stage.resnets.0",
        r"^mid2": "mid_stage.resnets.1",
        r"^mid_attn\.proj": "mid_attn.attn.to_out.0",
        r"^mid_attn\.qkv\.\w+": "mid_attn.attn.qkv",
        r"time_to_film\.1": "film",
    }
    for pattern, name in swaps.items():
        key = re.sub(pattern, name, key)
    if found := re.match(r"down_blocks\.(\d+)\.(.*)", key):  # blocks, strided convolution, blocks, ...
        level, rest = int(found[1]) // 2, found[2]
        return f"downsamplers.{level}.{rest}" if int(found[1]) % 2 else f"down_stages.{level}.resnets.{rest}"
    if found := re.match(r"up_blocks\.(\d+)\.(.*)", key):  # deepest first: blocks, nearest, convolution, ...
        level, rest = levels - 1 - int(found[1]) // 3, found[2]
        return f"upsamplers.{level - 1}.{rest}" if int(found[1]) % 3 else f"up_stages.{level}.resnets.{rest}"
    return key


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """The layer behind sin(f t), cos(f t) with t = 1 - sigma, as one behind sin(f sigma), cos(f sigma).

    By the addition theorems; `weight` has shape `(out, 2 * half)`, and f falls from 1 to exp(-4) in `half` steps.
    """
    half = weight.shape[1] // 2
    f = torch.exp(-4 * torch.arange(half, dtype=torch.float64) / (half - 1))
    of_sin, of_cos = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * f.sin() - of_sin * f.cos(), of_sin * f.sin() + of_cos * f.cos()], dim=1).to(weight)


# The DDPM project: the residual over the upsampled LR (the cubic of torch and OpenCV) in [-1, 1], cosine betas, DDIM.


DIFFUSION = {"init_conv.weight", "context_extractor.projection.weight", "final_conv.weight"}


def prediction_in_name(path: str | Path) -> str:
    """What the network predicts, which the project writes into the file name; without it, the project's default."""
    name = Path(path).name
    return "epsilon" if "noise" in name and "v_prediction" not in name else "v_prediction"


def diffusion(
    state: dict[str, torch.Tensor], scale: int, prediction_type: str
) -> tuple[DDPMSRPipeline, dict[str, torch.Tensor]]:
    levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("downs."))
    blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"downs\.0\.(\d+)\.conv1", key)))
    widths = tuple(state[f"downs.{level}.0.conv1.weight"].shape[0] for level in range(levels))
    context_dim = state["context_extractor.projection.weight"].shape[0]
    unet = ContextUNetSRModel(
        scale_factor=scale,
        block_out_channels=widths,
        layers_per_block=blocks,
        time_embedding_dim=state["time_mlp.0.weight"].shape[1],
        context_channels=state["context_extractor.projection.weight"].shape[1],
        context_dim=None if context_dim == widths[-1] else context_dim,
    )
    renamed = {}
    for key, value in state.items():
        name = diffusion_name(key, levels, blocks)
        if ".in_proj_" in name:
            attention, _, kind = name.partition(".in_proj_")
            for letter, part in zip("qkv", value.chunk(3)):
                renamed[f"{attention}.to_{letter}.{kind}"] = part
        else:
            renamed[name] = value
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return DDPMSRPipeline(unet.eval(), scheduler, target="residual", bicubic_coefficient=-0.75), renamed


def diffusion_name(key: str, levels: int, blocks: int) -> str:
    """The name of a weight here; `...in_proj_weight` for a joint projection, which is split."""
    swaps = {
        r"^time_mlp\.0": "time_embedding.linear_1",
        r"^time_mlp\.2": "time_embedding.linear_2",
        r"time_mlp\.1": "film",
        r"^init_conv": "conv_in",
        r"^final_conv": "conv_out",
        r"^final_norm": "norm_out",
        r"conv_block(\d)\.0": r"conv\1",
        r"conv_block(\d)\.1": r"norm\1",
        r"residual_connection": "shortcut",
        r"norm_self_attn": "norm1",
        r"norm_cross_attn": "norm2",
        r"norm_ff": "norm3",
        r"self_attn\.out_proj": "attn1.to_out.0",
        r"cross_attn\.out_proj": "attn2.to_out.0",
        r"self_attn\.": "attn1.",
        r"cross_attn\.": "attn2.",
        r"\.([qkv])_proj_weight": r".to_\1.weight",  # instead of a joint one, where the context has another width
        r"^bottleneck\.0": "mid_blocks.0",
        r"^bottleneck\.1": "transformer_blocks.1",
        r"^bottleneck\.2": "mid_blocks.1",
    }
    for pattern, name in swaps.items():
        key = re.sub(pattern, name, key)
    if found := re.match(r"(downs|ups)\.(\d+)\.(\d+)\.(.*)", key):
        way, level, place, rest = found[1], int(found[2]), int(found[3]), found[4]
        level = level if way == "downs" else levels - 1 - level
        if place < blocks:
            return f"{'down' if way == 'downs' else 'up'}_blocks.{level}.{place}.{rest}"
        if level == levels - 1 and place == blocks:
            return f"transformer_blocks.{0 if way == 'downs' else 2}.{rest}"
        if way == "downs":
            return f"downsamplers.{level}.{rest}"
        return f"upsamplers.{level - 1}.{rest.removeprefix('1.')}"  # behind an upsampling without weights
    return key
