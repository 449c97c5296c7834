"""What `flowsr info` says: of this machine, of the checkpoints that ship, and of one checkpoint."""

from __future__ import annotations

import platform
import statistics
import time

import diffusers
import psutil
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline

import flowsr
from flowsr.loading import best_device

BUNDLED = {
    "x4": "photos that were downscaled cleanly; fidelity from faithful to vivid",
    "x4-real": "JPEGs, noisy and blurred photos; softens what was clean",
    "ddpm_x4": "the same task by diffusion: samples with more detail, in ten steps and more",
    "digits": "generates handwritten digits of a class, for study",
}
GIB = 2**30


def versions() -> dict[str, str]:
    return {
        "flowsr": flowsr.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, str]:
    """Device, memory and the fast precision of this machine, as words."""
    device, memory = best_device(), psutil.virtual_memory()
    words = {"memory": f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        words = {"device": f"cuda, {torch.cuda.get_device_name(device)}", **words}
        words["GPU memory"] = f"{free / GIB:.1f} GiB free of {total / GIB:.1f}"
    else:
        words = {"device": f"cpu, {torch.get_num_threads()} threads", **words}
    speeds = relative_speeds(device)
    fastest = max(speeds, key=speeds.get)
    others = ", ".join(f"{name} {speed:.1f} times" for name, speed in speeds.items())
    return {**words, "precision": f"{fastest} is fastest (a convolution, beside float32: {others})"}


def relative_speeds(device: torch.device) -> dict[str, float]:
    """How many times as fast as in float32 a convolution is in each precision that the device is good for."""
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    seconds = {}
    with torch.inference_mode():
        for dtype in dtypes:
            x = torch.ones(1, 64, 96, 96, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.ones(64, 64, 3, 3, device=device, dtype=dtype)
            F.conv2d(x, weight, padding=1)  # the first call prepares
            runs = []
            for _ in range(5):
                start = time.perf_counter()
                float(F.conv2d(x, weight, padding=1)[0, 0, 0, 0])  # waits for a GPU
                runs.append(time.perf_counter() - start)
            seconds[str(dtype).removeprefix("torch.")] = statistics.median(runs)
    return {name: seconds["float32"] / value for name, value in seconds.items() if name != "float32"} | {"float32": 1}


def describe(pipe: DiffusionPipeline) -> dict[str, str]:
    """What a pipeline is, as words."""
    unet, flow = pipe.unet.config, pipe.scheduler.config
    words = {"scale": f"x{pipe.scale_factor}" if hasattr(pipe, "scale_factor") else "none: it generates pictures"}
    words["network"] = f"{type(pipe.unet).__name__}, {pipe.unet.num_parameters():,} parameters"
    if "block_out_channels" in unet:
        patch = unet.get("patch_size", 1)
        words["widths"] = f"{tuple(unet.block_out_channels)} on patches of {patch} HR pixels"
    if "source" in flow:
        words["flow"] = f"from {flow.source} with noise of std {flow.source_noise_std}, {flow.path} path"
    else:
        kind, target = type(pipe.scheduler).__name__, pipe.config.target
        words["diffusion"] = f"{kind}, {flow.beta_schedule} betas, of the {target}"
    words["predicts"] = f"the {flow.prediction_type}"
    if hasattr(pipe, "scale_factor"):
        field = pipe.unet.receptive_field
        words["tiles"] = "blended (attention or group norm)" if field is None else f"exact, halo {field} pixels"
    return words
