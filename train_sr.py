"""Trains a pipeline of flowsr, on one CPU as on a cluster.

    accelerate launch train_sr.py --train_data_dir PHOTOS                  # an encoder: configs/x4_encoder.yaml
    accelerate launch train_sr.py --dataset_name DIV2K                     # on the 800 pictures of DIV2K
    accelerate launch train_sr.py --config configs/x4_head.yaml --pretrained_model_name_or_path runs/x4_encoder ...
    accelerate launch train_sr.py --config configs/tiny.yaml --train_data_dir PHOTOS     # a first try, in seconds
    accelerate launch train_sr.py --train_data_dir PHOTOS --resume_from_checkpoint latest     # after any interruption
    accelerate launch train_sr.py --train_data_dir PHOTOS --pretrained_model_name_or_path OLD     # fine-tuning

`--help` lists the settings, which are those of flowsr/training/settings.py; what is minimised stands in objectives.py
beside it. Crop number k of the run, its time and its noise are functions of (seed, k) alone. So a resumed run is the
same as an uninterrupted one, and batch size, accumulation and processes only cut the same stream differently. The
finished pipeline lands in `--output_dir`, with the settings, the metrics and pictures of the validation beside it.
"""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from flowsr.components import pipeline_from
from flowsr.evaluation import plot_training
from flowsr.hub import claim, publish
from flowsr.lpips import SqueezeLPIPS
from flowsr.metrics import load_lpips
from flowsr.training import checkpoints
from flowsr.training.averages import Averages
from flowsr.training.crops import CropDataset, Cropping, CropStream, as_images
from flowsr.training.hold_out import hold_out, pairs_of
from flowsr.training.interruptions import STOPPED, Interruption, leave_signals_to_the_trainer
from flowsr.training.objectives import Diffusion, FlowMatching, PosteriorMean
from flowsr.training.optimizers import MAX_NORM, apply_rate, make_optimizer
from flowsr.training.pictures import check_classes, load_images, with_lr
from flowsr.training.record import Stopwatch, log, summary, versions
from flowsr.training.settings import check_pipeline, parse_settings
from flowsr.training.strategies import STRICT_ABOUT_LAYOUT, fit_strategy, leave_together
from flowsr.training.teacher import answer_all, teacher_from
from flowsr.training.trainable import add_adapters, train_part, trainable
from flowsr.training.validation import validate

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "x4_encoder.yaml"


