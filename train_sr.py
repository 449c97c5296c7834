"""Trains a pipeline of flowsr, on one CPU as on a cluster.

    accelerate launch train_sr.py --train_data_dir PHOTOS                  # an encoder: configs/x4_encoder.yaml
    accelerate launch train_sr.py --dataset_name DIV2K                     # on the 800 pictures of DIV2K
    accelerate launch train_sr.py --config configs/x4_head.yaml --pretrained_model_name_or_path runs/x4_encoder ...
    accelerate launch train_sr.py --config configs/tiny.yaml --train_data_dir PHOTOS     # a first try, in seconds
    accelerate launch train_sr.py --train_data_dir PHOTOS --resume_from_checkpoint latest     # after any interruption
    accelerate launch train_sr.py --train_data_dir PHOTOS --pretrained_model_name_or_path OLD     # fine-tuning

Crop number k of the run, its time and its noise are functions of (seed, k) alone. So a resumed run is the same as an
uninterrupted one, and batch size, accumulation and processes only cut the same stream differently. The finished
pipeline lands in `--output_dir`, with the settings, the metrics and pictures of the validation beside it.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import diffusers
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

import flowsr
from flowsr import FlowMatchSREulerScheduler, checkpoints
from flowsr.averages import Averages, train_part, trainable
from flowsr.components import pipeline_from
from flowsr.data import (
    CropDataset,
    Cropping,
    CropStream,
    as_images,
    check_classes,
    decoded,
    load_images,
    unfit_pictures,
    with_lr,
)
from flowsr.degradations import CHAINS, degrade
from flowsr.hub import clear_errors, publish
from flowsr.lpips import SqueezeLPIPS
from flowsr.metrics import load_lpips
from flowsr.objectives import (
    LAWS,
    LOSSES,
    colour_loss,
    condition_dropped,
    frequency_loss,
    generators_for,
    moved_off_the_grid,
    perceptual_loss,
    sigmas_for,
    timesteps_for,
    unrolling_for,
)
from flowsr.optimizers import OPTIMIZERS, make_optimizer
from flowsr.picture_file import one_line
from flowsr.pipelines.conditioning import estimate
from flowsr.teacher import teacher_from
from flowsr.validation import Pair, coupling_grid, generated_grid, measure, plot_curves

DEFAULT_CONFIG = Path(__file__).resolve().parent / "configs" / "x4_encoder.yaml"
STRICT_ABOUT_LAYOUT = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # weights in channels_last are refused
CONFIGS = ("pipeline", "unet", "scheduler")  # settings that are mappings, or JSON on the command line
# What a resumed run must not change: network, optimiser, data and seed. All else is applied from then on.
FIXED = (
    "pipeline unet scheduler pretrained_model_name_or_path lora_rank train optimizer seed train_data_dir dataset_name "
    "lr_data_dir streaming small_images resolution resize_to center_crop augmentation degradation overfit "
    "num_validation_images"
).split()
OF_THE_CALL = ("output_dir", "resume_from_checkpoint")  # say nothing about the training
SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = 128 + signal.SIGTERM  # exit status after a signal, as shells have it


@dataclass
class Settings:
    """Everything that a run depends on. Flags override the `--config` file; the result is written to the output."""

    # Data.
    train_data_dir: list[str] = field(default_factory=list, metadata={"help": "folders (or zips) of pictures"})
    dataset_name: str | None = field(
        default=None, metadata={"help": "or: DIV2K, the URL of a zip, or a data set on the Hub, column `image`"}
    )
    lr_data_dir: str | None = field(
        default=None, metadata={"help": "folder of LR pictures with the names of the HR; without it they are made"}
    )
    streaming: bool = field(default=False, metadata={"help": "read the data from start to end, storing nothing"})
    small_images: str = field(
        default="refuse", metadata={"help": "smaller than a crop, or unreadable: refuse or skip"}
    )
    resolution: int = field(default=192, metadata={"help": "side of a training crop, HR pixels"})
    resize_to: int | None = field(default=None, metadata={"help": "resize shorter sides to so many pixels first"})
    center_crop: bool = field(default=False, metadata={"help": "the middle of each picture, not a random place"})
    augmentation: str = field(default="turns", metadata={"help": "turns (8 symmetries), flip or none"})
    degradation: str = field(default="bicubic", metadata={"help": f"bicubic, {' or '.join(CHAINS)}"})
    overfit: bool = field(default=False, metadata={"help": "the first batch, over and over: can it be learned?"})
    cache_gib: float = field(default=8.0, metadata={"help": "decoded pictures kept in memory per loader, GiB"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "loader processes; 0 suits cached pictures"})

    # What is trained; JSON on the command line, a mapping in the file, `_class_name` as in diffusers' configs.
    pipeline: str = field(default="{}", metadata={"help": "config of the pipeline, FlowMatchSRPipeline by default"})
    unet: str = field(default="{}", metadata={"help": "config of the network, UNetSRModel by default"})
    scheduler: str = field(default="{}", metadata={"help": "config of the scheduler of flowsr or of diffusers"})
    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "start from this pipeline (its config replaces the three above)"}
    )
    lora_rank: int = field(default=0, metadata={"help": "train adapters of this rank only (PEFT), merged at the end"})
    train: str = field(default="all", metadata={"help": "all of the network; or its encoder or head alone"})

    # Objective.
    loss: str = field(default="l1", metadata={"help": f"distance of predictions: {', '.join(LOSSES)}"})
    endpoint_loss: str | None = field(
        default=None, metadata={"help": "another distance for a flow's crops at sigma = 1, such as rmse"}
    )
    frequency_weight: float = field(
        default=0.0, metadata={"help": "of the Fourier coefficients' L1, for `train: encoder`; 0: none"}
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "for `train: encoder`: dat_light, a checkpoint that spandrel reads, a folder of ready pictures "
            "with the names of the training pictures, or a model as of `prior`"
        },
    )
    teacher_weight: float = field(default=1.0, metadata={"help": "the target is so much teacher, the rest HR"})
    teacher_cache: str = field(default="runs/teacher", metadata={"help": "where a teacher's answers are kept"})
    colour_weight: float = field(default=0.0, metadata={"help": "of the LR's colours in the image estimate; 0: none"})
    perceptual_weight: float = field(
        default=0.0, metadata={"help": "of (1 - sigma) LPIPS of the image estimate; 0: none"}
    )
    lpips_weights: str | None = field(
        default=None,
        metadata={"help": "safetensors of LPIPS v0.1 with SqueezeNet: for `perceptual_weight`, and for validation"},
    )
    unroll_weight: float = field(
        default=0.0,
        metadata={"help": "for `train: head`: of L1 at states of the sampler itself, where LPIPS is then taken too"},
    )
    timestep_law: str = field(default="stratified", metadata={"help": f"of the times: {', '.join(LAWS)}"})
    sigma_atom: float = field(default=0.4, metadata={"help": "share of a flow's crops at sigma = 1, the one step"})

    # Optimisation. Steps are optimiser steps.
    max_train_steps: int = field(default=20000, metadata={"help": "optimiser steps at most"})
    num_train_epochs: float | None = field(default=None, metadata={"help": "passes over the pictures at most"})
    train_batch_size: int = field(default=8, metadata={"help": "crops per process and micro-batch"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "micro-batches per optimiser step"})
    optimizer: str = field(default="adamw", metadata={"help": f"{', '.join(OPTIMIZERS)} (bitsandbytes' 8 bits)"})
    learning_rate: float = field(default=8e-4, metadata={"help": "peak, after the warm-up"})
    lr_scheduler: str = field(default="cosine", metadata={"help": "any name of diffusers.optimization"})
    lr_warmup_steps: int = field(default=300, metadata={"help": "optimiser steps"})
    adam_beta1: float = field(default=0.9, metadata={"help": "decay of the gradient's mean"})
    adam_beta2: float = field(default=0.99, metadata={"help": "decay of the gradient's square"})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "AdamW's"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradients are clipped to this norm"})
    ema_decay: float = field(default=0.999, metadata={"help": "of the weights, per optimiser step"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16, fp16 (GPU only) or auto"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})
    seed: int = field(default=0, metadata={"help": "of weights, crops, times and noise"})

    # Output.
    output_dir: str = field(default="runs/x4", metadata={"help": "where everything is written"})
    checkpointing_steps: int = field(default=1000, metadata={"help": "optimiser steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "checkpoints kept, beside the best pipeline"})
    resume_from_checkpoint: str | None = field(default=None, metadata={"help": "a checkpoint folder, or latest"})
    validation_steps: int = field(default=1000, metadata={"help": "optimiser steps between validations"})
    validation_inference_steps: list[int] = field(
        default_factory=lambda: [1, 4], metadata={"help": "steps of the pipeline; the first decides what is best"}
    )
    num_validation_images: int = field(default=4, metadata={"help": "pictures held out of the training data"})
    logging_steps: int = field(default=50, metadata={"help": "optimiser steps between lines of metrics.jsonl"})
    report_to: str | None = field(default=None, metadata={"help": "tensorboard, wandb, ..."})
    push_to_hub: str | None = field(default=None, metadata={"help": "USER/NAME that the finished pipeline goes to"})

    def __post_init__(self):
        for name in CONFIGS:
            value = getattr(self, name)
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as error:
                raise ValueError(f"`{name}` is not JSON: {value!r} ({error}).") from error
            setattr(self, name, value)
        positive = (
            "resolution max_train_steps train_batch_size gradient_accumulation_steps checkpointing_steps "
            "checkpoints_total_limit validation_steps logging_steps learning_rate max_grad_norm resize_to "
            "num_train_epochs"
        )
        for name in positive.split():
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        not_negative = (
            "colour_weight perceptual_weight frequency_weight unroll_weight lora_rank cache_gib "
            "num_validation_images lr_warmup_steps adam_weight_decay dataloader_num_workers"
        )
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        choices = {
            "loss": LOSSES,
            "endpoint_loss": (None, *LOSSES),
            "timestep_law": LAWS,
            "degradation": ("bicubic", *CHAINS),
            "augmentation": ("turns", "flip", "none"),
            "small_images": ("refuse", "skip"),
            "optimizer": OPTIMIZERS,
            "train": ("all", "encoder", "head"),
            "mixed_precision": ("no", "bf16", "fp16", "auto"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        for name in ("sigma_atom", "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(self, name)}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must lie in [0, 2^32), got {self.seed}.")
        if not self.learning_rate <= 1e30:
            raise ValueError(
                f"`learning_rate` must be at most 1e30, where float32 overflows, got {self.learning_rate}."
            )
        if self.lr_data_dir and (self.streaming or self.resize_to or self.degradation != "bicubic"):
            raise ValueError(
                "`lr_data_dir` gives the LR of whole pictures: leave out `streaming`, `resize_to` and `degradation`."
            )
        if self.resize_to is not None and self.resize_to < self.resolution:
            raise ValueError(
                f"`resize_to` makes the shorter sides {self.resize_to} pixels long, but a crop has {self.resolution}: "
                "raise `resize_to` or lower `resolution`."
            )
        if (self.teacher or self.frequency_weight) and self.train != "encoder":
            raise ValueError(
                "`teacher` and `frequency_weight` are for the posterior mean: set `train: encoder`, got "
                f"{self.train!r}."
            )
        if self.unroll_weight and self.train != "head":
            raise ValueError(f"`unroll_weight` is for the head: set `train: head`, got {self.train!r}.")
        if self.teacher and (self.degradation != "bicubic" or self.streaming):
            raise ValueError("`teacher` answers to whole pictures: set `degradation: bicubic`, `streaming: false`.")
        if not self.validation_inference_steps or min(self.validation_inference_steps) < 1:
            raise ValueError(f"`validation_inference_steps` must be positive, got {self.validation_inference_steps}.")
        if self.mixed_precision == "auto":
            self.mixed_precision = "bf16" if has_fast_bf16() else "no"
        if self.mixed_precision == "fp16" and not has_gpu():
            raise ValueError("`mixed_precision=fp16` needs a GPU; on a CPU use bf16.")
        if self.perceptual_weight and not self.lpips_weights:
            raise ValueError("`perceptual_weight` needs `lpips_weights`, a safetensors file; or set it to 0.")
        if self.report_to not in (None, "all", *map(str, get_available_trackers())):
            raise ValueError(
                f"`report_to: {self.report_to}` needs the package: pip install {self.report_to}; or leave it out."
            )
        if self.lpips_weights and not Path(self.lpips_weights).is_file():
            raise ValueError(f"`lpips_weights`: there is no file {self.lpips_weights}.")


def leave_signals_to_the_trainer(worker: int) -> None:
    """A signal to the whole group, as by Ctrl-C, must not end the loaders before the last step."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def has_gpu() -> bool:
    return torch.cuda.is_available()


