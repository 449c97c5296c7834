"""Do generated faces come closer to real ones with training? Distance of feature statistics at each checkpoint.

    python benchmarks/faces.py runs/small_celeba FACES --lpips_weights lpips_squeeze_v0.1.safetensors --grid faces.png

The distance is KID (Binkowski et al. 2018, eq. 4: squared maximum mean discrepancy with a cubic kernel, unbiased for
few pictures), here of the features of SqueezeNet that LPIPS uses, averaged over positions. The first row is the
distance between real faces and other real faces.
"""

import argparse
import warnings
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

from flowsr.conversion import convert
from flowsr.evaluation import generated_grid
from flowsr.lpips import SqueezeLPIPS
from flowsr.training.crops import CropDataset, Cropping, as_images
from flowsr.training.pictures import load_images


class Features(nn.Module):
    """`(n, 3, h, w)` in [-1, 1] -> `(n, 2240)`: SqueezeNet's unit-length features, averaged over positions."""

    def __init__(self, weights: str):
        super().__init__()
        self.lpips = SqueezeLPIPS(weights)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [torch.cat([tap.mean((2, 3)) for tap in self.lpips.features(part)], dim=1) for part in x.split(100)]
        return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", help="output folder of train_sr.py, with its checkpoints")
    parser.add_argument("faces", help="folder of real faces")
    parser.add_argument("--lpips_weights", required=True, help="safetensors of LPIPS v0.1 with SqueezeNet")
    parser.add_argument("--samples", type=int, default=300, help="at each checkpoint (default: 300)")
    parser.add_argument("--steps", type=int, default=20, help="of Euler (default: 20)")
    parser.add_argument("--grid", help="also write a picture of samples of the last checkpoint")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="Metric `Kernel")
    torch.manual_seed(0)

    checkpoints = sorted(Path(options.run).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if not checkpoints:
        parser.error(f"{options.run} holds no checkpoint-N")
    kid = KernelInceptionDistance(
        Features(options.lpips_weights), subsets=50, subset_size=options.samples, gamma=1.0, reset_real_features=False
    )

    def row(name: str, pictures: torch.Tensor) -> None:
        kid.update(pictures, real=False)
        mean, std = kid.compute()
        kid.reset()
        print(f"| {name} | {float(mean):.2f} +- {float(std):.2f} |", flush=True)

    side = convert(checkpoints[0]).config.sample_size[0]
    faces = load_images([options.faces], None)
    crops = CropDataset(faces, Cropping(side, 1, augmentation="none", resize_to=side))  # shuffled
    real = torch.stack([as_images(crops[number])["hr"] for number in range(len(faces))])
    kid.update(real[options.samples :], real=True)
    print("| faces | KID |\n|---|---|")
    row("real", real[: options.samples])
    for checkpoint in checkpoints:
        pipe = convert(checkpoint)
        pipe.set_progress_bar_config(disable=True)
        generator, samples = torch.Generator().manual_seed(0), []
        for part in torch.arange(options.samples).split(50):
            answer = pipe(len(part), num_inference_steps=options.steps, generator=generator, output_type="pt")
            samples.append(answer.images * 2 - 1)
        row(f"generated, {checkpoint.name.split('-')[1]} steps of training", torch.cat(samples))
    if options.grid:
        Image.fromarray(generated_grid(pipe, options.steps)).save(options.grid)


if __name__ == "__main__":
    main()
