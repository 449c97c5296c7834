"""Seconds of one 128x128 -> 512x512 picture, beside a same-size plain EDSR-baseline in the same run.

    python benchmarks/speed.py                      # the bundled network, float32
    python benchmarks/speed.py --dtype bfloat16 --threads 2 --repeats 20

EDSR-baseline (Lim et al. 2017, table 1): 16 residual blocks of 64 channels, then two sub-pixel upsamplings. Both are
timed in turn, so that whatever else the machine does falls on both; the ratio of the medians is the result.
"""

import argparse
import statistics
import time

import torch
from torch import nn

from flowsr.loading import load


class ResBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(True), nn.Conv2d(64, 64, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


class EDSRBaseline(nn.Module):
    """1,517,571 parameters, as published."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 64, 3, padding=1)
        self.body = nn.Sequential(*[ResBlock() for _ in range(16)], nn.Conv2d(64, 64, 3, padding=1))
        up = [nn.Conv2d(64, 256, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(
            *up, nn.Conv2d(64, 256, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(64, 3, 3, padding=1)
        )

    def forward(self, x):
        h = self.head(x)
        return self.tail(h + self.body(h))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="x4", help="name, folder, file or Hub id (default: x4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    pipe = load(options.checkpoint, dtype=dtype)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.set_progress_bar_config(disable=True)
    edsr = EDSRBaseline().eval().to(dtype, memory_format=torch.channels_last)
    picture = torch.rand(1, 3, 128, 128)
    lr = picture.to(dtype).contiguous(memory_format=torch.channels_last)

    methods = {
        "EDSR-baseline": lambda: edsr(lr),
        "flowsr, 1 step": lambda: pipe(picture, fidelity=1.0, output_type="pt"),
        "flowsr, 4 steps": lambda: pipe(picture, num_inference_steps=4, output_type="pt"),
        "flowsr, 1 step, exact": lambda: pipe(picture, fidelity=1.0, consistency="exact", output_type="pt"),
    }
    seconds = {name: [] for name in methods}
    with torch.no_grad():
        for repeat in range(options.repeats + 2):
            for name, method in methods.items():
                start = time.perf_counter()
                method()
                if repeat >= 2:  # the first two choose kernels and fill caches
                    seconds[name].append(time.perf_counter() - start)

    parameters = {
        name: sum(p.numel() for p in (edsr if "EDSR" in name else pipe.unet).parameters()) for name in methods
    }
    reference = statistics.median(seconds["EDSR-baseline"])
    print(f"128x128 -> 512x512, {options.dtype}, {options.threads} threads, median of {options.repeats}\n")
    print("| | parameters | seconds | (min ... max) | ratio |\n|---|---|---|---|---|")
    for name, values in seconds.items():
        median = statistics.median(values)
        spread = f"{min(values):.3f} ... {max(values):.3f}"
        print(f"| {name} | {parameters[name]:,} | {median:.3f} | {spread} | {median / reference:.2f} |")


if __name__ == "__main__":
    main()
