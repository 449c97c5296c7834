"""Checkpoints of the original projects and of train_sr.py, and single files, as pipelines of this library.

A format is recognised by its keys, sizes are read off the shapes, every key must find its place, and pickles are
opened without executing anything.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flowsr
from flowsr import (
    ContextUNetSRModel,
    DDPMSRPipeline,
    FlowMatchSREulerScheduler,
    FlowMatchSRPipeline,
    UNetSRModel,
)
from flowsr.components import pipeline_from


class ConversionError(ValueError):
    """A file that is not a checkpoint that this library can convert."""


def read_checkpoint(path: str | Path) -> dict:
    """The content of a .pt, .pth or .safetensors file; of a pickle only tensors and plain values.

    Raises:
        ConversionError: if the file is missing, broken, or a pickle that would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(f"{path} is refused: it is broken or holds more than tensors ({reason}).") from error
    except Exception as error:  # torch, zip and safetensors each have their own
        raise ConversionError(f"{path} cannot be read as a checkpoint ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a checkpoint.")
    return content


# Where the training states of the projects keep their weights.
AVERAGED, RAW = ("ema", "ema_state"), ("model", "model_state", "model_state_dict")


def state_of(checkpoint: dict, ema: bool) -> dict[str, torch.Tensor]:
    """The weights within a checkpoint: averaged or raw ones of a training state, or a bare state dict.

    Raises:
        ConversionError: if they are not there, saying which keys are.
    """
    averaged, raw = ([key for key in keys if key in checkpoint] for keys in (AVERAGED, RAW))
    if ema and raw and not averaged and raw != ["model_state_dict"]:  # that project keeps no average
        raise ConversionError(f"The checkpoint has no averaged weights, only {sorted(checkpoint)}; see `--weights`.")
    if not ema and averaged and not raw:
        raise ConversionError(f"The checkpoint has no raw weights, only {sorted(checkpoint)}; see `--weights`.")
    found = (averaged if ema and averaged else raw) or [None]
    state = checkpoint.get(found[0], checkpoint)
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConversionError(f"No weights found under the keys {sorted(map(str, checkpoint))[:8]}.")
    return state


def convert(path: str | Path, ema: bool = True, scale: int = 4) -> DiffusionPipeline:
    """A pipeline from a checkpoint of any kind.

    Args:
        path: file of an original project; single file of [`write_single_file`]; pipeline folder; or checkpoint folder
            of train_sr.py, with settings.yaml beside it.
        ema (`bool`): take the averaged weights of a training state.
        scale (`int`): HR pixels per LR pixel, which the weights of the original projects do not tell.

    Raises:
        ConversionError: if the file cannot be read or its format is not known.
    """
    path = Path(path)
    if (path / "model_index.json").is_file():
        return assemble(*read_folder(path))
    if path.is_dir():
        return convert_training(path, ema)
    checkpoint = read_checkpoint(path)
    if path.suffix == ".safetensors" and "model_index.json" in (texts := read_metadata(path)):
        return assemble(texts, checkpoint)
    state = state_of(checkpoint, ema)
    if {"in_conv.weight", "mid_attn.qkv.weight", "time_mlp.net.0.weight"} <= set(state):
        return convert_flow_matching(state, scale)
    if {"init_conv.weight", "context_extractor.projection.weight", "final_conv.weight"} <= set(state):
        return convert_diffusion(state, scale, prediction_type(path))
    raise ConversionError(
        f"{path}: no known format; its first keys are {sorted(state)[:5]}. Known: the flow-matching x4 project "
        "(in_conv, down_blocks, mid1, mid_attn, mid2, up_blocks, out_conv), the DDPM project (init_conv, downs, "
        "bottleneck, ups, context_extractor, final_conv), single files of this library (model_index.json in their "
        "metadata)."
    )


def load_all(network: torch.nn.Module, state: dict[str, torch.Tensor], keep_types: bool = False) -> None:
    """Loads weights of which none may be missing or left over, in the type of the network or in their own."""
    try:
        network.load_state_dict(state, strict=True, assign=keep_types)
    except RuntimeError as error:
        raise ConversionError(f"The weights do not fit the network of their shapes or config: {error}") from error


# A pipeline as the texts of its JSON files and its weights: the content of a folder, and that of a single file, whose
# weights carry the name of their component as a prefix and whose metadata are the texts.