def has_fast_bf16() -> bool:
    """Whether GPU or CPU has instructions for it; on a CPU without, bfloat16 is several times slower than float32."""
    if has_gpu():
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class Progress:
    """What a checkpoint must remember beyond weights, optimiser and schedule."""

    def __init__(self):
        self.step = 0  # optimiser steps done
        self.images = 0  # crops seen, over all processes
        self.best = -math.inf  # of the validations, as `validation_inference_steps` has it

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)


class Stopwatch:
    """Seconds of training alone."""

    def __init__(self):
        self.start = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """For what is not training, such as a validation."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin

    def lap(self) -> float:
        """Since the start or the last lap."""
        now = time.perf_counter()
        seconds, self.start = now - self.start, now
        return seconds


def parse_settings(arguments: list[str]) -> Settings:
    """Defaults, then the YAML file of `--config` (by default configs/x4_encoder.yaml), then the other flags."""
    parser = HfArgumentParser(Settings, description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(DEFAULT_CONFIG), help="YAML file of the settings below")
    config = Path(parser.parse_known_args(arguments)[0].config)
    if not config.is_file():
        raise ValueError(f"`--config`: there is no file {config}.")
    chosen = read_config(config)
    flags = {argument.split("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")}
    for given, other in (("train_data_dir", "dataset_name"), ("dataset_name", "train_data_dir")):
        if given in flags:
            chosen.pop(other, None)  # the flag replaces the file's pictures, whichever way those are named
    if "pretrained_model_name_or_path" in flags:
        if beside := sorted(flags.intersection(CONFIGS)):
            raise ValueError(
                f"`--pretrained_model_name_or_path` brings its own configs: leave out {', '.join(beside)}, or train "
                "from the start."
            )
        chosen = {name: value for name, value in chosen.items() if name not in CONFIGS}
    elif chosen.get("pretrained_model_name_or_path") and (beside := sorted((flags | set(chosen)) & set(CONFIGS))):
        raise ValueError(
            f"`pretrained_model_name_or_path` of {config} brings its own configs: leave out {', '.join(beside)}."
        )
    parser.set_defaults(**chosen)
    (settings, _) = parser.parse_args_into_dataclasses(arguments)
    return settings


def read_config(file: Path) -> dict:
    """The settings of a YAML file, in their types; a single value stands for a list of one.

    Raises:
        ValueError: for what is not YAML, unknown settings, and values of another type.
    """
    try:
        chosen = yaml.safe_load(file.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not YAML: {one_line(error)}.") from error
    if not isinstance(chosen, dict):
        raise ValueError(f"{file} must hold lines of `setting: value`, found {chosen!r:.60}.")
    types, names = get_type_hints(Settings), Settings.__annotations__
    if unknown := sorted(map(str, chosen.keys() - types.keys())):
        raise ValueError(f"{file} has unknown settings {unknown}; `--help` lists the known ones.")
    for name, value in chosen.items():
        if name in CONFIGS and isinstance(value, dict):
            continue
        try:
            chosen[name] = as_type(value, types[name])
        except (TypeError, ValueError):
            way_out = "; put it in quotes" if "str" in names[name] and not isinstance(value, (dict, list)) else ""
            raise ValueError(f"{file}: `{name}` must be {names[name]}, got {value!r}{way_out}.") from None
    return chosen


def as_type(value, wanted: type):
    """A value of a YAML file as one of a setting's type; YAML takes 1e-4 for text.

    Raises:
        TypeError, ValueError: if it is none.
    """
    if get_origin(wanted) is list:
        return [as_type(each, *get_args(wanted)) for each in (value if isinstance(value, list) else [value])]
    allowed = get_args(wanted) or (wanted,)
    if float in allowed and type(value) in (int, str):
        return float(value)
    if type(value) not in allowed:  # not isinstance, for which True is an int
        raise TypeError
    return value


def main(arguments: list[str]) -> None:
    settings = parse_settings(arguments)
    output_dir = Path(settings.output_dir)
    torch.set_flush_denormal(True)  # before the threads start: SiLU's far tails make convolutions ten times slower

    # Accelerate, seed, and a look at the checkpoint to go on from.
    checkpoint = checkpoints.find(settings.resume_from_checkpoint, output_dir)
    changed = changed_settings(checkpoints.settings_of(checkpoint), settings) if checkpoint else []
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=settings.report_to,
        project_dir=str(output_dir),
    )
    fit_strategy(accelerator, settings)
    set_seed(settings.seed)
    interrupted: list[int] = []  # signals, answered after the optimiser step that they fall in, by all processes
    for number in SIGNALS:  # a handler can interrupt itself, so it takes no lock
        signal.signal(number, lambda received, _: (interrupted.append(received), accelerator.set_trigger()))

    # Pipeline, network and scheduler.
    pipe = pipeline_from(settings.pipeline, settings.unet, settings.scheduler, settings.pretrained_model_name_or_path)
    unet, scheduler = pipe.unet.train(), pipe.scheduler
    is_flow = isinstance(scheduler, FlowMatchSREulerScheduler)
    upscales = unet.config.lr_channels is not None
    scale = pipe.scale_factor if upscales else 1
    check_objective(settings, pipe, is_flow, upscales)
    distance_of_pictures = load_lpips(settings.lpips_weights)[0] if settings.lpips_weights else None
    if settings.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    train_part(unet, settings.train)
    if settings.lora_rank:
        add_adapters(unet, settings.lora_rank)
    unet.to(accelerator.device)
    if accelerator.distributed_type not in STRICT_ABOUT_LAYOUT:
        unet.to(memory_format=torch.channels_last)
    shown = copy.deepcopy(unet).eval()  # the pipeline's own network, whole on every device: it takes the averages
    pipe.register_modules(unet=shown)

    # Data: the last pictures of a shuffle (the first of a stream) are held out.
    step_of_sizes = math.lcm(unet.size_multiple, scale)
    if settings.resolution % step_of_sizes:
        raise ValueError(f"`resolution` must be a multiple of {step_of_sizes} here, got {settings.resolution}.")
    cropping = Cropping(
        settings.resolution, scale, settings.seed, unet.config.out_channels, settings.degradation,
        settings.augmentation, settings.center_crop, settings.resize_to,
    )  # fmt: skip
    classes = getattr(unet.config, "num_class_embeds", None)
    with accelerator.main_process_first():
        images = load_images(settings.train_data_dir, settings.dataset_name, classes is not None, settings.streaming)
    if classes is not None:
        check_classes(images, classes)
    if settings.lr_data_dir:
        images = with_lr(images, settings.lr_data_dir, scale)
    images, held_out = hold_out(images, settings, scale, accelerator)

    # Optimiser and its schedule, in optimiser steps whatever the number of processes.
    crops_per_step = settings.train_batch_size * settings.gradient_accumulation_steps * accelerator.num_processes
    total_steps = settings.max_train_steps
    if settings.num_train_epochs is not None:
        if settings.streaming:
            raise ValueError("The length of a stream is not known: give `max_train_steps`, not `num_train_epochs`.")
        total_steps = min(total_steps, math.ceil(settings.num_train_epochs * len(images) / crops_per_step))
    optimizer = make_optimizer(
        settings.optimizer, unet, settings.learning_rate, (settings.adam_beta1, settings.adam_beta2),
        settings.adam_weight_decay,
    )  # fmt: skip
    lr_schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=total_steps,
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    ema = Averages(unet, settings.ema_decay)
    progress = Progress()
    accelerator.register_for_checkpointing(ema, lr_schedule, progress)
    if checkpoint:
        try:
            accelerator.load_state(str(checkpoint))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{checkpoint} does not fit the network or the optimizer ({one_line(error)}): resume with the "
                "settings of its run, or start anew from its pipeline by `--pretrained_model_name_or_path`."
            ) from error
        if progress.step > total_steps:
            raise ValueError(
                f"{checkpoint} has done {progress.step} steps, but the run is to end after {total_steps}: raise "
                "`max_train_steps` or `num_train_epochs`."
            )
        ema.decay = settings.ema_decay
        apply_rate(lr_schedule, settings)
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
            images, cropping, progress.images, length, settings.cache_gib, overfit, small_images=settings.small_images
        )
        if settings.teacher:
            crops.teacher = teacher_from(settings.teacher, scale, settings.teacher_cache, accelerator.device)
            mine = range(accelerator.process_index, len(images), accelerator.num_processes)
            with ThreadPoolExecutor() as pool:  # what the network answers is kept for all processes
                answers = pool.map(crops.read, mine)
                list(tqdm(answers, "teacher", len(mine), unit="picture", disable=not accelerator.is_main_process))
            accelerator.wait_for_everyone()
    loader = DataLoader(
        crops, settings.train_batch_size, num_workers=settings.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
    )  # fmt: skip
    loader = accelerator.prepare_data_loader(loader, device_placement=False)

    # Write down what is about to happen, and make sure of the place where it is to go.
    if settings.push_to_hub and accelerator.is_main_process:
        from huggingface_hub import create_repo

        with clear_errors(settings.push_to_hub, "cannot take the finished pipeline"):
            create_repo(settings.push_to_hub, exist_ok=True)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.write_settings(asdict(settings), output_dir)
    log(accelerator, output_dir, {"event": "start", "step": progress.step, **versions()})
    accelerator.init_trackers(
        "flowsr", {k: v for k, v in asdict(settings).items() if isinstance(v, (int, float, str))}
    )
    accelerator.print(
        f"{sum(p.numel() for p in trainable(unet)):,} parameters to train, "
        f"{'a stream of' if settings.streaming else len(images)} pictures, {crops_per_step} crops of "
        f"{settings.resolution} per step, {steps_left} steps to go on {accelerator.device}."
    )

    # What is minimised. Images are in the data range of the pipeline, which is that of the network.
    distance = LOSSES[settings.loss]
    distance_at_end = LOSSES[settings.endpoint_loss or settings.loss]
    prior, image_encoder = (getattr(pipe, name, None) for name in ("prior", "image_encoder"))
    for frozen in (prior, image_encoder):
        if frozen is not None:
            frozen.requires_grad_(False).to(accelerator.device)
    lpips = SqueezeLPIPS(settings.lpips_weights).to(accelerator.device) if settings.perceptual_weight else None
    low, high = getattr(pipe.config, "data_range", (-1.0, 1.0))
    dropout = getattr(shown.config, "condition_dropout", 0.0)

    def to_data_range(x: torch.Tensor) -> torch.Tensor:
        return low + (x + 1) * (high - low) / 2

    def conditions_of(batch: dict) -> dict:
        """What the network is told beside state and time."""
        told = {}
        dropped = condition_dropped(batch["index"], settings.seed, dropout) if dropout else None
        dropped = dropped if dropped is None else dropped.to(accelerator.device)
        if upscales:
            told["lr"] = to_data_range(batch["lr"])
            if dropout:
                told["drop_condition"] = dropped
        if image_encoder is not None:
            told["encoder_hidden_states"] = pipe.encode_image(batch["lr"])
        if classes is not None:
            label = batch["label"]
            told["class_labels"] = label if dropped is None else torch.where(dropped, classes, label)
        return told

    def posterior_mean_loss(batch: dict) -> torch.Tensor:
        """Distance of the encoder's picture and HR, a teacher's answer (Hinton et al. 2015), or between the two."""
        target = batch["hr"]
        if settings.teacher:
            target = torch.lerp(target, batch["teacher"], settings.teacher_weight)
        target = to_data_range(target)
        mean = unet(None, None, to_data_range(batch["lr"])).sample
        loss = distance(mean, target).mean()
        if settings.frequency_weight:
            loss = loss + settings.frequency_weight * frequency_loss(mean, target)
        return loss

    def flow_matching_loss(batch: dict) -> torch.Tensor:
        """Lipman et al. 2023, eq. 23; from a source that depends on the data, Albergo et al. 2024."""
        hr, index, conditions = to_data_range(batch["hr"]), batch["index"], conditions_of(batch)
        lr_up = upsampled(conditions["lr"], hr) if upscales else torch.zeros_like(hr)
        sigma = sigmas_for(index, settings.seed, settings.sigma_atom, law=settings.timestep_law).to(hr.device)
        timestep = sigma * scheduler.config.num_train_timesteps
        start = to_data_range(estimate(prior, batch["lr"], scale)) if prior is not None else None
        if settings.train == "head":  # whose encoder does not change: that of the pipeline, whole on every device
            with torch.no_grad(), accelerator.autocast():
                conditions["encoding"] = pipe.unet.encode(conditions["lr"])
            start = conditions["encoding"].mean
        source = scheduler.sample_source(lr_up, start, generator=generators_for(index, settings.seed, hr.device))
        x_t = scheduler.add_noise(hr, source, timestep)
        prediction = unet(x_t, timestep, **conditions).sample
        velocity = scheduler.predict_velocity(prediction, x_t, timestep)
        target = scheduler.get_velocity(hr, source, timestep)
        loss = torch.where(sigma == 1, distance_at_end(velocity, target), distance(velocity, target)).mean()
        if settings.unroll_weight:
            image = own_state_estimate(source, conditions, index)
            loss = loss + settings.unroll_weight * distance(image, hr).mean()
            if settings.perceptual_weight:
                seen = moved_off_the_grid(index, settings.seed, pipe.from_data_range(image), batch["hr"])
                loss = loss + settings.perceptual_weight * lpips(*seen).mean()
            return loss
        if settings.perceptual_weight or settings.colour_weight:
            image = scheduler.predict_sample(prediction, x_t, timestep)
        if settings.perceptual_weight:
            seen = moved_off_the_grid(index, settings.seed, pipe.from_data_range(image), batch["hr"])
            loss = loss + settings.perceptual_weight * perceptual_loss(lpips, *seen, sigma)
        if settings.colour_weight:
            loss = loss + settings.colour_weight * colour_loss(image, conditions["lr"])
        return loss

    def own_state_estimate(source: torch.Tensor, conditions: dict, index: torch.Tensor) -> torch.Tensor:
        """The head's image at a state that sampling itself meets (scheduled sampling, Bengio et al. 2015).

        Each crop stands somewhere within 2, 4 or 8 steps; only the last evaluation has a gradient.
        """
        steps, done = unrolling_for(index, settings.seed)
        heads_behind = int(done.max())  # known on the CPU, so that no device is waited for
        steps, done = steps.to(source.device), done.to(source.device)
        sigma = 1 - 1 / steps  # the first step, at sigma = 1, goes to the mean
        x_t = scheduler.add_noise(conditions["encoding"].mean, source, sigma * scheduler.config.num_train_timesteps)
        with torch.no_grad():
            for number in range(heads_behind):
                image = unet(x_t, sigma * scheduler.config.num_train_timesteps, **conditions).sample
                following = torch.where(done > number, sigma - 1 / steps, sigma)
                x_t = image + (x_t - image) * (following / sigma)[:, None, None, None]  # Euler's step
                sigma = following
        return unet(x_t, sigma * scheduler.config.num_train_timesteps, **conditions).sample

    def diffusion_loss(batch: dict) -> torch.Tensor:
        """Ho et al. 2020, eq. 14, for the noise; Salimans and Ho 2022, appendix D, for v; or the sample itself."""
        hr, index, conditions = batch["hr"], batch["index"], conditions_of(batch)
        original = hr
        if pipe.config.target == "residual":
            original = (hr - pipe.upsample(conditions["lr"])) / pipe.config.residual_std
        timestep = timesteps_for(index, settings.seed, scheduler.config.num_train_timesteps, settings.timestep_law)
        timestep, draws = timestep.to(hr.device), generators_for(index, settings.seed, hr.device)
        noise = torch.stack([torch.randn(hr.shape[1:], generator=g, device=hr.device) for g in draws])
        x_t = scheduler.add_noise(original, noise, timestep)
        prediction = unet(x_t, timestep, **conditions).sample
        if scheduler.config.prediction_type == "v_prediction":
            return distance(prediction, scheduler.get_velocity(original, noise, timestep)).mean()
        return distance(prediction, noise if scheduler.config.prediction_type == "epsilon" else original).mean()

    def validate() -> None:
        """Metrics and grids of the averaged weights on the held-out pictures; the best pipeline so far is kept."""
        if not held_out or (upscales and not pairs):
            return
        ema.copy_to(trainable(shown))
        pipe.set_progress_bar_config(disable=True)
        steps, grids = settings.validation_inference_steps, {}
        record = {"event": "validation", "step": progress.step}
        if upscales:
            measured, grids["bicubic_sr_hr"] = measure(pipe, pairs, steps, distance_of_pictures)
            record |= measured
            if is_flow:
                grids["lr_source_sr_hr"] = coupling_grid(pipe, pairs, steps[-1])
        if not accelerator.is_main_process:
            return
        if not upscales:
            grids["samples"] = generated_grid(pipe, steps[-1])
        log(accelerator, output_dir, record)
        accelerator.log({k: v for k, v in record.items() if isinstance(v, float)}, step=progress.step)
        accelerator.print(record)
        (output_dir / "validation").mkdir(exist_ok=True)
        for name, picture in grids.items():
            Image.fromarray(picture).save(output_dir / "validation" / f"{progress.step:06d}_{name}.png")
            for tracker in accelerator.trackers:
                if hasattr(tracker, "log_images"):
                    tracker.log_images({name: picture[None]}, step=progress.step, **dataformats(tracker))
        quality = record.get(f"psnr_y_{steps[0]}")
        if quality is not None and quality > progress.best and not settings.lora_rank:
            progress.best = quality
            pipe.save_pretrained(output_dir / "best")

    pairs = pairs_of(held_out, cropping, settings.small_images) if upscales else []
    objective = flow_matching_loss if is_flow else diffusion_loss
    if settings.train == "encoder":
        objective = posterior_mean_loss

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
            loss = objective(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(trainable(unet), settings.max_grad_norm)
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
        stopped = bool(interrupted) if accelerator.num_processes == 1 else accelerator.check_trigger()
        last = progress.step == total_steps
        saves = progress.step % settings.checkpointing_steps == 0 or last or stopped
        validates = (progress.step % settings.validation_steps == 0 or last) and not stopped
        if progress.step % settings.logging_steps == 0 or saves or validates:  # nothing is kept without a look at it
            mean, norm, largest = looked_at(accelerator, losses, norms, trainable(unet))
            if not math.isfinite(mean + norm + largest):
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
        with watch.paused():
            if validates:
                validate()
            if saves:
                limit = settings.checkpoints_total_limit
                checkpoints.save(accelerator, output_dir, progress.step, limit, asdict(settings))
        if stopped:
            accelerator.print(
                f"Stopped by a signal after step {progress.step}; go on with `--resume_from_checkpoint latest`."
            )
            leave_together(accelerator)
            sys.exit(STOPPED)
    bar.close()

    # The finished pipeline: averaged weights, network and scheduler.
    accelerator.wait_for_everyone()
    ema.copy_to(trainable(shown))
    if accelerator.is_main_process:
        if settings.lora_rank:
            shown.fuse_lora()
            shown.unload_lora()
        plot_curves(output_dir / "metrics.jsonl", output_dir / "curves.png")
        pipe.save_pretrained(output_dir)
        accelerator.print(f"The pipeline is in {output_dir}.")
        if settings.push_to_hub:
            publish(output_dir, settings.push_to_hub)
    leave_together(accelerator)


def leave_together(accelerator: Accelerator) -> None:
    """Ends all processes at once: one that ends while the first still writes can fall over its own idle threads."""
    accelerator.wait_for_everyone()
    accelerator.end_training()


def changed_settings(before: dict, settings: Settings) -> list[str]:
    """The settings that differ from those of a checkpoint, as `name: before -> now`.

    Raises:
        ValueError: if one of them cannot be changed within a run.
    """
    now = asdict(settings)
    differing = [name for name in now if name in before and name not in OF_THE_CALL and before[name] != now[name]]
    lines = {name: f"`{name}`: {before[name]} -> {now[name]}" for name in differing}
    names_before, names_now = (
        [Path(place).name for place in each.get("train_data_dir", [])] for each in (before, now)
    )
    moved = ["train_data_dir"] if names_before == names_now else []  # the same folders in another place
    if refused := [lines[name] for name in differing if name in FIXED and name not in moved]:
        raise ValueError(
            f"A resumed run keeps its network, optimizer, data and seed, but the settings differ from those of the "
            f"checkpoint: {', '.join(refused)}. Leave them as they were, or start a new run from its pipeline by "
            "`--pretrained_model_name_or_path`."
        )
    return list(lines.values())


def apply_rate(lr_schedule: torch.optim.lr_scheduler.LambdaLR, settings: Settings) -> None:
    """Gives AdamW's settings and the schedule's rate to an optimiser whose state came from a checkpoint."""
    lr_schedule.base_lrs = [settings.learning_rate] * len(lr_schedule.base_lrs)
    rates = [
        rate * factor(lr_schedule.last_epoch) for rate, factor in zip(lr_schedule.base_lrs, lr_schedule.lr_lambdas)
    ]
    for group, rate in zip(lr_schedule.optimizer.param_groups, rates, strict=True):
        group |= {"lr": rate, "initial_lr": settings.learning_rate}
        group |= {"betas": (settings.adam_beta1, settings.adam_beta2), "weight_decay": settings.adam_weight_decay}
    lr_schedule._last_lr = rates


def check_objective(settings: Settings, pipe, is_flow: bool, upscales: bool) -> None:
    """Refuses settings of the training that do not go together or with the pipeline, before any work."""
    scheduler, name = pipe.scheduler.config, type(pipe).__name__
    parts = getattr(pipe.unet, "trainable_parts", ("all",))
    if settings.train not in parts:
        raise ValueError(
            f"`train` must be one of {list(parts)} for {type(pipe.unet).__name__}, got {settings.train!r}."
        )
    has_prior = getattr(pipe, "prior", None) is not None or hasattr(pipe.unet, "encode")
    if (scheduler.get("source") == "prior") != has_prior:
        raise ValueError(
            "`source: prior` in `scheduler` needs a `prior` in `pipeline`, or a network that encodes, and either "
            "needs it."
        )
    if settings.endpoint_loss and not is_flow:
        raise ValueError(f"`endpoint_loss` is for flows, not for {name}.")
    if settings.lr_data_dir and not upscales:
        raise ValueError(f"`lr_data_dir` is for networks that upscale, not for {name}.")
    if (settings.perceptual_weight or settings.colour_weight) and not (is_flow and upscales):
        raise ValueError(f"`perceptual_weight` and `colour_weight` are for flows that upscale, not for {name}.")
    if settings.overfit and settings.streaming:
        raise ValueError("`overfit` repeats the first batch and needs pictures by number: leave out `streaming`.")


def fit_strategy(accelerator: Accelerator, settings: Settings) -> None:
    """Tells FSDP and DeepSpeed what they need to know; refuses what leaves a process without weights to average."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 hides the weights, of which averages are kept: choose `fsdp_version: 2`.")
    if accelerator.is_fsdp2 and settings.mixed_precision != "no":  # networks here keep pictures in float32 themselves
        fsdp = accelerator.state.fsdp_plugin
        exact = {"cast_forward_inputs": False, "output_dtype": None}
        fsdp.mixed_precision_policy = replace(fsdp.mixed_precision_policy, **exact)
    if deepspeed := accelerator.state.deepspeed_plugin:
        if settings.optimizer == "muon":
            raise ValueError("DeepSpeed flattens weights, and Muon needs matrices: use `optimizer: adamw`, or FSDP 2.")
        if deepspeed.zero_stage == 3:
            raise ValueError(
                "ZeRO stage 3 hides the weights, of which averages are kept: choose `zero_stage` 1 or 2, or FSDP 2."
            )
        deepspeed.deepspeed_config["gradient_clipping"] = settings.max_grad_norm  # it clips by itself
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.train_batch_size


