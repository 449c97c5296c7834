"""Checkpoints of the original projects and of train_sr.py, and single files, as pipelines of this library.

A format is recognised by its keys, every key must find its place, and pickles are opened without executing anything.
The names and sizes of the original projects are in [`flowsr.originals`].
"""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Literal

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flowsr
from flowsr import originals
from flowsr.components import pipeline_from
from flowsr.loading import class_named
from flowsr.training.trainable import train_part


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


def convert(
    path: str | Path,
    ema: bool = True,
    scale: int = 4,
    prediction_type: Literal["epsilon", "v_prediction"] | None = None,
) -> DiffusionPipeline:
    """A pipeline from a checkpoint of any kind.

    Args:
        path: file of an original project; single file of [`write_single_file`]; pipeline folder; or checkpoint folder
            of train_sr.py, with settings.yaml beside it.
        ema (`bool`): take the averaged weights of a training state.
        scale (`int`): HR pixels per LR pixel, which the weights of the original projects do not tell.
        prediction_type (*optional*): what a network of the DDPM project predicts; by default what its file name says,
            and where that says nothing the default of the project, "v_prediction".

    Raises:
        ConversionError: if the file cannot be read or its format is not known, or for a `prediction_type` where the
            checkpoint itself tells it.
    """
    path, texts, state = Path(path), {}, {}
    if not path.is_dir():
        content = read_checkpoint(path)
        texts = read_metadata(path) if path.suffix == ".safetensors" else {}
        state = {} if "model_index.json" in texts else state_of(content, ema)
    if originals.DIFFUSION <= state.keys():
        predicts = prediction_type or originals.prediction_in_name(path)
        return with_weights(*originals.diffusion(state, scale, predicts))
    if prediction_type is not None:
        raise ConversionError(f"{path} is not of the DDPM project, and tells itself what its network predicts.")
    if originals.FLOW_MATCHING <= state.keys():
        return with_weights(*originals.flow_matching(state, scale))
    if "model_index.json" in texts:
        return assemble(texts, content)
    if (path / "model_index.json").is_file():
        return assemble(*read_folder(path))
    if path.is_dir():
        return convert_training(path, ema)
    raise ConversionError(
        f"{path}: no known format; its first keys are {sorted(state)[:5]}. Known: the flow-matching x4 project "
        "(in_conv, down_blocks, mid1, mid_attn, mid2, up_blocks, out_conv), the DDPM project (init_conv, downs, "
        "bottleneck, ups, context_extractor, final_conv), single files of this library (model_index.json in their "
        "metadata)."
    )


def with_weights(pipe: DiffusionPipeline, weights: dict[str, torch.Tensor]) -> DiffusionPipeline:
    load_all(pipe.unet, weights)
    return pipe


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
        ValueError: for a class that this library does not know, and for weights that are missing or left over.
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
        cls = class_named(kind, (ModelMixin, SchedulerMixin, transformers.PreTrainedModel), *places)
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
    return class_named(index["_class_name"], DiffusionPipeline, flowsr)(**parts)


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
        train_part(pipe.unet, settings.get("train", "all"))
        names = [name for name, weight in pipe.unet.named_parameters() if weight.requires_grad]  # as EMAModel has them
        pipe.unet.requires_grad_(True)
        if len(averages) != 1 or len(averages[0]) != len(names):
            raise ConversionError(f"{folder} has no averaged weights for this network; see `--weights`.")
        whole = folder / "model.safetensors"  # for what was not trained; not there where the weights were sharded
        state = read_checkpoint(whole) if whole.is_file() else pipe.unet.state_dict()
        state = {**state, **dict(zip(names, averages[0]))}
    else:
        state = read_checkpoint(folder / "model.safetensors")
    load_all(pipe.unet, state)
    pipe.unet.eval()
    return pipe
