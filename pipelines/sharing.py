"""Saved pipelines that carry their code, so that they load where flowsr is not installed."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .card import model_card

# The first is the root of all errors of the HTTP library beneath huggingface_hub, whichever that is.
NETWORK_ERRORS = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)
OF_THIS_LIBRARY = ("FlowMatchSRPipeline", "DDPMSRPipeline", "FlowMatchPipeline")
TEMPLATE = "This model card has been automatically generated"  # in the empty card of diffusers


class SelfContainedMixin:
    """For a `DiffusionPipeline`: a saved folder or repository holds the sources of its classes.

    Without flowsr it loads by `DiffusionPipeline.from_pretrained(place, trust_remote_code=True)`; with flowsr, its own
    classes are used, and nothing needs to be trusted.
    """

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes model_index.json in the form of remote code, and the sources. `save_pretrained` calls this last."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text())
        index.pop("_name_or_path", None)  # a local path
        module = write_source(type(self), path.parent, "pipeline")
        index["_class_name"] = [module, type(self).__name__]
        found_by_name = f"from .{module} import {type(self).__name__}  # for `custom_pipeline` of diffusers\n"
        (path.parent / "pipeline.py").write_text(found_by_name)
        for name, component in self.components.items():
            cls = type(getattr(component, "_orig_mod", component))  # of torch.compile: what it wraps
            if component is not None and cls.__module__.split(".")[0] not in ("diffusers", "transformers"):
                stem = without_digest(cls.__module__.split(".")[-1])
                index[name] = [write_source(cls, path.parent / name, stem), cls.__name__]
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As [`DiffusionPipeline.save_pretrained`]; with `push_to_hub=True` it raises what `push_to_hub` raises."""
        repo_id = kwargs.get("repo_id", os.path.basename(save_directory))
        with clear_errors(repo_id, "was not changed on the Hub"):
            super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> SelfContainedMixin:
        """As [`DiffusionPipeline.from_pretrained`].

        Raises:
            ValueError: for what is no saved pipeline, one of another class, or one that this version does not
                understand.
            OSError: where the Hub does not answer or refuses, and the cache does not hold the pipeline.
        """
        place = str(pretrained_model_name_or_path)
        if os.path.isfile(place):
            raise ValueError(
                f"{place} is a file, and a saved pipeline is a folder; checkpoints of the original projects are made "
                f"into one by `python convert_checkpoint.py {os.path.basename(place)} FOLDER`."
            )
        if not os.path.isdir(place) and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", place):
            raise ValueError(f"There is no checkpoint folder {place}, and a repository of the Hub is named USER/NAME.")
        if os.path.isdir(place) and not os.path.isfile(os.path.join(place, cls.config_name)):
            raise ValueError(f"{place} is not a checkpoint folder: it has no {cls.config_name}.")
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        for name, component in pipe.components.items():
            if name not in kwargs and type(component).__module__.startswith("flowsr."):
                classes = (type(component), *getattr(component, "compatibles", []))
                known = {key for each in classes for key in inspect.signature(each.__init__).parameters}
                unknown = {key for key in getattr(component, "config", {}) if not key.startswith("_")} - known
                refuse_newer(f"{place}/{name}", unknown - {"auto_map", "quantization_config"}, type(component))
        return pipe

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs) -> str:
        """Fetches a repository of the Hub into the cache; uses the cache where the connection fails."""
        with clear_errors(pretrained_model_name, "cannot be loaded"):
            try:
                return super().download(pretrained_model_name, **kwargs)
            except NETWORK_ERRORS as error:
                if isinstance(error, HfHubHTTPError):  # an answer
                    raise
                try:
                    return super().download(pretrained_model_name, **{**kwargs, "local_files_only": True})
                except OSError:
                    raise error from None

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        if cls.__module__.startswith("diffusers_modules."):
            return config
        found = config.get("_class_name")
        found = found[1] if isinstance(found, list) else found
        if found not in {each.__name__ for each in (*cls.__mro__, *cls.__subclasses__())}:
            way = f"flowsr.{found}" if found in OF_THIS_LIBRARY else "diffusers.DiffusionPipeline"
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
        if not cls.__module__.startswith("diffusers_modules."):
            ours = ("flowsr.models.", "flowsr.schedulers.")
            installed = {module.rpartition(".")[2]: module for module in list(sys.modules) if module.startswith(ours)}
            for name, value in config.items():
                if name.startswith("_") or not isinstance(value, (list, tuple)) or not isinstance(value[0], str):
                    continue
                if (module := installed.get(without_digest(value[0]))) is not None:
                    config[name] = [module, value[1]]
                    refuse_newer(pretrained_model_name_or_path, {value[1]} - set(vars(sys.modules[module])), cls)
        return loaded

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> str:
        """As [`DiffusionPipeline.push_to_hub`]; a card that the repository has stays as it is.

        Raises:
            OSError: where the Hub does not answer or refuses; the repository is then what it was.
        """
        with clear_errors(repo_id, "was not changed on the Hub"):
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """Writes the model card where there is none; the last step of `push_to_hub` and `save_pretrained`."""
        path = os.path.join(working_dir, "README.md")
        if not os.path.isfile(path) or TEMPLATE in ModelCard.load(path).text:
            model_card(self, repo_id).save(path)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)


