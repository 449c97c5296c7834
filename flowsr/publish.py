"""Describes a folder with a saved pipeline by its model card, and uploads both to the Hub."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, create_repo, upload_folder
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import yaml_dump

import flowsr
from flowsr.pipelines.card import KEPT, model_card
from flowsr.pipelines.sharing import OF_THIS_LIBRARY, TEMPLATE, SelfContainedMixin, clear_errors


def load_any(place: str | Path) -> SelfContainedMixin:
    """The pipeline in a folder, of whichever class of this library it is.

    Raises:
        ValueError: if the folder holds none.
    """
    index = Path(place) / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{place} is not a checkpoint folder: it has no model_index.json.")
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    name = name[-1] if isinstance(name, list) else name
    return getattr(flowsr, name if name in OF_THIS_LIBRARY else "FlowMatchSRPipeline").from_pretrained(str(place))


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
    pipe, readme, numbers = load_any(folder), folder / "README.md", folder / "evaluation.json"
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
    folder, pipe = Path(folder), load_any(folder)
    readme = folder / "README.md"
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