def add_adapters(unet: torch.nn.Module, rank: int) -> None:
    """Freezes the network and adds low-rank adapters (Hu et al. 2022) to its convolutions and attention."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("`lora_rank` needs PEFT: pip install peft") from error
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    names = [name for name, module in unet.named_modules() if isinstance(module, kinds) and "embedding" not in name]
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def hold_out(images, settings: Settings, scale: int, accelerator: Accelerator):
    """Pictures to train on and pictures to validate with, after a look at their sizes."""
    count = settings.num_validation_images
    if settings.streaming:
        return images.skip(count), list(images.take(count))
    side = settings.resolution if settings.resize_to is None else 1
    if unfit := unfit_pictures(images, side, scale):
        words = f"pictures are smaller than a crop of {settings.resolution}, or do not fit or cannot be read"
        if settings.small_images == "refuse":
            raise ValueError(
                f"{len(unfit)} of {len(images)} {words}: {', '.join(list(unfit.values())[:5])}"
                f"{' ...' if len(unfit) > 5 else ''}. Leave them out with "
                "`--small_images skip`, or lower `resolution`."
            )
        images = images.select([number for number in range(len(images)) if number not in unfit])
        accelerator.print(f"{len(unfit)} {words}, and are left out.")
    if len(images) <= count:
        raise ValueError(
            f"{len(images)} pictures, of which `num_validation_images` holds out {count}: none is left to train on."
        )
    images = images.shuffle(seed=settings.seed)
    kept = len(images) - count
    if settings.train_batch_size > kept:
        raise ValueError(
            f"`train_batch_size` is {settings.train_batch_size}, but there are only {kept} pictures to train on; "
            "lower it, and raise `gradient_accumulation_steps` instead."
        )
    return images.select(range(kept)), images.select([*range(kept, len(images))])


def upsampled(lr: torch.Tensor, hr: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(lr, size=hr.shape[-2:], mode="bicubic", antialias=True)


def pairs_of(held_out, cropping: Cropping, small_images: str) -> list[Pair]:
    """The held-out pictures and their LR by the degradation of the run; unreadable ones are refused or skipped."""
    pairs = []
    for number in range(len(held_out)):
        try:
            row, hr, lr = decoded(held_out, number, cropping)
        except ValueError:
            if small_images == "refuse":
                raise
            continue
        if lr is None:
            lr = degrade(hr, cropping.scale, cropping.degradation, np.random.default_rng(cropping.seed))
        pairs.append(Pair(hr, lr, row.get("label")))
    return pairs


def looked_at(
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


def dataformats(tracker) -> dict:
    """TensorBoard has to be told the order of the axes."""
    return {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}


def log(accelerator: Accelerator, output_dir: Path, record: dict) -> None:
    """Appends a line to metrics.jsonl."""
    if accelerator.is_main_process:
        with open(output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")


def versions() -> dict:
    """What a reader needs to repeat a run."""
    import accelerate

    found = {"flowsr": flowsr.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    )
    return {**found, "accelerate": accelerate.__version__, "commit": commit.stdout.strip() or None}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_sr.py: {error}")
