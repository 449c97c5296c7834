"""flowsr as a node of ComfyUI: copy or link this folder into ComfyUI/custom_nodes, where flowsr is installed."""

from functools import lru_cache

import torch

from flowsr.loading import best_device, load_upscaler
from flowsr.upscaler import call_options


def device() -> torch.device:
    """The device that ComfyUI works on; without ComfyUI, the GPU where there is one."""
    try:
        from comfy.model_management import get_torch_device
    except ImportError:
        return best_device()
    return get_torch_device()


@lru_cache(maxsize=1)
def pipeline(checkpoint: str, where: torch.device):
    """The pipeline of a checkpoint; the last one used stays loaded."""
    pipe = load_upscaler(checkpoint, where)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class FlowSRUpscale:
    """IMAGE `(b, h, w, c)` in [0, 1] -> IMAGE `(b, scale * h, scale * w, c)` in [0, 1]."""

    CATEGORY = "image/upscaling"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    DESCRIPTION = "Super-resolution by flow matching, from faithful (fidelity 1) to vivid (fidelity 0)."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "image": ("IMAGE",),
                "checkpoint": ("STRING", {"default": "x4", "tooltip": "bundled name, folder, single file or Hub id"}),
                "fidelity": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05}),
                "steps": ("INT", {"default": 4, "min": 1, "max": 100}),
                "consistency": (["none", "soft", "exact"],),
                "tile": ("INT", {"default": 0, "min": 0, "max": 4096, "tooltip": "LR pixels; 0: whole picture"}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            }
        }

    def upscale(
        self,
        image: torch.Tensor,
        checkpoint: str = "x4",
        fidelity: float = 0.0,
        steps: int = 4,
        consistency: str = "none",
        tile: int = 0,
        seed: int = 0,
    ) -> tuple[torch.Tensor]:
        # Nodes that interpolate overshoot [0, 1] a little; ComfyUI clamps where a picture leaves it, and so does this.
        pictures = image.clamp(0, 1).movedim(-1, 1)
        pipe = pipeline(checkpoint, device())
        options = call_options(
            pipe,
            fidelity,
            num_inference_steps=steps,
            consistency=None if consistency == "none" else consistency,
            tile=tile or None,
        )
        generators = [torch.Generator().manual_seed((seed + number) % 2**64) for number in range(len(pictures))]
        large = pipe(pictures, generator=generators, output_type="pt", **options).images
        return (large.movedim(1, -1).cpu(),)


NODE_CLASS_MAPPINGS = {"FlowSRUpscale": FlowSRUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {"FlowSRUpscale": "Upscale (flowsr)"}
