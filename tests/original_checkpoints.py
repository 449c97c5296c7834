"""Checkpoints as the earlier projects wrote them."""

from pathlib import Path

import torch

from flowsr import ContextUNetSRModel
from flowsr.originals import diffusion_name


def write_original(folder: Path, widths: tuple[int, ...], blocks: int, context_dim: int | None = None):
    """Writes x_best.pth: the names of the DDPM project, given to the weights of a random network, which it returns."""
    unet = ContextUNetSRModel(
        block_out_channels=widths,
        layers_per_block=blocks,
        time_embedding_dim=16,
        context_channels=24,
        context_dim=context_dim,
    )
    ours, levels, original = unet.state_dict(), len(widths), {}
    for key in ddpm_keys(levels, blocks, widths, context_dim):
        name = diffusion_name(key, levels, blocks)
        if ".in_proj_" in name:
            attention, _, kind = name.partition(".in_proj_")
            original[key] = torch.cat([ours.pop(f"{attention}.to_{letter}.{kind}") for letter in "qkv"])
        else:
            original[key] = ours.pop(name)
    assert not ours
    torch.save(original, folder / "x_best.pth")
    return unet


def ddpm_keys(levels: int, blocks: int, widths: tuple[int, ...], context_dim: int | None) -> list[str]:
    """The keys of the original network, as the fixture shows them."""
    weight_and_bias = lambda *names: [f"{n}.{kind}" for n in names for kind in ("weight", "bias")]  # noqa: E731

    def block(name, i, o):
        keys = [f"{name}.conv1.weight", f"{name}.conv2.weight"]
        keys += weight_and_bias(f"{name}.time_mlp.1", f"{name}.norm1", f"{name}.norm2")
        if i != o:
            shortcut = f"{name}.residual_connection"
            keys += [f"{shortcut}.0.weight", *weight_and_bias(f"{shortcut}.1")]
        return keys

    def transformer(name):
        keys = weight_and_bias(*(f"{name}.norm_{n}" for n in ("self_attn", "cross_attn", "ff")))
        for attention in ("self_attn", "cross_attn"):
            joint = context_dim is None or attention == "self_attn"
            weights = ["in_proj_weight"] if joint else [f"{letter}_proj_weight" for letter in "qkv"]
            keys += [f"{name}.{attention}.{kind}" for kind in (*weights, "in_proj_bias")]
            keys += weight_and_bias(f"{name}.{attention}.out_proj")
        return keys + weight_and_bias(f"{name}.ff.0", f"{name}.ff.2")

    keys = weight_and_bias("time_mlp.0", "time_mlp.2", "init_conv", "final_norm", "final_conv")
    keys += ["context_extractor.conv_block1.0.weight", "context_extractor.conv_block2.0.weight"]
    keys += weight_and_bias(*(f"context_extractor.{n}" for n in ("conv_block1.1", "conv_block2.1", "projection")))
    for level, width in enumerate(widths):
        for n in range(blocks):
            keys += block(f"downs.{level}.{n}", widths[max(level - 1, 0)] if n == 0 else width, width)
            keys += block(f"ups.{levels - 1 - level}.{n}", 2 * width if n == 0 else width, width)
        if level < levels - 1:
            keys += weight_and_bias(f"downs.{level}.{blocks}")
        if level > 0:  # behind the transformer of the deepest level, and behind an upsampling without weights
            place = blocks + (level == levels - 1)
            keys += weight_and_bias(f"ups.{levels - 1 - level}.{place}.1")
    keys += transformer(f"downs.{levels - 1}.{blocks}") + transformer(f"ups.0.{blocks}") + transformer("bottleneck.1")
    return keys + block("bottleneck.0", widths[-1], widths[-1]) + block("bottleneck.2", widths[-1], widths[-1])
