"""What README.md and docs/ tell a reader to type works: their blocks are run from top to bottom, page by page.

Each page has a folder with the files of EVERYWHERE and GIVEN. The Python blocks of a page share their names, as in one
session. `flowsr ...` runs in this process, trainings run for two steps. A block below `<!-- not run: REASON -->` is
not run; its commands are still read by their parsers.
"""

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import ROOT, seeded

from flowsr import FlowMatchSRPipeline, bundled
from flowsr.cli import main, parser
from flowsr.training.settings import Settings

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
FEW_STEPS = ("--max_train_steps", "2", "--checkpointing_steps", "2", "--num_validation_images", "0")
SMALL_STEPS = ("--train_batch_size", "1", "--resolution", "64")


@dataclass
class Block:
    """A fenced block: its page, line, language and content; `reason`, if any, is why it is not run."""

    page: Path
    line: int
    language: str
    code: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line of a shell block."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Block(page, line, match["language"], match["code"], match["reason"]))
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
RUN = [page for page in PAGES if any(b.language in ("bash", "python") and not b.reason for b in blocks_of(page))]


# What a page finds. A file is given by a function that writes it, a name of Python by its value.


def photo(name: str, width: int = 48, height: int = 40, source: str = "kitten.png"):
    """Writes a piece of an example photo into the folder."""

    def write(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with PIL.Image.open(ROOT / "examples" / source) as whole:
            whole.convert("RGB").crop((100, 80, 100 + width, 80 + height)).save(path)

    return write


def photos(name: str, width: int = 48, height: int = 40):
    """A folder of three photos."""

    def write(folder: Path) -> None:
        for number, source in enumerate(("kitten.png", "budgie.png", "kitten.png")):
            photo(f"{name}/{number}.png", width + 8 * number, height, source)(folder)

    return write


def pairs(name: str):
    """A folder HR with two pictures, and LRx4 as the pipeline's authors publish it."""

    def write(folder: Path) -> None:
        from flowsr.degradations import matlab_bicubic

        photos(f"{name}/HR", 64, 48)(folder)
        (folder / name / "LRx4").mkdir()
        for path in (folder / name / "HR").iterdir():
            with PIL.Image.open(path) as hr:
                PIL.Image.fromarray(matlab_bicubic(np.asarray(hr), 4)).save(folder / name / "LRx4" / path.name)

    return write


def lpips_weights(folder: Path) -> None:
    """Random values in the shapes of LPIPS v0.1 with SqueezeNet."""
    from safetensors.torch import save_file

    from flowsr.lpips import FIRES, Fire

    state = {f"backbone.0.{k}": v for k, v in torch.nn.Conv2d(3, 64, 3).state_dict().items()}
    state |= {f"backbone.{n}.{k}": v for n, sizes in FIRES.items() for k, v in Fire(*sizes).state_dict().items()}
    widths = (64, 128, 256, 384, 384, 512, 512)
    state |= {f"lin{n}.weight": torch.rand(1, width, 1, 1) for n, width in enumerate(widths)}
    save_file(state, folder / "lpips_squeeze_v0.1.safetensors")


def crops() -> dict[str, torch.Tensor]:
    hr, lr = (torch.rand(2, 3, side, side, generator=seeded()) * 2 - 1 for side in (64, 16))
    return {"hr": hr, "lr": lr, "index": torch.arange(2)}


def pipeline() -> FlowMatchSRPipeline:
    return FlowMatchSRPipeline.from_pretrained(bundled("x4"))


def saved(name: str):
    """A saved pipeline."""
    return lambda folder: pipeline().save_pretrained(folder / name)


EVERYWHERE = [photo(name) for name in ("photo.png", "photo.jpg", "photo.tif", "small.png", "old.jpg", "mask.png")]
EVERYWHERE += [photos("photos"), photos("PHOTOS", 96, 96), pairs("Set5"), lpips_weights]
GIVEN = {
    "docs/converting.md": {"files": [saved("PIPELINE")]},
    "docs/scale.md": {
        "names": {
            "pipe": pipeline,
            "image": lambda: np.random.default_rng(0).random((130, 140, 3)),
            "top": lambda: 60,
            "left": lambda: 60,
            "torch": lambda: torch,
            "reader": lambda: np.zeros((24, 32, 3), np.uint8),
            "writer": lambda: np.zeros((96, 128, 3), np.uint8),
        },
    },
    "docs/training.md": {"names": {"crops": crops}},
}


@pytest.fixture
def shell(train_script, monkeypatch):
    """`shell(words, folder)` runs one command of a shell block."""

    def run(words: list[str], folder: Path) -> None:
        if words[0] == "flowsr":
            assert main(words[1:]) == 0
        elif "train_sr.py" in words:
            arguments = [*words[words.index("train_sr.py") + 1 :], *FEW_STEPS, *SMALL_STEPS]
            if "--teacher" in arguments:
                arguments += ["--teacher", "PHOTOS"]  # ready pictures instead of another network's
            done = train_script(*arguments, folder=folder)
            assert done.status == 0, done.output
        elif words[:2] == ["pip", "install"]:
            return  # the extras that it names are looked up elsewhere
        elif words[0] == "python":
            monkeypatch.setattr("sys.argv", words[1:])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / words[1]), run_name="__main__")
            assert not ended.value.code
        else:
            raise ValueError(f"Nobody knows how to run {words[0]} here; say `<!-- not run: REASON -->` above.")

    return run


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_from_top_to_bottom(page, shell, tmp_path, monkeypatch):
    given = GIVEN.get(str(page.relative_to(ROOT)), {})
    monkeypatch.chdir(tmp_path)
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for write in [*EVERYWHERE, *given.get("files", ())]:
        write(tmp_path)
    names = {name: make() for name, make in given.get("names", {}).items()}
    for block in blocks_of(page):
        if block.reason:
            continue
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
        elif block.language == "bash":
            for words in block.commands:
                try:
                    shell(words, tmp_path)
                except (AssertionError, ValueError, SystemExit) as error:
                    pytest.fail(f"{block}: {shlex.join(words)}\n{error}")


