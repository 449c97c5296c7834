"""What the source of a flow is worth: networks of equal training, measured side by side on pictures with classes.

    python benchmarks/couplings.py CIFAR10_TEST runs/small_couplings_cifar10 runs/small_couplings_noise

CIFAR10_TEST is a folder with one folder of pictures for each class. Prints PSNR-Y, and LPIPS where its weights are
given, for Euler steps and for dopri5 with its number of network evaluations, beside bicubic.
"""

import argparse

import numpy as np
import torch
from PIL import Image

from flowsr.degradations import matlab_bicubic
from flowsr.evaluation import Pair, coupling_row, grid, upscale_pair
from flowsr.loading import load
from flowsr.metrics import load_lpips, psnr_y
from flowsr.training.pictures import load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("test", help="folder of CLASS/PICTURE")
    parser.add_argument("checkpoints", nargs="+", help="folders of FlowMatchSRPipelines")
    parser.add_argument("--pictures", type=int, default=200, help="of the test set, spread evenly (default: 200)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of Euler")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="rtol and atol of dopri5 (default: 1e-3)")
    parser.add_argument("--lpips_weights", help="safetensors of LPIPS v0.1 with SqueezeNet")
    parser.add_argument("--grid", help="also write LR | source | SR | HR of the first checkpoint")
    options = parser.parse_args()

    images = load_images([options.test], None, labels=True)
    images = images.select(np.linspace(0, len(images) - 1, min(options.pictures, len(images))).astype(int))
    lpips = load_lpips(options.lpips_weights)[0] if options.lpips_weights else None
    pipes = {place: load(place) for place in options.checkpoints}
    scale = next(iter(pipes.values())).scale_factor
    hr = [np.asarray(image.convert("RGB")) for image in images["image"]]
    pairs = [Pair(picture, matlab_bicubic(picture, scale), label=label) for picture, label in zip(hr, images["label"])]

    def row(name: str, evaluations: int | str, pictures: list[np.ndarray]) -> None:
        cells = [np.mean([psnr_y(a, b, scale) for a, b in zip(pictures, hr)])]
        if lpips is not None:
            cells.append(np.mean([lpips(a, b) for a, b in zip(pictures, hr)]))
        print(f"| {name} | {evaluations} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)

    def upscaled(pipe, **how) -> list[np.ndarray]:
        made = []
        for part in torch.arange(len(pairs)).split(50):
            lr = [Image.fromarray(pairs[k].lr) for k in part]
            labels = [pairs[k].label for k in part]
            generator = torch.Generator().manual_seed(int(part[0]))
            made += [np.asarray(image) for image in pipe(lr, class_labels=labels, generator=generator, **how).images]
        return made

    print("| network and solver | evaluations | PSNR-Y |" + (" LPIPS |" if lpips else ""))
    print("|---|---|---|" + ("---|" if lpips else ""))
    bicubic = [Image.fromarray(p.lr).resize(p.hr.shape[1::-1], Image.BICUBIC) for p in pairs]
    row("bicubic", 0, [np.asarray(image) for image in bicubic])
    for place, pipe in pipes.items():
        pipe.set_progress_bar_config(disable=True)
        for steps in options.steps:
            row(f"{place}, Euler", steps, upscaled(pipe, num_inference_steps=steps))
        adaptive = upscaled(pipe, solver="dopri5", rtol=options.tolerance, atol=options.tolerance)
        row(f"{place}, dopri5", pipe.num_evaluations, adaptive)
    if options.grid:
        pipe, few = pipes[options.checkpoints[0]], pairs[:: -(-len(pairs) // 10)]
        rows = [coupling_row(pipe, pair, upscale_pair(pipe, pair, 8, seed), seed) for seed, pair in enumerate(few)]
        Image.fromarray(grid(rows)).save(options.grid)


if __name__ == "__main__":
    main()
