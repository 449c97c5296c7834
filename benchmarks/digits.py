"""Are generated digits right? Accuracy of a small classifier on class-conditional samples, and the class balance.

    python benchmarks/digits.py runs/seed_mnist MNIST_TRAIN MNIST_TEST --grid digits.png

The classifier is trained here, on real digits, and first measured on those of the test set. MNIST_TRAIN and MNIST_TEST
are data sets with the columns image and label: on the Hub, or local folders of tables.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from flowsr.evaluation import generated_grid
from flowsr.loading import load
from flowsr.training.pictures import load_images


class Classifier(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
        )  # fmt: skip


def tensors(place: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(n, 1, 28, 28)` in [0, 1] and `(n,)`."""
    data = load_images(None, place, labels=True)
    pictures = np.stack([np.asarray(image.convert("L")) for image in data["image"]])
    return torch.from_numpy(pictures)[:, None].float() / 255, torch.tensor(data["label"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder of a FlowMatchPipeline of digits")
    parser.add_argument("train", help="data set of training digits")
    parser.add_argument("test", help="data set of test digits")
    parser.add_argument("--samples", type=int, default=1000, help="of each kind (default: 1000)")
    parser.add_argument("--steps", type=int, default=8, help="of the solver (default: 8)")
    parser.add_argument("--solver", default="heun", help="(default: heun)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="of the class-conditional ones (default: 1)")
    parser.add_argument("--grid", help="also write a picture of class-conditional samples")
    options = parser.parse_args()
    torch.manual_seed(0)

    classifier = Classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    pictures, labels = tensors(options.train)
    for _ in range(3):
        for batch in torch.randperm(len(pictures)).split(128):
            F.cross_entropy(classifier(pictures[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def classes(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([classifier(part).argmax(1) for part in pictures.split(500)])

    pictures, labels = tensors(options.test)
    print(f"test digits: accuracy {float((classes(pictures) == labels).float().mean()):.1%}")

    pipe = load(options.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    how = {"num_inference_steps": options.steps, "solver": options.solver, "output_type": "pt"}
    wanted = torch.arange(options.samples) % 10
    parts = wanted.split(100)
    guided = {"guidance_scale": options.guidance_scale, "generator": generator, **how}
    samples = torch.cat([pipe(class_labels=part.tolist(), **guided).images for part in parts])
    print(
        f"class-conditional samples: accuracy {float((classes(samples) == wanted).float().mean()):.1%} "
        f"({options.samples} of {options.steps} steps of {options.solver}, {pipe.num_evaluations} evaluations)"
    )
    free = torch.cat([pipe(batch_size=len(part), generator=generator, **how).images for part in parts])
    shares = torch.bincount(classes(free), minlength=10) / len(free)
    print("unconditional samples: share of each class " + " ".join(f"{float(share):.1%}" for share in shares))
    if options.grid:
        Image.fromarray(generated_grid(pipe, options.steps, 10, options.guidance_scale)).save(options.grid)


if __name__ == "__main__":
    main()
