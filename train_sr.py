"""Trains a flow-matching super-resolution pipeline, on one CPU as on a cluster.

    accelerate launch train_sr.py --train_data_dir PHOTOS                          # the x4 network of configs/x4.yaml
    accelerate launch train_sr.py --config configs/tiny.yaml --train_data_dir PHOTOS   # a first try, in seconds
    accelerate launch train_sr.py --config configs/x4.yaml --train_data_dir PHOTOS --resume_from_checkpoint latest
    accelerate launch train_sr.py --train_data_dir PHOTOS --pretrained_model_name_or_path OLD_FOLDER   # fine-tuning

Crop number k of the run, its noise level and its noise are functions of (seed, k) alone. So a resumed run is the same
as an uninterrupted one, and batch size, accumulation and processes only cut the same stream differently. The finished
pipeline lands in `--output_dir`, with the settings, the log and pictures of the validation beside it.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import flowsr
from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline, UNetSRModel
from flowsr.data import CropDataset, load_images, smaller_than
from flowsr.metrics import psnr_y
from flowsr.objectives import LOSSES, condition_dropped, generators_for, sigmas_for

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "x4.yaml"


@dataclass
class Settings:
    """Everything that a run depends on. Flags override the `--config` file; the result is written to the output."""

    # Data.
    train_data_dir: list[str] = field(default_factory=list, metadata={"help": "folders (or zips) of pictures"})
    dataset_name: str | None = field(default=None, metadata={"help": "or: a data set on the Hub, column `image`"})
    resolution: int = field(default=192, metadata={"help": "side of a training crop, HR pixels"})
    cache_gib: float = field(default=4.0, metadata={"help": "decoded pictures kept in memory per loader, GiB"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "loader processes; 0 suits cached pictures"})

    # Network and flow; JSON on the command line, a mapping in the file.
    unet: str = field(default="{}", metadata={"help": "UNetSRModel config"})
    scheduler: str = field(default="{}", metadata={"help": "FlowMatchSREulerScheduler config"})
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "start from the weights of this pipeline (its config replaces both above)"}
    )

    # Objective.
    loss: str = field(default="l1", metadata={"help": f"distance of velocities: {' or '.join(LOSSES)}"})
    sigma_atom: float = field(default=0.4, metadata={"help": "share of crops at sigma = 1, where one step decides"})

    # Optimisation. Steps are optimiser steps.
    max_train_steps: int = field(default=20000, metadata={"help": "optimiser steps"})
    train_batch_size: int = field(default=8, metadata={"help": "crops per process and micro-batch"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches per optimiser step"})
    learning_rate: float = field(default=8e-4, metadata={"help": "peak, after the warm-up"})
    lr_scheduler: str = field(default="cosine", metadata={"help": "any name of diffusers.optimization"})
    lr_warmup_steps: int = field(default=300, metadata={"help": "optimiser steps"})
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of the gradient's mean"})
    adam_beta2: float = field(default=0.99, metadata={"help": "decay of the gradient's square"})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the weights, per optimiser step"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 (also on a CPU) or fp16 (GPU only)"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})
    seed: int = field(default=0, metadata={"help": "of weights, crops, noise levels and noise"})

    # Output.
    output_dir: str = field(default="runs/x4", metadata={"help": "where everything is written"})
    checkpointing_steps: int = field(default=1000, metadata={"help": "optimiser steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder, or latest"})
    validation_steps: int = field(default=1000, metadata={"help": "optimiser steps between validations"})
    num_validation_images: int = field(default=4, metadata={"help": "pictures held out of the training data"})
    logging_steps: int = field(default=50, metadata={"help": "optimiser steps between lines of log.jsonl"})
    report_to: str | None = field(default=None, metadata={"help": "tensorboard, wandb, ..."})

    def __post_init__(self):
        for name in ("unet", "scheduler"):
            value = getattr(self, name)
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as error:
                raise ValueError(f"`{name}` is not JSON: {value!r} ({error}).") from error
            setattr(self, name, value)
        positive = (
            "resolution max_train_steps train_batch_size gradient_accumulation_steps checkpointing_steps "
            "checkpoints_total_limit validation_steps logging_steps learning_rate max_grad_norm"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.loss not in LOSSES:
            raise ValueError(f"`loss` must be one of {list(LOSSES)}, got {self.loss!r}.")
        if not 0 <= self.sigma_atom <= 1:
            raise ValueError(f"`sigma_atom` must lie in [0, 1], got {self.sigma_atom}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        if self.mixed_precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"`mixed_precision` must be no, bf16 or fp16, got {self.mixed_precision!r}.")
        if self.mixed_precision == "fp16" and not torch.cuda.is_available():
            raise ValueError("`mixed_precision=fp16` needs a GPU; on a CPU use bf16.")


class Progress:
    """What a checkpoint must remember beyond weights, optimiser and schedule."""

    def __init__(self):
        self.step = 0  # optimiser steps done
        self.images = 0  # crops seen, over all processes

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


def parse_settings(arguments: list[str]) -> Settings:
    """Defaults, then the YAML file behind `--config` (configs/x4.yaml if none is given), then the other flags."""
    parser = HfArgumentParser(Settings, description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="YAML file of the settings below")
    config = Path(parser.parse_known_args(arguments)[0].config)
    if not config.is_file():
        raise ValueError(f"`--config`: there is no file {config}.")
    chosen = yaml.safe_load(config.read_text()) or {}
    unknown = sorted(set(chosen) - {f.name for f in fields(Settings)})
    if unknown:
        raise ValueError(f"{config} has unknown settings {unknown}; `--help` lists the known ones.")
    parser.set_defaults(**chosen)
    (settings, _) = parser.parse_args_into_dataclasses(arguments)
    return settings


def main(arguments: list[str]) -> None:
    settings = parse_settings(arguments)
    output_dir = Path(settings.output_dir)

    # Accelerate, seed, and a look at the checkpoint to go on from.
    checkpoint = find_checkpoint(settings.resume_from_checkpoint, output_dir)
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=str(output_dir),
    )
    set_seed(settings.seed)

    # Network and scheduler.
    if settings.pretrained_model_name_or_path:
        pipe = FlowMatchSRPipeline.from_pretrained(settings.pretrained_model_name_or_path)
        unet, scheduler = pipe.unet.train(), pipe.scheduler
    else:
        unet = build(UNetSRModel, settings.unet, "unet")
        scheduler = build(FlowMatchSREulerScheduler, settings.scheduler, "scheduler")
    config = unet.config
    scale = config.scale_factor
    if config.lr_channels != 3 or scheduler.config.source == "prior":
        raise ValueError(
            "train_sr.py trains x4-like networks from LR pictures: `lr_channels: 3`, `source: lr` or noise."
        )
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.to(accelerator.device, memory_format=torch.channels_last)
    ema = EMAModel(unet.parameters(), decay=settings.ema_decay)
    ema.to(accelerator.device)

    # Data: the last pictures of a shuffle are held out.
    step_of_sizes = math.lcm(unet.size_multiple, scale)
    if settings.resolution % step_of_sizes:
        raise ValueError(f"`resolution` must be a multiple of {step_of_sizes} here, got {settings.resolution}.")
    with accelerator.main_process_first():
        images = load_images(settings.train_data_dir, settings.dataset_name)
    small = smaller_than(images, settings.resolution)
    if small:
        raise ValueError(
            f"{len(small)} of {len(images)} pictures are smaller than a crop of {settings.resolution}: "
            f"{', '.join(small[:5])}{' ...' if len(small) > 5 else ''}. Remove them or lower `resolution`."
        )
    if len(images) <= settings.num_validation_images:
        raise ValueError(
            f"{len(images)} pictures, of which `num_validation_images` holds out {settings.num_validation_images}: "
            "none is left to train on."
        )
    images = images.shuffle(seed=settings.seed)
    kept = len(images) - settings.num_validation_images
    held_out = images.select(range(kept, len(images))) if settings.num_validation_images else []
    images = images.select(range(kept))

    # Optimiser and its schedule, in optimiser steps whatever the number of processes.
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=1e-10,  # gradients of a mean over small residuals are small
    )
    lr_schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, lr_schedule, progress)
    if checkpoint:
        accelerator.load_state(str(checkpoint))
        accelerator.print(f"Resumed from {checkpoint}: {progress.step} steps, {progress.images:,} crops.")

    # The rest of the stream of crops.
    crops_per_step = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    steps_left = max(settings.max_train_steps - progress.step, 0)
    crops = CropDataset(
        images,
        settings.resolution,
        scale,
        seed=settings.seed,
        start=progress.images,
        length=steps_left * crops_per_step,
        cache_gib=settings.cache_gib,
    )
    loader = DataLoader(crops, settings.train_batch_size, num_workers=settings.dataloader_num_workers)
    loader = accelerator.prepare(loader)

    # Write down what is about to happen.
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "settings.yaml").write_text(yaml.safe_dump(asdict(settings), sort_keys=False))
    log(accelerator, output_dir, {"event": "start", "step": progress.step, **versions()})
    accelerator.init_trackers(
        "flowsr", {k: v for k, v in asdict(settings).items() if isinstance(v, (int, float, str))}
    )
    accelerator.print(
        f"{sum(p.numel() for p in unet.parameters()):,} parameters, {len(images)} pictures, "
        f"{crops_per_step} crops of {settings.resolution} per step, {steps_left} steps to go on {accelerator.device}."
    )

    def validate() -> None:
        """PSNR of the EMA weights on the held-out pictures, and a grid `bicubic | 1 step | 4 steps | original`."""
        if not accelerator.is_main_process or not settings.num_validation_images:
            return
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
        pipe = FlowMatchSRPipeline(accelerator.unwrap_model(unet).eval(), scheduler)
        pipe.set_progress_bar_config(disable=True)
        record, rows = {"event": "validation", "step": progress.step}, []
        source = CropDataset(held_out, settings.resolution, scale, 0, 0, 0, settings.cache_gib)
        for number in range(len(held_out)):
            hr, lr = source.pair(number)
            lr = Image.fromarray(lr)
            rows.append([np.asarray(lr.resize(hr.shape[1::-1], Image.BICUBIC)), hr])
            for steps in (1, 4):
                generator = torch.Generator(accelerator.device).manual_seed(number)
                sr = np.asarray(pipe(lr, num_inference_steps=steps, generator=generator).images[0])
                rows[-1].insert(-1, sr)
                record.setdefault(f"psnr_y_{steps}", []).append(psnr_y(sr, hr, scale))
        record = {k: round(float(np.mean(v)), 3) if isinstance(v, list) else v for k, v in record.items()}
        log(accelerator, output_dir, record)
        accelerator.print(record)
        pictures = output_dir / "validation"
        pictures.mkdir(exist_ok=True)
        side = min(256, *(length for row in rows for length in row[0].shape[:2]))
        grid = [np.concatenate([image[:side, :side] for image in row], axis=1) for row in rows]
        Image.fromarray(np.concatenate(grid)).save(pictures / f"step_{progress.step:06d}.png")
        ema.restore(unet.parameters())
        unet.train()

    # Train.
    unet.train()
    loss_function = LOSSES[settings.loss]
    guided = config.condition_dropout > 0
    bar = tqdm(
        total=settings.max_train_steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step",
        mininterval=5,
    )  # fmt: skip
    losses, since = [], time.perf_counter()
    for batch in loader:
        hr, lr, index = (batch[key] for key in ("hr", "lr", "index"))  # (b, 3, H, W), (b, 3, h, w), (b,)
        with accelerator.accumulate(unet):
            lr_up = torch.nn.functional.interpolate(lr, size=hr.shape[-2:], mode="bicubic", antialias=True)
            timestep = sigmas_for(index, settings.seed, settings.sigma_atom) * scheduler.config.num_train_timesteps
            source = scheduler.sample_source(lr_up, generator=generators_for(index, settings.seed))
            x_t = scheduler.add_noise(hr, source, timestep)
            drop = condition_dropped(index, settings.seed, config.condition_dropout) if guided else None
            prediction = unet(x_t, timestep, lr, drop_condition=drop).sample
            velocity = scheduler.predict_velocity(prediction, x_t, timestep)
            loss = loss_function(velocity, scheduler.get_velocity(hr, source, timestep))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(unet.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue

        lr_schedule.step()
        ema.step(unet.parameters())
        progress.step += 1
        progress.images += crops_per_step
        bar.update()
        last = progress.step == settings.max_train_steps
        saves = progress.step % settings.checkpointing_steps == 0 or last
        if progress.step % settings.logging_steps == 0 or saves:  # no checkpoint without a look at the loss
            mean = accelerator.gather(torch.stack(losses).mean()).mean().item()
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"The loss is {mean} at step {progress.step}. The last checkpoint is untouched; lower "
                    "`learning_rate` or use bf16, and go on with `--resume_from_checkpoint latest`."
                )
            rate = len(losses) / settings.gradient_accumulation_steps * crops_per_step / (time.perf_counter() - since)
            record = {
                "step": progress.step,
                "images": progress.images,
                "loss": round(mean, 6),
                "learning_rate": lr_schedule.get_last_lr()[0],
                "images_per_second": round(rate, 2),
            }
            log(accelerator, output_dir, record)
            accelerator.log({k: v for k, v in record.items() if k != "step"}, step=progress.step)
            bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.1f}")
            losses, since = [], time.perf_counter()
        if progress.step % settings.validation_steps == 0 or last:
            validate()
            since = time.perf_counter()
        if saves:
            save_checkpoint(accelerator, output_dir, progress.step, settings.checkpoints_total_limit)
    bar.close()

    # The finished pipeline: EMA weights, network and scheduler.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.copy_to(unet.parameters())
        FlowMatchSRPipeline(accelerator.unwrap_model(unet).eval(), scheduler).save_pretrained(output_dir)
        accelerator.print(f"The pipeline is in {output_dir}.")
    accelerator.end_training()


def build(cls: type, config: dict, name: str):
    """A component from its config; unknown keys are named, with those that exist."""
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    unknown = sorted(set(config) - set(known))
    if unknown:
        raise ValueError(f"`{name}` has unknown settings {unknown}; {cls.__name__} knows {known}.")
    return cls(**config)


def log(accelerator: Accelerator, output_dir: Path, record: dict) -> None:
    """Appends a line to log.jsonl."""
    if accelerator.is_main_process:
        with open(output_dir / "log.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def versions() -> dict:
    """What a reader needs to repeat a run."""
    import accelerate
    import diffusers

    found = {"flowsr": flowsr.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {**found, "accelerate": accelerate.__version__, "commit": commit.stdout.strip() or None}


def find_checkpoint(wanted: str | None, output_dir: Path) -> Path | None:
    """The folder to resume from: `latest` is the newest of the output folder, or nothing where there is none."""
    if wanted is None:
        return None
    if wanted != "latest":
        if not Path(wanted).is_dir():
            raise ValueError(f"`resume_from_checkpoint`: there is no folder {wanted}.")
        return Path(wanted)
    found = checkpoints(output_dir)
    return found[-1] if found else None


def checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, limit: int) -> None:
    """Writes checkpoint-STEP under another name, renames it when whole, then removes the oldest beyond `limit`."""
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"checkpoint-{step}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        for old in checkpoints(output_dir)[:-limit]:
            shutil.rmtree(old)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_sr.py: {error}")
