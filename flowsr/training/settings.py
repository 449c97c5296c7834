"""Every setting of a training, how a file and flags give them, and what is refused before any work."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import torch
import yaml
from accelerate.tracking import get_available_trackers
from diffusers import DiffusionPipeline
from transformers import HfArgumentParser

from flowsr.degradations import CHAINS
from flowsr.picture_file import one_line
from flowsr.training.distances import LOSSES
from flowsr.training.draws import LAWS
from flowsr.training.optimizers import ADAM, OPTIMIZERS

CONFIGS = ("pipeline", "unet", "scheduler")  # which a checkpoint to start from brings along
MAPPINGS = (*CONFIGS, "adam")  # mappings, or JSON on the command line


def setting(default, words: str):
    """A field of the settings: its default, and its line of `--help`."""
    options = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**options, metadata={"help": words})


@dataclass
class Settings:
    """Everything that a run depends on. Flags override the `--config` file; the result is written to the output."""

    # Data.
    train_data_dir: list[str] = setting([], "folders (or zips) of pictures")
    dataset_name: str | None = setting(None, "or: DIV2K, the URL of a zip, or a data set on the Hub, column `image`")
    lr_data_dir: str | None = setting(None, "folder of LR pictures with the names of the HR; without it they are made")
    streaming: bool = setting(False, "read the data from start to end, storing nothing")
    small_images: str = setting("refuse", "smaller than a crop, or unreadable: refuse or skip")
    resolution: int = setting(192, "side of a training crop, HR pixels")
    resize_to: int | None = setting(None, "resize shorter sides to so many pixels and take the middle")
    augmentation: str = setting("turns", "turns (8 symmetries), flip or none")
    degradation: str = setting("bicubic", f"bicubic, {' or '.join(CHAINS)}")
    overfit: bool = setting(False, "the first batch, over and over: can it be learned?")
    dataloader_num_workers: int = setting(0, "loader processes; 0 suits cached pictures")

    # What is trained; JSON on the command line, a mapping in the file, `_class_name` as in diffusers' configs.
    pipeline: str = setting("{}", "config of the pipeline, FlowMatchSRPipeline by default")
    unet: str = setting("{}", "config of the network, UNetSRModel by default")
    scheduler: str = setting("{}", "config of the scheduler of flowsr or of diffusers")
    pretrained_model_name_or_path: str | None = setting(
        None, "start from this pipeline (its config replaces the three above)"
    )
    lora_rank: int = setting(0, "train adapters of this rank only (PEFT), merged at the end")
    train: str = setting("all", "all of the network; or its encoder or head alone")

    # Objective.
    loss: str = setting("l1", f"distance of predictions: {', '.join(LOSSES)}")
    frequency_weight: float = setting(0.0, "of the Fourier coefficients' L1, for `train: encoder`; 0: none")
    teacher: str | None = setting(
        None,
        "for `train: encoder`: dat_light, a checkpoint that spandrel reads, a folder of ready pictures with the names "
        "of the training pictures, or a model as of `prior`",
    )
    teacher_weight: float = setting(1.0, "the target is so much teacher, the rest HR")
    colour_weight: float = setting(0.0, "of the LR's colours in the image estimate; 0: none")
    perceptual_weight: float = setting(0.0, "of (1 - sigma) LPIPS of the image estimate; 0: none")
    lpips_weights: str | None = setting(
        None, "safetensors of LPIPS v0.1 with SqueezeNet: for `perceptual_weight`, and for validation"
    )
    unroll_weight: float = setting(
        0.0, "for `train: head`: of L1 at states of the sampler itself, where LPIPS is then taken too"
    )
    timestep_law: str = setting("stratified", f"of the times: {', '.join(LAWS)}")
    sigma_atom: float = setting(0.4, "share of a flow's crops at sigma = 1, the one step")

    # Optimisation. Steps are optimiser steps.
    max_train_steps: int = setting(20000, "optimiser steps at most")
    num_train_epochs: float | None = setting(None, "passes over the pictures at most")
    train_batch_size: int = setting(8, "crops per process and micro-batch")
    gradient_accumulation_steps: int = setting(1, "micro-batches per optimiser step")
    optimizer: str = setting("adamw", f"{', '.join(OPTIMIZERS)} (bitsandbytes' 8 bits)")
    learning_rate: float = setting(8e-4, "peak, after the warm-up")
    lr_scheduler: str = setting("cosine", "any name of diffusers.optimization")
    lr_warmup_steps: int = setting(300, "optimiser steps")
    adam: str = setting("{}", f"AdamW's own settings, JSON; by default {json.dumps(ADAM)}")
    ema_decay: float = setting(0.999, "of the weights, per optimiser step")
    mixed_precision: str = setting("no", "no, bf16, fp16 (GPU only) or auto")
    gradient_checkpointing: bool = setting(False, "less memory, a third more time")
    seed: int = setting(0, "of weights, crops, times and noise")

    # Output.
    output_dir: str = setting("runs/x4", "where everything is written")
    checkpointing_steps: int = setting(1000, "optimiser steps between checkpoints")
    resume_from_checkpoint: str | None = setting(None, "a checkpoint folder, or latest")
    validation_steps: int = setting(1000, "optimiser steps between validations")
    validation_inference_steps: list[int] = setting([1, 4], "steps of the pipeline; the first decides what is best")
    num_validation_images: int = setting(4, "pictures held out of the training data")
    logging_steps: int = setting(50, "optimiser steps between lines of metrics.jsonl")
    report_to: str | None = setting(None, "tensorboard, wandb, ...")
    push_to_hub: str | None = setting(None, "USER/NAME that the finished pipeline goes to")

    def __post_init__(self):
        for name in MAPPINGS:
            value = getattr(self, name)
            try:
                value = json.loads(value) if isinstance(value, str) else value
            except json.JSONDecodeError as error:
                raise ValueError(f"`{name}` is not JSON: {value!r} ({error}).") from error
            if not isinstance(value, dict):
                raise ValueError(f"`{name}` must be a mapping, such as {{}}, got {value!r}.")
            setattr(self, name, value)
        self.adam = whole_adam(self.adam)
        if self.mixed_precision == "auto":
            self.mixed_precision = "bf16" if has_fast_bf16() else "no"
        self.check_each()
        self.check_together()
        self.check_machine()

    def check_each(self) -> None:
        """Raises a ValueError for a value out of its range."""
        positive = (
            "resolution max_train_steps train_batch_size gradient_accumulation_steps checkpointing_steps "
            "validation_steps logging_steps learning_rate resize_to num_train_epochs"
        )
        for name in positive.split():
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        not_negative = (
            "colour_weight perceptual_weight frequency_weight unroll_weight lora_rank "
            "num_validation_images lr_warmup_steps dataloader_num_workers"
        )
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        choices = {
            "loss": LOSSES,
            "timestep_law": LAWS,
            "degradation": ("bicubic", *CHAINS),
            "augmentation": ("turns", "flip", "none"),
            "small_images": ("refuse", "skip"),
            "optimizer": OPTIMIZERS,
            "train": ("all", "encoder", "head"),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")
        for name in ("sigma_atom", "teacher_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must lie in [0, 1), got {self.ema_decay}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"`seed` must lie in [0, 2^32), got {self.seed}.")
        largest = min(1e30, torch.finfo(torch.float32).max * (1 - self.adam["betas"][0]))  # AdamW's first step
        if not self.learning_rate <= largest:
            raise ValueError(
                f"`learning_rate` must be at most {largest:.1e}, where float32 overflows, got {self.learning_rate}."
            )
        if not self.validation_inference_steps or min(self.validation_inference_steps) < 1:
            raise ValueError(f"`validation_inference_steps` must be positive, got {self.validation_inference_steps}.")

    def check_together(self) -> None:
        """Raises a ValueError for settings that contradict each other."""
        if self.lr_data_dir and (self.streaming or self.resize_to or self.degradation != "bicubic"):
            raise ValueError(
                "`lr_data_dir` gives the LR of whole pictures: leave out `streaming`, `resize_to` and `degradation`."
            )
        if self.resize_to is not None and self.resize_to < self.resolution:
            raise ValueError(
                f"`resize_to` makes the shorter sides {self.resize_to} pixels long, but a crop has {self.resolution}: "
                "raise `resize_to` or lower `resolution`."
            )
        if self.streaming and self.overfit:
            raise ValueError("`overfit` repeats the first batch and needs pictures by number: leave out `streaming`.")
        if self.streaming and self.num_train_epochs is not None:
            raise ValueError("The length of a stream is not known: give `max_train_steps`, not `num_train_epochs`.")
        if (self.teacher or self.frequency_weight) and self.train != "encoder":
            raise ValueError(
                "`teacher` and `frequency_weight` are for the posterior mean: set `train: encoder`, got "
                f"{self.train!r}."
            )
        if self.teacher and (self.degradation != "bicubic" or self.streaming):
            raise ValueError("`teacher` answers to whole pictures: set `degradation: bicubic`, `streaming: false`.")
        if self.unroll_weight and self.train != "head":
            raise ValueError(f"`unroll_weight` is for the head: set `train: head`, got {self.train!r}.")
        if self.perceptual_weight and not self.lpips_weights:
            raise ValueError("`perceptual_weight` needs `lpips_weights`, a safetensors file; or set it to 0.")

    def check_machine(self) -> None:
        """Raises a ValueError for what this machine does not have."""
        if self.mixed_precision == "fp16" and not has_gpu():
            raise ValueError("`mixed_precision=fp16` needs a GPU; on a CPU use bf16.")
        if self.report_to not in (None, "all", *map(str, get_available_trackers())):
            raise ValueError(
                f"`report_to: {self.report_to}` needs the package: pip install {self.report_to}; or leave it out."
            )
        if self.lpips_weights and not Path(self.lpips_weights).is_file():
            raise ValueError(f"`lpips_weights`: there is no file {self.lpips_weights}.")


def has_gpu() -> bool:
    return torch.cuda.is_available()


def has_fast_bf16() -> bool:
    """Whether GPU or CPU has instructions for it; on a CPU without, bfloat16 is several times slower than float32."""
    if has_gpu():
        return torch.cuda.is_bf16_supported()
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def parse_settings(arguments: list[str], default_config: Path, description: str = "") -> Settings:
    """Defaults, then the YAML file of `--config`, then the other flags.

    Raises:
        ValueError: for a file that cannot be read, and for settings that do not fit each other.
    """
    parser = HfArgumentParser(Settings, description=description.split("\n")[0])
    parser.add_argument("--config", default=str(default_config), help="YAML file of the settings below")
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
        if name in MAPPINGS and isinstance(value, dict):
            continue
        try:
            chosen[name] = as_type(value, types[name])
        except (TypeError, ValueError):
            way_out = "; put it in quotes" if "str" in names[name] and not isinstance(value, (dict, list)) else ""
            raise ValueError(f"{file}: `{name}` must be {names[name]}, got {value!r}{way_out}.") from None
    return chosen


def whole_adam(given: dict) -> dict:
    """AdamW's settings, in their types, with the defaults of those that are not given.

    Raises:
        ValueError: for unknown ones, and values out of range.
    """
    if unknown := sorted(set(given) - set(ADAM)):
        raise ValueError(f"`adam` has unknown settings {unknown}; AdamW's are {list(ADAM)}.")
    adam = {**ADAM, **given}
    try:
        first, second = map(float, adam["betas"])
        eps, weight_decay = float(adam["eps"]), float(adam["weight_decay"])
    except (TypeError, ValueError):
        raise ValueError(f"`adam` takes two numbers as `betas`, and one for each other, got {given}.") from None
    if not (0 <= first < 1 and 0 <= second < 1 and eps >= 0 and weight_decay >= 0):
        raise ValueError(f"`adam` takes `betas` in [0, 1), `eps` and `weight_decay` from 0, got {given}.")
    return {"betas": [first, second], "eps": eps, "weight_decay": weight_decay}


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


def check_pipeline(settings: Settings, pipe: DiffusionPipeline) -> None:
    """Raises a ValueError for settings that do not fit the pipeline that is to be trained."""
    scheduler, name = pipe.scheduler.config, type(pipe).__name__
    is_flow, upscales = hasattr(pipe.scheduler, "sample_source"), pipe.unet.config.lr_channels is not None
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
    if settings.lr_data_dir and not upscales:
        raise ValueError(f"`lr_data_dir` is for networks that upscale, not for {name}.")
    if (settings.perceptual_weight or settings.colour_weight) and not (is_flow and upscales):
        raise ValueError(f"`perceptual_weight` and `colour_weight` are for flows that upscale, not for {name}.")
    multiple = math.lcm(pipe.unet.size_multiple, pipe.scale_factor if upscales else 1)
    if settings.resolution % multiple:
        raise ValueError(f"`resolution` must be a multiple of {multiple} here, got {settings.resolution}.")