def main(arguments: list[str]) -> None:
    settings = parse_settings(arguments, DEFAULT_CONFIG, __doc__)
    output_dir = Path(settings.output_dir)
    torch.set_flush_denormal(True)  # before the threads start: SiLU's far tails make convolutions ten times slower

    # Accelerate, seed, and a look at the checkpoint to go on from.
    checkpoint = checkpoints.find(settings.resume_from_checkpoint, output_dir)
    changed = checkpoints.changed_settings(checkpoints.settings_of(checkpoint), settings) if checkpoint else []
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=str(output_dir),
    )
    fit_strategy(accelerator, settings)
    set_seed(settings.seed)
    interruption = Interruption()

    # Pipeline, network and scheduler.
    pipe = pipeline_from(settings.pipeline, settings.unet, settings.scheduler, settings.pretrained_model_name_or_path)
    check_pipeline(settings, pipe)
    unet = pipe.unet.train()
    is_flow, upscales = hasattr(pipe.scheduler, "sample_source"), unet.config.lr_channels is not None
    scale = pipe.scale_factor if upscales else 1
    lpips_of_pictures = load_lpips(settings.lpips_weights)[0] if settings.lpips_weights else None
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    train_part(unet, settings.train)
    if settings.lora_rank:
        add_adapters(unet, settings.lora_rank)
    unet.to(accelerator.device)
    if accelerator.distributed_type not in STRICT_ABOUT_LAYOUT:
        unet.to(memory_format=torch.channels_last)
    ema_unet = copy.deepcopy(unet).eval()  # the pipeline's own network, whole on every device: it takes the averages
    pipe.register_modules(unet=ema_unet)
    for frozen in (getattr(pipe, "prior", None), getattr(pipe, "image_encoder", None)):
        if frozen is not None:
            frozen.requires_grad_(False).to(accelerator.device)

    # Pictures to train on, and those held out.
    classes = getattr(unet.config, "num_class_embeds", None)
    with accelerator.main_process_first():
        images = load_images(settings.train_data_dir, settings.dataset_name, classes is not None, settings.streaming)
    if classes is not None:
        check_classes(images, classes)
    if settings.lr_data_dir:
        images = with_lr(images, settings.lr_data_dir, scale)
    images, held_out = hold_out(images, settings, scale, accelerator.print)
    cropping = Cropping(
        settings.resolution, scale, settings.seed, unet.config.out_channels, settings.degradation,
        settings.augmentation, settings.resize_to,
    )  # fmt: skip
    pairs = pairs_of(held_out, cropping, settings.small_images) if upscales else []

    # Optimiser and its schedule, in optimiser steps whatever the number of processes; the averages of the weights.
    crops_per_step = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    total_steps = settings.max_train_steps
    if settings.num_train_epochs is not None:
        total_steps = min(total_steps, math.ceil(settings.num_train_epochs * len(images) / crops_per_step))
    optimizer = make_optimizer(settings.optimizer, unet, settings.learning_rate, settings.adam)
    lr_schedule = get_scheduler(
        settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps, num_training_steps=total_steps
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema = Averages(unet, settings.ema_decay)
    progress = checkpoints.Progress()
    accelerator.register_for_checkpointing(ema, lr_schedule, progress)
    if checkpoint:
        checkpoints.load(accelerator, checkpoint, progress, total_steps)
        ema.decay = settings.ema_decay
        apply_rate(lr_schedule, settings.learning_rate, settings.adam)
        accelerator.print(f"Resumed from {checkpoint}: {progress.step} steps, {progress.images:,} crops.")
        for line in changed:
            accelerator.print(f"Changed from here on: {line}.")

    # The rest of the stream of crops.
    steps_left = max(total_steps - progress.step, 0)
    length = steps_left * crops_per_step
    if settings.streaming:
        crops = CropStream(images, cropping, progress.images, length, settings.small_images, settings.train_batch_size)
    else:
        overfit = crops_per_step if settings.overfit else None
        crops = CropDataset(
            images, cropping, progress.images, length, overfit=overfit, small_images=settings.small_images
        )
        if settings.teacher:
            crops.teacher = teacher_from(settings.teacher, scale, output_dir.parent / "teacher", accelerator.device)
            answer_all(crops, accelerator.process_index, accelerator.num_processes, not accelerator.is_main_process)
            accelerator.wait_for_everyone()
    loader = DataLoader(
        crops, settings.train_batch_size, num_workers=settings.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
    )  # fmt: skip
    loader = accelerator.prepare_data_loader(loader, device_placement=False)

    # What is minimised.
    if settings.train == "encoder":
        objective = PosteriorMean(pipe, settings)
    elif is_flow:
        lpips = SqueezeLPIPS(settings.lpips_weights).to(accelerator.device) if settings.perceptual_weight else None
        objective = FlowMatching(pipe, settings, lpips, accelerator.autocast)
    else:
        objective = Diffusion(pipe, settings)

    # Write down what is about to happen, and make sure of the place where it is to go.
    if accelerator.is_main_process:
        if settings.push_to_hub:
            claim(settings.push_to_hub)
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.write_settings(asdict(settings), output_dir)
    log(accelerator, output_dir, {"event": "start", "step": progress.step, **versions(Path(__file__).parent)})
    accelerator.init_trackers(
        "flowsr", {k: v for k, v in asdict(settings).items() if isinstance(v, (int, float, str))}
    )
    accelerator.print(
        f"{sum(p.numel() for p in trainable(unet)):,} parameters to train, "
        f"{'a stream of' if settings.streaming else len(images)} pictures, {crops_per_step} crops of "
        f"{settings.resolution} per step, {steps_left} steps to go on {accelerator.device}."
    )

    # Train.
    unet.train()
    bar = tqdm(
        total=total_steps, initial=progress.step, disable=not accelerator.is_main_process, unit="step", mininterval=5
    )
    losses, norms, watch = [], [], Stopwatch()
    for batch in loader:
        batch = as_images(
            {name: x if name == "index" else x.to(accelerator.device, non_blocking=True) for name, x in batch.items()}
        )
        with accelerator.accumulate(unet):
            example = objective.example(batch)  # a point x_t on the way from image to source, at a time of each crop
            prediction = unet(example.x_t, example.timestep, **example.conditions).sample
            loss = objective.loss(prediction, example)  # how far its velocity, noise or image is from the true one
            if settings.unroll_weight:  # and the image at a point that sampling itself comes by
                example = objective.unrolled(unet, example)
                image = unet(example.x_t, example.timestep, **example.conditions).sample
                loss = loss + objective.unrolled_loss(image, example)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trainable(unet), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue
        if not accelerator.optimizer_step_was_skipped:  # as fp16 does while it looks for its loss scale
            lr_schedule.step()
            norms.append(norm)
        ema.step(trainable(unet))
        progress.step += 1
        progress.images += crops_per_step
        bar.update()

        # Log, and look at all that is about to be kept.
        stopped, last = interruption.agreed(), progress.step == total_steps
        saves = progress.step % settings.checkpointing_steps == 0 or last or stopped
        validates = (progress.step % settings.validation_steps == 0 or last) and not stopped
        if progress.step % settings.logging_steps == 0 or saves or validates:
            mean, norm, largest = summary(accelerator, losses, norms, trainable(unet))
            if not math.isfinite(mean + norm + largest):
                bar.close()
                raise FloatingPointError(
                    f"The loss is {mean} at step {progress.step}, the norm of the gradient {norm}, the largest weight "
                    f"{largest}. The last checkpoint is untouched; lower `learning_rate` or use bf16, and go on with "
                    "`--resume_from_checkpoint latest`."
                )
            rate = len(losses) / settings.gradient_accumulation_steps * crops_per_step / watch.lap()
            record = {
                "step": progress.step,
                "images": progress.images,
                "loss": round(mean, 6),
                "gradient_norm": float(f"{norm:.4g}"),
                "learning_rate": lr_schedule.get_last_lr()[0],
                "images_per_second": round(rate, 2),
            }
            log(accelerator, output_dir, record)
            accelerator.log({k: v for k, v in record.items() if k != "step"}, step=progress.step)
            bar.set_postfix(loss=f"{mean:.4f}", images_per_s=f"{rate:.1f}")
            losses, norms = [], []

        # Validate, save, or stop.
        with watch.paused():
            if validates and (pairs if upscales else held_out):
                ema.copy_to(trainable(ema_unet))
                validate(accelerator, pipe, settings, progress, pairs, lpips_of_pictures)
            if saves:
                checkpoints.save(accelerator, output_dir, progress.step, asdict(settings))
        if stopped:
            accelerator.print(
                f"Stopped by a signal after step {progress.step}; go on with `--resume_from_checkpoint latest`."
            )
            leave_together(accelerator)
            sys.exit(STOPPED)
    bar.close()

    # The finished pipeline: averaged weights, network and scheduler.
    accelerator.wait_for_everyone()
    ema.copy_to(trainable(ema_unet))
    if accelerator.is_main_process:
        if settings.lora_rank:
            ema_unet.fuse_lora()
            ema_unet.unload_lora()
        plot_training(output_dir / "metrics.jsonl", output_dir / "curves.png")
        pipe.save_pretrained(output_dir)
        accelerator.print(f"The pipeline is in {output_dir}.")
        if settings.push_to_hub:
            publish(output_dir, settings.push_to_hub)
    leave_together(accelerator)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_sr.py: {error}")
