"""Saved pipelines that carry their code, so that they load where flowsr is not installed."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from pathlib import Path

if __name__.startswith("flowsr."):  # at home; the copy of this code in a checkpoint is one file already
    from flowsr.hub import HubMixin, single_file
else:
    HubMixin = object

    def single_file(source: Path) -> str:
        return source.read_text(encoding="utf-8")


FOUND_BY_NAME = ("diffusers", "transformers")
CARRIED = ("flowsr", "diffusers_modules", "transformers_modules")  # the last two: code that came with a checkpoint


class SelfContainedMixin(HubMixin):
    """For a `DiffusionPipeline`: a saved folder or repository holds the sources of its classes.

    Without flowsr it loads by `DiffusionPipeline.from_pretrained(place, trust_remote_code=True)`; with flowsr, its own
    classes are used, and nothing needs to be trusted.
    """

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes model_index.json in the form of remote code, and the sources. `save_pretrained` calls this last."""
        sources = sources_of(self)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        path = Path(save_directory) / self.config_name
        index = json.loads(path.read_text())
        index.pop("_name_or_path", None)  # a local path
        for name, (module, kind, text) in sources.items():
            folder = path.parent if name == "_class_name" else path.parent / name
            (folder / f"{module}.py").write_text(text, encoding="utf-8")
            index[name] = [module, kind]
        found_by_name = "from .{} import {}  # for `custom_pipeline` of diffusers\n".format(*index["_class_name"])
        (path.parent / "pipeline.py").write_text(found_by_name)
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As [`DiffusionPipeline.save_pretrained`].

        Raises:
            ValueError: for a class whose source may not travel, before anything is written.
        """
        sources_of(self)
        super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args, **kwargs) -> str:
        """As [`DiffusionPipeline.push_to_hub`], with the check of `save_pretrained` first."""
        sources_of(self)
        return super().push_to_hub(repo_id, *args, **kwargs)


def sources_of(pipe: SelfContainedMixin) -> dict[str, tuple[str, str, str]]:
    """Module, class and source of the pipeline (`_class_name`) and of each component that is not found by name.

    A module's name ends in a digest of its source: diffusers loads the code of every checkpoint into one package,
    where another version under the same name would replace it, also for what has been loaded before.

    Raises:
        ValueError: for a component that cannot be saved, and for a class of the user's own: its source is private.
    """
    sources = {}
    for name, part in {"_class_name": pipe, **pipe.components}.items():
        part = getattr(part, "_orig_mod", part)  # of torch.compile: what it wraps
        cls, library = type(part), type(part).__module__.partition(".")[0]
        if part is None or library in FOUND_BY_NAME:
            continue
        what = f"The pipeline is a {cls.__name__}" if part is pipe else f"`{name}` is a {cls.__name__}"
        if not hasattr(part, "save_pretrained"):
            raise ValueError(f"{what}, which cannot be saved; put back what it stands for, or leave it out.")
        if library not in CARRIED:
            raise ValueError(
                f"{what} of the module {cls.__module__}. A saved pipeline holds the source of its classes, and only "
                "that of flowsr, or what came with a checkpoint, is given away. Save a pipeline of flowsr's classes "
                "without it, and pass your object to `from_pretrained`."
            )
        text = single_file(Path(inspect.getsourcefile(cls)))
        stem = "pipeline" if part is pipe else re.sub(r"_[0-9a-f]{8}$", "", cls.__module__.rpartition(".")[2])
        sources[name] = (f"{stem}_{hashlib.sha256(text.encode()).hexdigest()[:8]}", cls.__name__, text)
    return sources
