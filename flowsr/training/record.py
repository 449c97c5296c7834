"""What a run writes down of itself, line by line in metrics.jsonl."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import accelerate
import diffusers
import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor

import flowsr


def log(accelerator: Accelerator, output_dir: Path, record: dict) -> None:
    """Appends a line to metrics.jsonl."""
    if accelerator.is_main_process:
        with open(output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def versions(folder: Path) -> dict:
    """What a reader needs to repeat a run: versions, and the commit of a folder."""
    commit = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "flowsr": flowsr.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__, "commit": commit.stdout.strip() or None,
    }  # fmt: skip


class Stopwatch:
    """Seconds of training alone."""

    def __init__(self):
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training, such as a validation."""
        begin = time.perf_counter()
        yield
        self.since += time.perf_counter() - begin

    def lap(self) -> float:
        """Since the beginning or the last lap."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds


def summary(
    accelerator: Accelerator, losses: list[torch.Tensor], norms: list[torch.Tensor | float | None], weights: list
) -> tuple[float, float, float]:
    """Mean loss and mean gradient norm since the last look, over all processes, and the largest weight now.

    A norm precedes its step, and the loss that a step leads to is only known after the next: so the weights are looked
    at too.
    """
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms if norm is not None]
    norm = torch.stack([torch.as_tensor(norm, device=accelerator.device).float() for norm in whole or [0.0]]).mean()
    local = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
    largest = torch.stack([weight.detach().float().abs().max() for weight in local if weight.numel()]).max()
    found = accelerator.gather(torch.stack([torch.stack(losses).mean(), norm, largest])[None])
    mean, norm = found[:, :2].mean(0).tolist()
    return mean, norm, found[:, 2].max().item()
