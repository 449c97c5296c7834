"""Moving averages of weights that may be spread over processes."""

from __future__ import annotations

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from flowsr.training.trainable import trainable


class Averages(EMAModel):
    """[`~diffusers.training_utils.EMAModel`] in float32, also of weights that FSDP 2 has sharded.

    Each process averages its own shards; what is saved or copied is whole, so that a checkpoint can be read anywhere.
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
        shards = self.shadow_params
        super().load_state_dict(state)
        self.shadow_params = [
            placed_like(shard, whole) for shard, whole in zip(shards, self.shadow_params, strict=True)
        ]


def placed_like(shard: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor, placed and spread over processes as another is."""
    whole = whole.to(shard.device)
    return distribute_tensor(whole, shard.device_mesh, shard.placements) if isinstance(shard, DTensor) else whole
