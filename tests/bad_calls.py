"""Pictures and arguments that every super-resolution pipeline refuses, with words of its message."""

import numpy as np
import PIL.Image
import torch

BAD_IMAGES = {
    "nan": (np.full((4, 4, 3), np.nan, np.float32), "NaN"),
    "zero-sized": (np.zeros((0, 4, 3), np.uint8), "empty"),
    "above the range": (np.full((4, 4, 3), 255.0), "divide by 255"),
    "below the range": (torch.full((3, 4, 4), -1.0), "add 1 and divide by 2"),
    "five channels": (np.zeros((4, 4, 5), np.uint8), "1 to 4 channels"),
    "two dimensions": (torch.zeros(4, 4), "1 to 4 channels"),
    "mode F": (PIL.Image.new("F", (4, 4)), "no defined way to RGB"),
    "32 bits": (PIL.Image.fromarray(np.full((4, 4), 70000, np.int32)), "16-bit"),
    "empty list": ([], "empty list"),
}

BAD_ARGUMENTS = {
    "num_inference_steps": (0, "whole number"),
    "fidelity": (1.5, r"\[0, 1\]"),
    "consistency": ("hard", "'exact', 'soft' or None"),
    "guidance_scale": (2.0, "condition dropout"),
    "num_images_per_prompt": (0, "whole number from 1"),
    "tile": (0, "LR pixels"),
    "output_type": ("jpeg", "output_type"),
    "generator": ([torch.Generator()] * 2, "one generator per output"),
    "latents": (torch.zeros(1, 3, 8, 8), r"shape \(1, 3, 20, 24\)"),
    "callback_on_step_end_tensor_inputs": (["noise"], "latents"),
    "sigmas": ([0.5, 1.0], "fall strictly"),
}