def single_file(source: Path) -> str:
    """A Python source in which those that it imports from beside it stand in front of it, each once."""
    parts, done = ["from __future__ import annotations\n"], set()

    def add(path: Path) -> None:
        done.add(path.name)
        lines = path.read_text(encoding="utf-8").splitlines()
        imports = [node for node in ast.parse("\n".join(lines)).body if isinstance(node, ast.ImportFrom)]
        imports = [node for node in imports if node.level or node.module == "__future__"]
        for node in imports:
            if node.level and f"{node.module}.py" not in done:
                add(path.with_name(f"{node.module}.py"))
        for node in reversed(imports):
            del lines[node.lineno - 1 : node.end_lineno]
        parts.append("\n".join(lines).strip() + "\n")

    add(source)
    return "\n\n".join(parts) if len(done) > 1 else source.read_text(encoding="utf-8")


def write_source(cls: type, folder: Path, stem: str) -> str:
    """Writes the source of a class into a folder, and returns the name of the module.

    The name ends in a digest of the content: diffusers loads the code of every checkpoint into one package, where
    another version under the same name would replace it, also for what has been loaded before.
    """
    text = single_file(Path(inspect.getsourcefile(cls)))
    module = f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    (folder / f"{module}.py").write_text(text, encoding="utf-8")
    return module


def without_digest(module: str) -> str:
    return re.sub(r"_[0-9a-f]{8}$", "", module)


def refuse_newer(place: str | os.PathLike, unknown: set[str], cls: type) -> None:
    """Raises a ValueError if a checkpoint has what this version does not know: leaving it out gives other pictures."""
    if unknown:
        raise ValueError(
            f"{place} has {', '.join(sorted(unknown))}, which the installed {cls.__name__} does not know; it was "
            "saved by a newer flowsr. Update flowsr, or run the code that the checkpoint carries: "
            "diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)."
        )


@contextmanager
def clear_errors(repo_id: str, outcome: str) -> Iterator[None]:
    """Turns what can go wrong between here and the Hub into an OSError of one line with the way out."""
    try:
        yield
    except Exception as error:
        cause = error
        while cause is not None and not isinstance(cause, NETWORK_ERRORS):
            cause = cause.__cause__
        if cause is None:
            raise
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, RevisionNotFoundError):
            why = "the repository has no such revision; its page on the Hub lists them."
        elif isinstance(cause, EntryNotFoundError):
            why = "the repository has no model_index.json: it is no saved pipeline."
        elif isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            why = "the Hub has no such repository, or a private one that needs `hf auth login`. Is the name right?"
        elif status in (401, 403):
            why = f"the Hub refuses it ({status}). `hf auth login` takes a token that may do this."
        elif isinstance(cause, OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set, so that only folders and what the cache holds can be used."
        else:
            reason = " ".join(str(cause).split()) or type(cause).__name__
            why = f"the connection to the Hub failed ({reason}). Try again: what has arrived is not sent twice."
        raise OSError(f"{repo_id} {outcome}: {why}") from error
