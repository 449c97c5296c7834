"""What stays at home when a pipeline travels: its model card, its way to the Hub and back, and the errors there."""

from __future__ import annotations

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, create_repo, upload_folder
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import yaml_dump

from flowsr.card import KEPT, model_card
from flowsr.loading import InstalledClassesMixin, load

# The first is the root of all errors of the HTTP library beneath huggingface_hub, whichever that is.
NETWORK_ERRORS = (HfHubHTTPError.__bases__[0], ConnectionError, TimeoutError)
TEMPLATE = "This model card has been automatically generated"  # in the empty card of diffusers


class HubMixin(InstalledClassesMixin):
    """For a `DiffusionPipeline` of the installed flowsr: a model card for what is pushed, and errors of one line."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As [`DiffusionPipeline.save_pretrained`]; with `push_to_hub=True` it raises what `push_to_hub` raises."""
        repo_id = kwargs.get("repo_id", os.path.basename(save_directory))
        with clear_errors(repo_id, "was not changed on the Hub"):
            super().save_pretrained(os.fspath(save_directory), *args, **kwargs)

    def estimate(self, size: tuple[int, int], num_inference_steps: int = 4, **options):
        """What upscaling a picture of this width and height will take: see [`~flowsr.estimate.estimate`]."""
        from flowsr.estimate import estimate

        return estimate(self, size, num_inference_steps=num_inference_steps, **options)

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
    """A Python source in which those that it imports from beside it stand in front of it, each once.

    Raises:
        ValueError: for an import from beside it that one file cannot hold.
    """
    parts, done = ["from __future__ import annotations\n"], set()

    def add(path: Path) -> None:
        done.add(path.name)
        text = path.read_text(encoding="utf-8")
        tree, lines = ast.parse(text), text.splitlines()
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imports = [node for node in imports if node.level or node.module == "__future__"]
        for node in imports:
            if not node.level:
                continue
            renamed = any(name.asname or name.name == "*" for name in node.names)
            if node not in tree.body or node.level > 1 or not node.module or "." in node.module or renamed:
                raise ValueError(
                    f"{path}, line {node.lineno}: `{ast.unparse(node)}` cannot travel with a checkpoint, which holds "
                    "one file of code for each class. Import names at the top and as they are: `from .x import name`."
                )
            if f"{node.module}.py" not in done:
                add(path.with_name(f"{node.module}.py"))
        for node in reversed(imports):
            del lines[node.lineno - 1 : node.end_lineno]
        parts.append("\n".join(lines).strip() + "\n")

    add(source)
    return "\n\n".join(parts) if len(done) > 1 else source.read_text(encoding="utf-8")


def write_card(
    folder: str | Path,
    name: str | None = None,
    license: str | None = None,
    results: dict[str, str | Path] | None = None,
) -> Path:
    """Writes README.md of a pipeline folder from what lies in it.

    The numbers come from `evaluation.json`, the training from `settings.yaml`, the picture is `example.*`. Of a card
    written before, the licence, further metadata and the words below its last line stay.

    Args:
        folder: of a saved pipeline.
        name (`str`, *optional*): what readers load it by; default: the name of the folder.
        license (`str`, *optional*): of the weights.
        results (`dict`, *optional*): JSON files of `flowsr evaluate` by the name of the test set, to be added to
            `evaluation.json`.

    Raises:
        ValueError: if the folder holds no pipeline, or a README.md that was written by hand.
    """
    folder = Path(folder)
    pipe, readme, numbers = load_folder(folder), folder / "README.md", folder / "evaluation.json"
    old = ModelCard.load(readme) if readme.is_file() else None
    if old is not None:
        refuse_handwritten(old, str(readme))
    evaluation = json.loads(numbers.read_text(encoding="utf-8")) if numbers.is_file() else {}
    for test_set, path in (results or {}).items():
        evaluation[test_set] = json.loads(Path(path).read_text(encoding="utf-8"))
        if "rows" not in evaluation[test_set]:
            raise ValueError(f"{path} is not written by `flowsr evaluate --json`: it has no rows.")
    settings = folder / "settings.yaml"
    card = model_card(
        pipe,
        name or folder.resolve().name,
        license=license or (old.data.license if old is not None else None),
        evaluation=evaluation,
        settings=yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else None,
        picture=next((path.name for path in sorted(folder.glob("example.*"))), None),
    )
    data, below = card.data.to_dict(), ""
    if old is not None:
        tags = dict.fromkeys([*data["tags"], *(old.data.tags or [])])
        data, below = {**old.data.to_dict(), **data, "tags": list(tags)}, old.text.partition(KEPT)[2]
    readme.write_text(f"---\n{yaml_dump(data)}---\n\n{card.text.strip()}\n{below.lstrip(chr(10))}", encoding="utf-8")
    if results:
        numbers.write_text(json.dumps(evaluation, indent=1) + "\n", encoding="utf-8")
    return readme


def load_folder(folder: Path) -> HubMixin:
    """The pipeline of a folder, and of nothing else.

    Raises:
        ValueError: if the folder holds none.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no model_index.json.")
    return load(folder)


def refuse_handwritten(card: ModelCard, place: str) -> None:
    if KEPT not in card.text and TEMPLATE not in card.text:
        raise ValueError(f"{place} was written by hand. To have a card written above it, begin its text by\n{KEPT}")


def publish(
    folder: str | Path,
    repo_id: str,
    license: str | None = None,
    results: dict[str, str | Path] | None = None,
    private: bool | None = None,
) -> str:
    """Writes the card of a pipeline folder and uploads it, with weights, code, numbers and example.

    Neither settings nor logs nor states of a training are uploaded; the card has the settings, without paths. Words
    below the last line of a card on the Hub stay, where the card in the folder has none.

    Returns:
        The address of the commit.

    Raises:
        ValueError: for a folder without a pipeline, or a card written by hand, here or on the Hub.
        OSError: where the Hub does not answer or refuses; the repository is then what it was.
    """
    folder = Path(folder)
    pipe, readme = load_folder(folder), folder / "README.md"
    with clear_errors(repo_id, "was not changed on the Hub"):
        try:
            theirs = ModelCard.load(repo_id)
            refuse_handwritten(theirs, f"README.md of {repo_id} on the Hub")
            if not readme.is_file() or not readme.read_text(encoding="utf-8").partition(KEPT)[2].strip():
                theirs.save(readme)
        except (RepositoryNotFoundError, EntryNotFoundError):
            pass
    write_card(folder, repo_id, license, results)
    with tempfile.TemporaryDirectory() as made:
        for part in [*(folder / name for name in pipe.components), *folder.glob("example.*")]:
            if part.is_dir():
                shutil.copytree(part, Path(made) / part.name, ignore=shutil.ignore_patterns("*.py"))
            elif part.is_file():
                shutil.copy(part, made)
        for name in ("README.md", "evaluation.json"):
            if (folder / name).is_file():
                shutil.copy(folder / name, made)
        pipe.save_config(made)
        with clear_errors(repo_id, "was not changed on the Hub"):
            repo_id = create_repo(repo_id, exist_ok=True, private=private).repo_id
            commit = upload_folder(repo_id=repo_id, folder_path=made, commit_message=f"Upload {type(pipe).__name__}")
    return str(commit.commit_url)


def claim(repo_id: str) -> None:
    """Makes sure of a repository before the work whose result it is to take."""
    with clear_errors(repo_id, "cannot take the finished pipeline"):
        create_repo(repo_id, exist_ok=True)


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
