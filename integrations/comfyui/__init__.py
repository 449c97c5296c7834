"""flowsr as a node of ComfyUI: copy or link this folder into ComfyUI/custom_nodes, where flowsr is installed."""

from functools import lru_cache

import PIL.Image
import torch

from flowsr.loading import best_device, load_upscaler
from flowsr.upscaler import call_options, has_dial


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


class Watch:
    """ComfyUI's progress bar, with a preview, and its button that ends the work; nothing without ComfyUI.

    Args:
        pictures (`int`): that are upscaled one after the other.
    """

    def __init__(self, pictures: int):
        self.pictures, self.done, self.bar = pictures, 0, None
        try:
            from comfy.model_management import throw_exception_if_processing_interrupted
            from comfy.utils import ProgressBar
        except ImportError:
            return
        self.check, self.bar = throw_exception_if_processing_interrupted, ProgressBar(pictures)

    def __call__(self, pipe, step: int, timestep: torch.Tensor, given: dict) -> dict:
        """A pipeline's `callback_on_step_end`."""
        if self.bar is not None:
            self.check()
            self.done += 1
            self.bar.update_absolute(self.done, self.pictures * pipe.num_timesteps, preview(pipe, given["latents"]))
        return given


def preview(pipe, x_t: torch.Tensor) -> tuple | None:
    """A state of the flow as ComfyUI shows it: format, picture, longest side. None for a state of a diffusion."""
    if not has_dial(pipe):
        return None
    levels = ((pipe.from_data_range(x_t[0]).clamp(-1, 1) + 1) * 127.5).round().byte()
    return "JPEG", PIL.Image.fromarray(levels.movedim(0, -1).cpu().numpy()), 512


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
        watch, large = Watch(len(pictures)), []
        for number, picture in enumerate(pictures):
            generator = torch.Generator().manual_seed((seed + number) % 2**64)
            made = pipe(picture, generator=generator, output_type="pt", callback_on_step_end=watch, **options)
            large.append(made.images[0].movedim(0, -1).cpu())
        return (torch.stack(large),)


NODE_CLASS_MAPPINGS = {"FlowSRUpscale": FlowSRUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {"FlowSRUpscale": "Upscale (flowsr)"}
