"""Which share of the time of training do the data take? Prints a table.

    python benchmarks/data.py PHOTOS

The share is measured beside the training step of configs/x4_encoder.yaml: while pictures are decoded for the first
time, and once they are kept in memory.
"""

import argparse
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from flowsr.components import pipeline_from
from flowsr.training.crops import CropDataset, Cropping, as_images
from flowsr.training.objectives import PosteriorMean
from flowsr.training.optimizers import make_optimizer
from flowsr.training.pictures import load_images
from flowsr.training.settings import parse_settings
from flowsr.training.trainable import train_part

CONFIG = Path(__file__).resolve().parents[1] / "configs/x4_encoder.yaml"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("photos", nargs="+", help="folders of pictures")
    options.add_argument("--steps", type=int, default=10, help="training steps measured (default: 10)")
    options = options.parse_args()
    torch.set_flush_denormal(True)
    settings = parse_settings([], CONFIG)
    pipe = pipeline_from(settings.pipeline, settings.unet, settings.scheduler)
    unet, objective = pipe.unet.to(memory_format=torch.channels_last), PosteriorMean(pipe, settings)
    train_part(unet, settings.train)
    optimizer = make_optimizer(settings.optimizer, unet, 1e-5)
    images = load_images(options.photos, None)
    batch, steps = settings.train_batch_size, options.steps
    crops = CropDataset(
        images.select(range(batch * steps)), Cropping(settings.resolution, 4), 0, 2 * batch * steps, 8.0
    )
    loader = iter(DataLoader(crops, batch))

    def train_step(batch: dict) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.mixed_precision == "bf16"):
            example = objective.example(batch)
            prediction = unet(example.x_t, example.timestep, **example.conditions).sample
        objective.loss(prediction, example).backward()
        optimizer.step()
        optimizer.zero_grad()

    train_step(as_images({key: torch.stack([crops[0][key]] * batch) for key in crops[0]}))  # warm up
    crops.cache.clear()
    print(f"{batch} crops of {settings.resolution} a step, {torch.get_num_threads()} threads, {steps} steps each\n")
    print("| pictures | data, s a step | training, s a step | share of the data |\n|---|---|---|---|")
    for name in ("decoded for the first time", "kept in memory"):
        data = training = 0.0
        for _ in range(steps):
            start = time.perf_counter()
            examples = as_images(next(loader))
            data += time.perf_counter() - start
            start = time.perf_counter()
            train_step(examples)
            training += time.perf_counter() - start
        print(f"| {name} | {data / steps:.3f} | {training / steps:.3f} | {data / (data + training):.1%} |")


if __name__ == "__main__":
    main()
