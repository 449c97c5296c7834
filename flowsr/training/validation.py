"""Measures the averaged weights on pictures that a run does not train on, and keeps the best pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from PIL import Image

from flowsr.evaluation import Pair, bicubic_row, coupling_row, generated_grid, grid, measure, upscale_pair
from flowsr.training.checkpoints import Progress
from flowsr.training.record import log
from flowsr.training.settings import Settings


def shared(work: Callable[[int], object], count: int) -> list:
    """`[work(0), ..., work(count - 1)]`, of which each process does a part; all processes must call together."""
    state = PartialState()
    own = [(number, work(number)) for number in range(state.process_index, count, state.num_processes)]
    return [done for _, done in sorted(gather_object(own), key=lambda numbered: numbered[0])]


def measure_shared(
    pipe: DiffusionPipeline, pairs: list[Pair], steps: list[int], lpips: Callable | None
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Means of an upscaling pipeline, and grids of what it made.

    Args:
        pairs (`list[Pair]`): what is upscaled, and what it should become.
        steps (`list[int]`): numbers of inference steps, each measured.
        lpips: distance of two pictures, or `None`.

    Returns:
        `psnr_y_N`, `ssim_y_N` (and `lpips_N`) for each N of `steps`; and uint8 grids with one row a picture:
        `bicubic | SR at each N | HR` and, of a flow, `LR | source | SR | HR`. The processes of a training share the
        work, and each has all of the result.
    """
    is_flow = hasattr(pipe.scheduler, "sample_source")

    def one(number: int) -> tuple[dict[str, float], list[np.ndarray], list[np.ndarray]]:
        pair, measured, results = pairs[number], {}, []
        for count in steps:
            sr = upscale_pair(pipe, pair, count, seed=number)
            values = measure(sr, pair, pipe.scale_factor, lpips, ("psnr_y", "ssim_y"))
            measured |= {f"{name}_{count}": value for name, value in values.items()}
            results.append(sr)
        coupling = coupling_row(pipe, pair, results[-1], seed=number) if is_flow else []
        return measured, bicubic_row(pair, results), coupling

    measured, rows, couplings = zip(*shared(one, len(pairs)))
    means = {name: round(float(np.mean([each[name] for each in measured])), 4) for name in measured[0]}
    return means, {"bicubic_sr_hr": grid(rows)} | ({"lr_source_sr_hr": grid(couplings)} if is_flow else {})


def validate(
    accelerator: Accelerator,
    pipe: DiffusionPipeline,
    settings: Settings,
    progress: Progress,
    pairs: list[Pair],
    lpips: Callable | None,
) -> None:
    """Writes metrics and grids of a pipeline; the best one so far goes to `best/`. All processes must call together.

    Args:
        pipe: with the averaged weights.
        pairs (`list[Pair]`): pictures held out; none of a pipeline that generates, which shows what it makes.
        lpips: distance of two pictures, or `None`.
    """
    output_dir, steps = Path(settings.output_dir), settings.validation_inference_steps
    pipe.set_progress_bar_config(disable=True)
    measured, grids = measure_shared(pipe, pairs, steps, lpips) if pairs else ({}, {})
    if not accelerator.is_main_process:
        return
    if not pairs:
        grids["samples"] = generated_grid(pipe, steps[-1])
    record = {"event": "validation", "step": progress.step, **measured}
    log(accelerator, output_dir, record)
    accelerator.log(measured, step=progress.step)
    accelerator.print(record)
    (output_dir / "validation").mkdir(exist_ok=True)
    for name, picture in grids.items():
        Image.fromarray(picture).save(output_dir / "validation" / f"{progress.step:06d}_{name}.png")
        for tracker in accelerator.trackers:
            if hasattr(tracker, "log_images"):
                order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # it has to be told
                tracker.log_images({name: picture[None]}, step=progress.step, **order)
    quality = measured.get(f"psnr_y_{steps[0]}")
    if quality is not None and quality > progress.best and not settings.lora_rank:
        progress.best = quality
        pipe.save_pretrained(output_dir / "best")