def test_the_site_builds(tmp_path):
    """Every page is in the navigation, every link and anchor leads somewhere, every docstring of the API is read."""
    needed = ("mkdocs", "material", "mkdocstrings")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"the site needs {', '.join(missing)}: pip install '.[docs]', or `make docs`")
    call = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d"]
    done = subprocess.run([*call, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "num_inference_steps" in (tmp_path / "api/index.html").read_text()


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_read_by_their_parsers(block, extras):
    settings = {field.name for field in fields(Settings)} | {"config"}
    for words in block.commands:
        script = next((word for word in words if word.endswith(".py")), None)
        flags = {word.split("=")[0].removeprefix("--") for word in words if word.startswith("--")}
        if words[0] == "flowsr":
            parser().parse_args(words[1:])
        elif script == "train_sr.py":
            after = words[words.index(script) :]
            assert {word.removeprefix("--") for word in after if word.startswith("--")} <= settings, words
        elif script:
            source = (ROOT / script).read_text()
            assert all(f'"--{flag}"' in source for flag in flags), words
        named = re.findall(r"\[([\w,]+)\]", " ".join(words)) if "install" in words else []
        assert {extra for group in named for extra in group.split(",")} <= extras, words


@pytest.fixture(scope="module")
def extras() -> set[str]:
    """The names of the optional requirements in setup.py."""
    read = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("setuptools.setup", lambda **options: read.update(options))
        runpy.run_path(str(ROOT / "setup.py"))
    return set(read["extras_require"])


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


def test_every_reason_is_a_reason():
    """A marker that no block follows would be a typing error, and leave a block unrun or run without notice."""
    for page in PAGES:
        assert page.read_text(encoding="utf-8").count("<!-- not run") == sum(bool(b.reason) for b in blocks_of(page))
