"""flowsr as a node of chaiNNer, in whose own Python flowsr is installed.

Copy this file into `backend/src/packages/chaiNNer_pytorch/pytorch/processing` of chaiNNer.
"""

from __future__ import annotations

from enum import Enum
from functools import lru_cache

import numpy as np
import torch
from api import NodeContext
from nodes.properties.inputs import EnumInput, ImageInput, NumberInput, SliderInput, TextInput
from nodes.properties.outputs import ImageOutput

from flowsr.loading import load_upscaler
from flowsr.upscaler import call_options

from ...settings import get_settings
from .. import processing_group


class Consistency(Enum):
    NONE = "none"
    SOFT = "soft"
    EXACT = "exact"


@lru_cache(maxsize=1)
def pipeline(checkpoint: str, device: torch.device):
    """The pipeline of a checkpoint; the last one used stays loaded."""
    pipe = load_upscaler(checkpoint, device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@processing_group.register(
    schema_id="chainner:pytorch:upscale_flowsr",
    name="Upscale Image (flowsr)",
    description="Super-resolution by flow matching, from faithful (fidelity 1) to vivid (fidelity 0).",
    icon="PyTorch",
    inputs=[
        ImageInput(),
        TextInput("Checkpoint", default="x4"),
        SliderInput("Fidelity", min=0, max=1, default=0, precision=2, step=0.05),
        NumberInput("Steps", min=1, max=100, default=4),
        EnumInput(Consistency, "Consistency", Consistency.NONE),
        NumberInput("Tile Size", min=0, max=4096, default=0, unit="px"),
        NumberInput("Seed", min=0, max=2**53 - 1, default=0),
    ],
    outputs=[ImageOutput(assume_normalized=True)],
    node_context=True,
)
def upscale_flowsr_node(
    context: NodeContext,
    img: np.ndarray,
    checkpoint: str,
    fidelity: float,
    steps: int,
    consistency: Consistency,
    tile_size: int,
    seed: int,
) -> np.ndarray:
    """`(h, w)`, or BGR(A) `(h, w, c)`, float32 in [0, 1] -> the same, `scale` times as large."""

    def progress(pipe, step: int, timestep: torch.Tensor, given: dict) -> dict:
        context.set_progress((step + 1) / pipe.num_timesteps)  # ends the work where that was asked for
        return {}

    pipe = pipeline(checkpoint, get_settings(context).device)
    options = call_options(
        pipe,
        fidelity,
        num_inference_steps=steps,
        consistency=None if consistency is Consistency.NONE else consistency.value,
        tile=tile_size or None,
    )
    generator = torch.Generator().manual_seed(seed)
    call = {"generator": generator, "output_type": "np", "callback_on_step_end": progress, **options}
    large = reverse_colours(pipe(reverse_colours(img.clip(0, 1)), **call).images[0])
    return large.reshape(*large.shape[:2], *img.shape[2:])  # grey without channels stays so


def reverse_colours(img: np.ndarray) -> np.ndarray:
    """BGR(A) from RGB(A) and back; grey stays."""
    if img.ndim == 2 or img.shape[2] < 3:
        return img
    return np.ascontiguousarray(img[..., [2, 1, 0, *range(3, img.shape[2])]])
