"""The weights of a network that are trained."""

from __future__ import annotations

from torch import nn


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]


def train_part(network: nn.Module, part: str) -> None:
    """Freezes all of a network but its "encoder", or its "head" with the time embedding; nothing for "all"."""
    if part != "all":
        network.requires_grad_(False)
        getattr(network, part).requires_grad_(True)
        network.time_embedding.requires_grad_(part == "head")


def add_adapters(network: nn.Module, rank: int) -> None:
    """Freezes a network and adds low-rank adapters (Hu et al. 2022) to its convolutions and attention."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("`lora_rank` needs PEFT: pip install peft") from error
    kinds = (nn.Conv2d, nn.Linear)
    names = [name for name, module in network.named_modules() if isinstance(module, kinds) and "embedding" not in name]
    network.requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
