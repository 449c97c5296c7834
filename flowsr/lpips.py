"""LPIPS v0.1 with SqueezeNet 1.1 from one safetensors file, where torchmetrics cannot download its weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from flowsr.picture_file import one_line

FIRES = {  # layer: channels in, squeezed, each expansion
    3: (64, 16, 64),
    4: (128, 16, 64),
    6: (128, 32, 128),
    7: (256, 32, 128),
    9: (256, 48, 192),
    10: (384, 48, 192),
    11: (384, 64, 256),
    12: (512, 64, 256),
}
TAPS = (1, 4, 7, 9, 10, 11, 12)  # layers whose output is compared


class Fire(nn.Module):
    """Squeeze to few channels, expand by 1x1 and 3x3 (Iandola et al. 2016, section 3.1)."""

    def __init__(self, channels: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class SqueezeLPIPS(nn.Module):
    """Distance of two pictures in the features of SqueezeNet, weighted by human judgement (Zhang et al. 2018, eq. 1).

    Args:
        weights (`str`): safetensors with `backbone.LAYER.*` (SqueezeNet 1.1 without classifier) and `linN.weight`.

    Raises:
        ValueError: if the file holds something else.
    """

    def __init__(self, weights: str):
        super().__init__()
        layers = {0: nn.Conv2d(3, 64, 3, stride=2), **{n: Fire(*sizes) for n, sizes in FIRES.items()}}
        self.backbone = nn.ModuleDict({str(n): layer for n, layer in layers.items()})
        try:
            state = load_file(weights)
            for n in range(len(TAPS)):  # each (1, channels, 1, 1)
                self.register_buffer(f"lin{n}", state[f"lin{n}.weight"], persistent=False)
            self.load_state_dict({k: v for k, v in state.items() if k.startswith("backbone.")})
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"{weights} does not hold the weights of LPIPS v0.1 with SqueezeNet ({one_line(error)}); give "
                "another file, or leave out `lpips_weights`."
            ) from error
        self.register_buffer("mean", torch.tensor([-0.030, -0.088, -0.188])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.458, 0.448, 0.450])[:, None, None], persistent=False)

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Unit-length features of the seven taps."""
        x, taps = (x - self.mean) / self.std, []
        for n in range(13):
            if n == 1:
                x = F.relu(x)
            elif n in (2, 5, 8):
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
            else:
                x = self.backbone[str(n)](x)
            if n in TAPS:
                taps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return taps

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """`(n, 3, h, w)` in [-1, 1] twice -> `(n,)`."""
        lins = [getattr(self, f"lin{n}") for n in range(len(TAPS))]
        pairs = zip(self.features(a), self.features(b), lins)
        return sum(((x - y).square() * lin).sum(1).mean((1, 2)) for x, y, lin in pairs)
