"""Checkpoints by name, folder, file or repository of the Hub, and classes by name: the one place that finds them."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from collections.abc import Sequence
from types import ModuleType

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open

import flowsr


def load(
    checkpoint: str | os.PathLike = "x4", device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The pipeline of a checkpoint, of whichever class of this library it is.

    Args:
        checkpoint: bundled name, pipeline folder, single file of [`~flowsr.conversion.write_single_file`], or
            repository of the Hub.
        device: torch device, or "auto" for a GPU where there is one.
        dtype (`torch.dtype`, *optional*): of the weights; by default as they were saved.

    Raises:
        ValueError: naming the checkpoint, what is wrong with it and the way out.
    """
    place = resolve(checkpoint)
    try:
        if is_single_file(place):
            from flowsr.conversion import convert

            pipe = convert(place)
        else:
            pipe = pipeline_class(place).from_pretrained(place)
        device = best_device() if device == "auto" else device
        return pipe.to(device) if dtype is None else pipe.to(device, dtype)
    except Exception as error:  # loaders raise many kinds: safetensors' own, JSON's, the Hub's, torch's
        reason = str(error).strip().split("\n")[0]
        reason = reason if reason.startswith(place) else f"The checkpoint {checkpoint} cannot be loaded: {reason}"
        raise ValueError(reason) from error


def load_upscaler(
    checkpoint: str | os.PathLike = "x4", device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """As [`load`], for a pipeline that makes large pictures of small ones.

    Raises:
        ValueError: also for a pipeline that generates pictures from noise.
    """
    pipe = load(checkpoint, device, dtype)
    if not hasattr(pipe, "scale_factor"):
        raise ValueError(
            f"{checkpoint} is a {type(pipe).__name__}, which generates pictures and upscales none; "
            "take a checkpoint such as x4."
        )
    return pipe


def load_silently(
    checkpoint: str | os.PathLike, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """As [`load_upscaler`], for a command: diffusers prints nothing from here on; what matters comes as an error."""
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    pipe = load_upscaler(checkpoint, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def resolve(checkpoint: str | os.PathLike) -> str:
    """The folder, file or repository that a checkpoint's name stands for.

    A pipeline folder or a file goes before a bundled name, and that before a repository.

    Raises:
        ValueError: for what is none of these.
    """
    place = os.fspath(checkpoint)
    if os.path.isfile(place) or os.path.isfile(os.path.join(place, "model_index.json")):
        return place
    try:
        return flowsr.bundled(place)
    except ValueError as error:
        if os.path.isdir(place):
            raise ValueError(f"{place} is not a checkpoint folder: it has no model_index.json.") from None
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
            absent = f"There is no checkpoint folder {place}, and a repository of the Hub is named USER/NAME."
            raise ValueError(f"{absent} {error}") from None
    return place


def is_single_file(place: str) -> bool:
    """Whether this is a file that [`~flowsr.conversion.write_single_file`] wrote."""
    if not (os.path.isfile(place) and place.endswith(".safetensors")):
        return False
    with safe_open(place, framework="pt") as file:
        return "model_index.json" in (file.metadata() or {})


def best_device() -> torch.device:
    """The CPU, or a CUDA device: the first, and for one of several launched processes that of its LOCAL_RANK."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def pipeline_class(place: str) -> type[DiffusionPipeline]:
    """The class of a saved pipeline; where it cannot be told, the one whose loader says why."""
    try:
        return class_named(DiffusionPipeline.load_config(place)["_class_name"], DiffusionPipeline, flowsr)
    except (OSError, KeyError, ValueError):
        return flowsr.FlowMatchSRPipeline


def class_named(name: str | Sequence[str], bases: type | tuple[type, ...], *libraries: ModuleType) -> type:
    """The class of that name in the first of the libraries that has it; by default in flowsr or diffusers.

    Args:
        name: of the class; or file and class, as folders that carry their code name it.
        bases: one of which the class must derive from.

    Raises:
        ValueError: if none has such a class.
    """
    name, libraries = name if isinstance(name, str) else name[-1], libraries or (flowsr, diffusers)
    found = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
    if not (inspect.isclass(found) and issubclass(found, bases)):
        names = ", ".join(library.__name__ for library in libraries)
        raise ValueError(f"None of the libraries ({names}) has a class {name!r} that fits here.")
    return found


class InstalledClassesMixin:
    """For a `DiffusionPipeline` of the installed flowsr: a saved one is loaded with the installed classes.

    Nothing needs to be trusted, whatever code a folder or repository carries.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> DiffusionPipeline:
        """As [`DiffusionPipeline.from_pretrained`]; it takes bundled names too.

        Raises:
            ValueError: for what is no saved pipeline, one of another class, or one that this version does not
                understand.
            OSError: where the Hub does not answer or refuses, and the cache does not hold the pipeline.
        """
        place = resolve(pretrained_model_name_or_path)
        if os.path.isfile(place):
            way = f"`python convert_checkpoint.py {os.path.basename(place)} FOLDER`"
            raise ValueError(
                f"{place} is a file, and a saved pipeline is a folder; {way} makes one of a single file and of a "
                "checkpoint of the original projects."
            )
        pipe = super().from_pretrained(place, **kwargs)
        for name, component in pipe.components.items():
            if name not in kwargs and type(component).__module__.startswith("flowsr."):
                classes = (type(component), *getattr(component, "compatibles", []))
                known = {key for each in classes for key in inspect.signature(each.__init__).parameters}
                unknown = {key for key in getattr(component, "config", {}) if not key.startswith("_")} - known
                refuse_newer(f"{place}/{name}", unknown - {"auto_map", "quantization_config"}, type(component))
        return pipe

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        found = config.get("_class_name")
        found = found[1] if isinstance(found, list) else found
        if found not in {each.__name__ for each in (*cls.__mro__, *cls.__subclasses__())}:
            way = f"flowsr.{found}" if found in flowsr.COMPONENTS else "diffusers.DiffusionPipeline"
            raise ValueError(
                f"{json_file} is of a {found}, not of a {cls.__name__}; load it by {way}.from_pretrained."
            )
        unknown = {key for key in config if not key.startswith("_")} - set(inspect.signature(cls.__init__).parameters)
        refuse_newer(json_file, unknown, cls)
        config["_class_name"] = found  # the installed class is at hand
        return config

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, *args, **kwargs) -> dict | tuple:
        """The config, with the names of installed modules in place of those of remote code."""
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        installed = {module.rpartition(".")[2]: module for module in flowsr.COMPONENTS.values()}
        for name, value in config.items():
            if name.startswith("_") or not isinstance(value, (list, tuple)) or not isinstance(value[0], str):
                continue
            module = installed.get(re.sub(r"_[0-9a-f]{8}$", "", value[0]))  # code travels with a digest in its name
            if module is not None:
                config[name] = [module, value[1]]
                unknown = set() if hasattr(importlib.import_module(module), value[1]) else {value[1]}
                refuse_newer(pretrained_model_name_or_path, unknown, cls)
        return loaded


def refuse_newer(place: str | os.PathLike, unknown: set[str], cls: type) -> None:
    """Raises a ValueError if a checkpoint has what this version does not know: leaving it out gives other pictures."""
    if unknown:
        raise ValueError(
            f"{place} has {', '.join(sorted(unknown))}, which the installed {cls.__name__} does not know; it was "
            "saved by a newer flowsr. Update flowsr, or run the code that the checkpoint carries: "
            "diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
        )