def read_folder(folder: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """The JSON files of a pipeline folder by their relative path, and its weights as `component.name`."""
    texts, weights = {"model_index.json": (folder / "model_index.json").read_text()}, {}
    for name in components_in(texts):
        for file in sorted((folder / name).glob("*.json")):
            if not file.name.endswith(".index.json"):  # which shard holds what: not so in another file
                texts[f"{name}/{file.name}"] = file.read_text()
        for file in sorted((folder / name).glob("*.safetensors")):
            found = {f"{name}.{key}": value for key, value in read_checkpoint(file).items()}
            if found.keys() & weights.keys():
                raise ConversionError(f"{folder / name} holds the same weights more than once; leave one variant.")
            weights |= found
    return texts, weights


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_single_file(pipe: DiffusionPipeline, path: str | Path) -> None:
    """Writes all weights and configs of a pipeline as one .safetensors file, which [`convert`] reads."""
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        texts, weights = read_folder(Path(folder))
        save_file(weights, path, metadata=texts)


def components_in(texts: dict[str, str]) -> dict[str, tuple[str, str]]:
    """Library and class of each component that model_index.json names."""
    index = json.loads(texts["model_index.json"])
    pairs = {name: value for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}
    return {name: tuple(pair) for name, pair in pairs.items() if all(isinstance(part, str) for part in pair)}


def assemble(texts: dict[str, str], weights: dict[str, torch.Tensor]) -> DiffusionPipeline:
    """The pipeline of [`read_folder`]'s texts and weights. Code beside them is not looked at.

    Raises:
        ConversionError: for a class that this library does not know, and for weights that are missing or left over.
    """
    import transformers

    index = json.loads(texts["model_index.json"])
    of_components = {name: {} for name in components_in(texts)}
    for key, value in weights.items():
        component, _, name = key.partition(".")
        if component not in of_components:
            raise ConversionError(f"The weight {key} belongs to none of {sorted(of_components)}.")
        of_components[component][name] = value
    parts = {name: value for name, value in index.items() if not name.startswith("_")}
    for name, (library, kind) in components_in(texts).items():
        state, configs = of_components[name], [text for path, text in texts.items() if path.startswith(f"{name}/")]
        if len(configs) != 1:
            raise ConversionError(f"The component {name} needs one config, found {len(configs)}.")
        places = (transformers,) if library == "transformers" else (flowsr, diffusers)
        cls = class_of(kind, places, (ModelMixin, SchedulerMixin, transformers.PreTrainedModel))
        if issubclass(cls, transformers.PreTrainedModel):
            parts[name] = load_encoder(cls, configs[0], state)
            continue
        parts[name] = cls.from_config(json.loads(configs[0]))
        if isinstance(parts[name], torch.nn.Module):
            load_all(parts[name].eval(), state, keep_types=True)
        elif state:
            raise ConversionError(f"The component {name} is a {kind}, which has no weights, but some came.")
    for name, value in parts.items():
        if value == [None, None]:  # an optional component that is not there
            parts[name] = None
    return class_of(index["_class_name"], (flowsr,), (DiffusionPipeline,))(**parts)


def class_of(kind: str | list[str], places: tuple, bases: tuple[type, ...]) -> type:
    """The class of that name; of a pair of file and class, as self-contained folders have it, the second."""
    kind = kind[-1] if isinstance(kind, (list, tuple)) else kind
    found = next((getattr(module, kind) for module in places if hasattr(module, kind)), None)
    if not (isinstance(found, type) and issubclass(found, bases)):
        raise ConversionError(f"A {kind} is wanted, which {' and '.join(m.__name__ for m in places)} do not have.")
    return found


def load_encoder(cls: type, config: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model of transformers from the content of its files, by its own loader: it renames weights."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(config)
        save_file(state, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model, found = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    wrong = {kind: sorted(map(str, keys)) for kind, keys in found.items() if keys}
    if wrong:
        raise ConversionError(f"The weights do not fit the {cls.__name__} of the config: {wrong}.")
    return model


# Checkpoints of train_sr.py: a folder that accelerate wrote, with the settings of the run beside it.


def convert_training(folder: Path, ema: bool) -> DiffusionPipeline:
    """The pipeline that the run would have left had it ended at this checkpoint; without `ema` the raw weights."""
    import yaml

    beside, registered = folder.parent / "settings.yaml", sorted(folder.glob("custom_checkpoint_*.pkl"))
    if not registered or not beside.is_file():
        raise ConversionError(
            f"{folder} is neither a pipeline folder (with model_index.json) nor a checkpoint of train_sr.py (with "
            "custom_checkpoint_0.pkl, and settings.yaml beside the folder)."
        )
    settings = yaml.safe_load(beside.read_text())
    if settings.get("lora_rank"):
        raise ConversionError(
            f"{folder} holds adapters, which are merged at the end of a run; go on with `--resume_from_checkpoint "
            "latest` and `--max_train_steps` as many as it has done."
        )
    if not ema and not (folder / "model.safetensors").is_file():
        raise ConversionError(f"{folder} has no model.safetensors: raw weights are sharded there; take the averages.")
    configs = [settings.get(name) or {} for name in ("pipeline", "unet", "scheduler")]
    pipe = pipeline_from(*configs, pretrained=settings.get("pretrained_model_name_or_path"))
    if ema:
        averages = [state["shadow_params"] for state in map(read_checkpoint, registered) if "shadow_params" in state]
        names = [name for name, _ in pipe.unet.named_parameters()]  # in the order in which EMAModel keeps them
        if len(averages) != 1 or len(averages[0]) != len(names):
            raise ConversionError(f"{folder} has no averaged weights for this network; see `--weights`.")
        state = dict(zip(names, averages[0]))
    else:
        state = read_checkpoint(folder / "model.safetensors")
    load_all(pipe.unet, state)
    pipe.unet.eval()
    return pipe


# The flow-matching project: pictures in [0, 1], t from 0 (noise) to 1 (picture), velocity = picture - noise, the state
# concatenated with torch's bicubic of the LR, each Euler step evaluated at its middle.


def convert_flow_matching(state: dict[str, torch.Tensor], scale: int) -> FlowMatchSRPipeline:
    levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("down_blocks.")) // 2
    blocks = 1 + max(int(key.split(".")[2]) for key in state if re.match(r"down_blocks\.0\.\d+\.", key))
    widths = tuple(state[f"down_blocks.{2 * level}.0.conv1.weight"].shape[0] for level in range(levels))
    time_dim = state["time_mlp.net.0.weight"].shape[1]
    unet = UNetSRModel(
        scale_factor=scale,
        patch_size=1,
        block_out_channels=widths,
        layers_per_block=blocks,
        mid_layers=2,
        norm="group",
        norm_num_groups=8,
        mid_attention=True,
        num_attention_heads=4,
        time_embedding_dim=time_dim,
        time_embedding_scale=1 / 1000,
        time_embedding_max_period=math.exp(4),
        precondition=False,
        bicubic_coefficient=-0.75,
    )
    renamed = {}
    for key, value in state.items():
        name = flow_matching_name(key, levels)
        if name.endswith("qkv"):
            for letter, part in zip("qkv", value.flatten(1).chunk(3) if value.ndim > 1 else value.chunk(3)):
                renamed[f"{name.removesuffix('qkv')}to_{letter}.{key.rsplit('.')[-1]}"] = part
        else:
            renamed[name] = value.flatten(1) if "to_out" in name and value.ndim > 1 else value
    first = "time_embedding.linear_1.weight"
    renamed[first] = reverse_time(renamed[first])
    for name in ("conv_out.weight", "conv_out.bias"):  # d x / d sigma = - d x / d t
        renamed[name] = -renamed[name]
    load_all(unet, renamed)
    scheduler = FlowMatchSREulerScheduler(
        source="noise", source_noise_std=1.0, prediction_type="velocity", evaluate_at="middle"
    )
    return FlowMatchSRPipeline(unet.eval(), scheduler, data_range=[0.0, 1.0])


def flow_matching_name(key: str, levels: int) -> str:
    """The name of a weight here; `...qkv` for the joint projection, which is split."""
    swaps = {
        r"^time_mlp\.net\.0": "time_embedding.linear_1",
        r"^time_mlp\.net\.2": "time_embedding.linear_2",
        r"^in_conv": "conv_in",
        r"^out_conv": "conv_out",
        r"^out_norm": "norm_out",
        r"^mid1": "mid_stage.resnets.0",
        r"^mid2": "mid_stage.resnets.1",
        r"^mid_attn\.proj": "mid_attn.attn.to_out.0",
        r"^mid_attn\.qkv\.\w+": "mid_attn.attn.qkv",
        r"time_to_film\.1": "film",
    }
    for pattern, name in swaps.items():
        key = re.sub(pattern, name, key)
    if found := re.match(r"down_blocks\.(\d+)\.(.*)", key):  # blocks, strided convolution, blocks, ...
        level, rest = int(found[1]) // 2, found[2]
        return f"downsamplers.{level}.{rest}" if int(found[1]) % 2 else f"down_stages.{level}.resnets.{rest}"
    if found := re.match(r"up_blocks\.(\d+)\.(.*)", key):  # deepest first: blocks, nearest, convolution, ...
        level, rest = levels - 1 - int(found[1]) // 3, found[2]
        return f"upsamplers.{level - 1}.{rest}" if int(found[1]) % 3 else f"up_stages.{level}.resnets.{rest}"
    return key


def reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """The layer behind sin(f t), cos(f t) with t = 1 - sigma, as one behind sin(f sigma), cos(f sigma).

    By the addition theorems; `weight` has shape `(out, 2 * half)`, and f falls from 1 to exp(-4) in `half` steps.
    """
    half = weight.shape[1] // 2
    f = torch.exp(-4 * torch.arange(half, dtype=torch.float64) / (half - 1))
    of_sin, of_cos = weight.double().chunk(2, dim=1)
    return torch.cat([of_cos * f.sin() - of_sin * f.cos(), of_sin * f.sin() + of_cos * f.cos()], dim=1).to(weight)


# The DDPM project: the residual over the upsampled LR (the cubic of torch and OpenCV) in [-1, 1], cosine betas, DDIM.


def prediction_type(path: str | Path) -> str:
    """What the network predicts, which the project writes into the file name."""
    name = Path(path).name
    return "epsilon" if "noise" in name and "v_prediction" not in name else "v_prediction"  # its default


def convert_diffusion(state: dict[str, torch.Tensor], scale: int, prediction: str) -> DDPMSRPipeline:
    levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("downs."))
    blocks = 1 + max(int(m[1]) for key in state if (m := re.match(r"downs\.0\.(\d+)\.conv1", key)))
    unet = ContextUNetSRModel(
        scale_factor=scale,
        block_out_channels=tuple(state[f"downs.{level}.0.conv1.weight"].shape[0] for level in range(levels)),
        layers_per_block=blocks,
        time_embedding_dim=state["time_mlp.0.weight"].shape[1],
        context_channels=state["context_extractor.projection.weight"].shape[1],
    )
    renamed = {}
    for key, value in state.items():
        name = diffusion_name(key, levels, blocks)
        if ".in_proj_" in name:
            attention, _, kind = name.partition(".in_proj_")
            for letter, part in zip("qkv", value.chunk(3)):
                renamed[f"{attention}.to_{letter}.{kind}"] = part
        else:
            renamed[name] = value
    load_all(unet, renamed)
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type=prediction,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return DDPMSRPipeline(unet.eval(), scheduler, target="residual", bicubic_coefficient=-0.75)


def diffusion_name(key: str, levels: int, blocks: int) -> str:
    """The name of a weight here; `...in_proj_weight` for a joint projection, which is split."""
    swaps = {
        r"^time_mlp\.0": "time_embedding.linear_1",
        r"^time_mlp\.2": "time_embedding.linear_2",
        r"time_mlp\.1": "film",
        r"^init_conv": "conv_in",
        r"^final_conv": "conv_out",
        r"^final_norm": "norm_out",
        r"conv_block(\d)\.0": r"conv\1",
        r"conv_block(\d)\.1": r"norm\1",
        r"residual_connection": "shortcut",
        r"norm_self_attn": "norm1",
        r"norm_cross_attn": "norm2",
        r"norm_ff": "norm3",
        r"self_attn\.out_proj": "attn1.to_out.0",
        r"cross_attn\.out_proj": "attn2.to_out.0",
        r"self_attn\.": "attn1.",
        r"cross_attn\.": "attn2.",
        r"^bottleneck\.0": "mid_blocks.0",
        r"^bottleneck\.1": "transformer_blocks.1",
        r"^bottleneck\.2": "mid_blocks.1",
    }
    for pattern, name in swaps.items():
        key = re.sub(pattern, name, key)
    if found := re.match(r"(downs|ups)\.(\d+)\.(\d+)\.(.*)", key):
        way, level, place, rest = found[1], int(found[2]), int(found[3]), found[4]
        level = level if way == "downs" else levels - 1 - level
        if place < blocks:
            return f"{'down' if way == 'downs' else 'up'}_blocks.{level}.{place}.{rest}"
        if level == levels - 1 and place == blocks:
            return f"transformer_blocks.{0 if way == 'downs' else 2}.{rest}"
        if way == "downs":
            return f"downsamplers.{level}.{rest}"
        return f"upsamplers.{level - 1}.{rest.removeprefix('1.')}"  # behind an upsampling without weights
    return key
