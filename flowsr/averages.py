"""Moving averages of weights that may be spread over processes."""

from __future__ import annotations

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Averages(EMAModel):
    """[`~diffusers.training_utils.EMAModel`] in float32, also of weights that FSDP 2 has sharded.

    Each process averages its own shards; what is saved or shown is whole, so that a checkpoint can be read anywhere.
    Make it of the prepared network, as that is what is sharded.
    """

    def __init__(self, network: nn.Module, decay: float):
        super().__init__(trainable(network), decay=decay)
        self.shadow_params = [average.float() for average in self.shadow_params]

    def copy_to(self, parameters: list[nn.Parameter]) -> None:
        """Gives whole averages to the trainable weights of a whole network; all processes must call together."""
        for parameter, average in zip(parameters, self.gathered(), strict=True):
            parameter.data.copy_(average)

    def gathered(self) -> list[torch.Tensor]:
        """The whole averages, in the order of the trainable weights; all processes must call together."""
        return [average.full_tensor() if isinstance(average, DTensor) else average for average in self.shadow_params]

    def state_dict(self) -> dict:
        return {**super().state_dict(), "shadow_params": self.gathered()}

    def load_state_dict(self, state: dict) -> None:
        mine = self.shadow_params
        super().load_state_dict(state)
        self.shadow_params = [like(mine, whole) for mine, whole in zip(mine, self.shadow_params, strict=True)]


def like(mine: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed and spread over processes as another is."""
    whole = whole.to(mine.device)
    return distribute_tensor(whole, mine.device_mesh, mine.placements) if isinstance(mine, DTensor) else whole


def train_part(network: nn.Module, part: str) -> None:
    """Freezes all of a network but its "encoder", or its "head" with the time embedding; nothing for "all"."""
    if part != "all":
        network.requires_grad_(False)
        getattr(network, part).requires_grad_(True)
        network.time_embedding.requires_grad_(part == "head")


def trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
