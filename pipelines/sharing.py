"""Saved pipelines that carry their code, so that they load where flowsr is not installed."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys

from huggingface_hub import ModelCard

# What pipeline files import from beside them.
HELPERS = (
    "checks.py",
    "consistency.py",
    "context.py",
    "conventions.py",
    "pictures.py",
    "prior.py",
    "sharing.py",
    "solvers.py",
    "tiles.py",
)


class SelfContainedMixin:
    """For a `DiffusionPipeline`: a saved folder or repository holds the sources of its classes.

    Without flowsr it loads by `DiffusionPipeline.from_pretrained(place, trust_remote_code=True)`; with flowsr, its own
    classes are used, and nothing needs to be trusted.
    """

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes model_index.json in the form of remote code, and the sources. `save_pretrained` calls this last."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = os.path.join(save_directory, self.config_name)
        with open(path) as file:
            index = json.load(file)
        index.pop("_name_or_path", None)  # a local path
        index["_class_name"] = ["pipeline", type(self).__name__]
        source = inspect.getsourcefile(type(self))
        shutil.copyfile(source, os.path.join(save_directory, "pipeline.py"))
        for helper in HELPERS:
            path_of_helper = os.path.join(os.path.dirname(source), helper)
            if os.path.isfile(path_of_helper):  # remote code arrives with those alone that its pipeline imports
                shutil.copyfile(path_of_helper, os.path.join(save_directory, helper))
        for name, component in self.components.items():
            cls = type(component)
            if component is None or cls.__module__.split(".")[0] in ("diffusers", "transformers"):
                continue
            stem = cls.__module__.split(".")[-1]
            index[name] = [stem, cls.__name__]
            shutil.copyfile(inspect.getsourcefile(cls), os.path.join(save_directory, name, f"{stem}.py"))
        with open(path, "w") as file:
            file.write(json.dumps(index, indent=2, sort_keys=True) + "\n")

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict:
        config = super()._dict_from_json_file(json_file)
        if cls.__module__.startswith("flowsr.") and isinstance(config.get("_class_name"), list):
            config["_class_name"] = config["_class_name"][1]  # the installed class is at hand
        return config

    @classmethod
    def load_config(cls, *args, **kwargs) -> dict | tuple:
        """The config, with the names of installed modules in place of those of remote code."""
        loaded = super().load_config(*args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if cls.__module__.startswith("flowsr."):
            ours = ("flowsr.models.", "flowsr.schedulers.")
            installed = {module.rpartition(".")[2]: module for module in list(sys.modules) if module.startswith(ours)}
            for name, value in config.items():
                if not name.startswith("_") and isinstance(value, (list, tuple)) and value[0] in installed:
                    config[name] = [installed[value[0]], value[1]]
        return loaded

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """Completes the model card: the last step before an upload, by `push_to_hub` or `save_pretrained`."""
        path = os.path.join(working_dir, "README.md")
        card = ModelCard.load(path) if os.path.isfile(path) else ModelCard("---\n---\n")
        card.data.library_name, card.data.pipeline_tag = "diffusers", "image-to-image"
        card.data.tags = sorted({*(card.data.tags or []), "diffusers", "flowsr", "super-resolution"})
        if "trust_remote_code" not in card.text:
            card.text += (
                f"\n# {repo_id}\n\nA {type(self).__name__} of flowsr.\n\n```python\n"
                "from diffusers import DiffusionPipeline\n\n"
                f'pipe = DiffusionPipeline.from_pretrained("{repo_id}", trust_remote_code=True)\n'
                "large = pipe(image).images[0]\n```\n\nWith flowsr installed, "
                f'`{type(self).__name__}.from_pretrained("{repo_id}")` needs no `trust_remote_code`.\n'
            )
        card.save(path)
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)
