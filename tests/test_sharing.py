"""Saved pipelines: one file of code that is complete, and one clear error for whatever is not to be loaded."""

import ast
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import make_pipeline, make_unet, random_picture
from diffusers import (
    ConfigMixin,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModelMixin,
    UNet2DModel,
)

from flowsr import DDPMSRPipeline, FlowMatchPipeline, FlowMatchSREulerScheduler, FlowMatchSRPipeline
from flowsr.cli import main
from flowsr.hub import single_file

PIPELINES = Path(__file__).resolve().parents[1] / "pipelines"


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("pipeline_*.py")), ids=lambda path: path.stem)
def test_the_single_file_is_complete_and_defines_nothing_twice(path):
    tree = ast.parse(single_file(path))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not any(node.level for node in imports)
    named = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    counts = Counter(named + [target.id for target in targets])
    assert [name for name, count in counts.items() if count > 1] == []
    # Imports from beside come under their own names, since that is what they have in one file.
    for source in PIPELINES.glob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.col_offset == 0, source
                assert not any(alias.asname for alias in node.names), source


@pytest.fixture
def folder(tmp_path):
    make_pipeline().save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_code_travels_under_a_name_of_its_content(folder, tmp_path):
    pipe = FlowMatchSRPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "again")
    names = [sorted(p.relative_to(f).as_posix() for p in f.rglob("*")) for f in (folder, tmp_path / "again")]
    assert names[0] == names[1]
    assert sum(name.endswith(".py") for name in names[0]) == 4
    # Folders of before, whose files had no digest, load as well.
    old = {"unet": ["unet_sr", "UNetSRModel"], "_class_name": ["pipeline", "FlowMatchSRPipeline"]}
    rewrite(folder / "model_index.json", **old)
    assert type(FlowMatchSRPipeline.from_pretrained(folder).unet).__module__ == "flowsr.models.unet_sr"


STABLE_DIFFUSION = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.20.0",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def test_pipelines_of_another_class_are_refused_with_the_way_to_load_them(folder, tmp_path):
    message = "model_index.json is of a {}, not of a {}; load it by {}.from_pretrained."
    for cls in (DDPMSRPipeline, FlowMatchPipeline):
        with pytest.raises(
            ValueError, match=message.format("FlowMatchSRPipeline", cls.__name__, "flowsr.FlowMatchSRPipeline")
        ):
            cls.from_pretrained(folder)
    unet = UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd/model_index.json").write_text(json.dumps(STABLE_DIFFUSION))
    for name, cls in {"ddpm": "DDPMPipeline", "sd": "StableDiffusionPipeline"}.items():
        with pytest.raises(
            ValueError, match=message.format(cls, "FlowMatchSRPipeline", "diffusers.DiffusionPipeline")
        ):
            FlowMatchSRPipeline.from_pretrained(tmp_path / name)


def test_a_compiled_network_is_saved_as_what_it_is(tmp_path):
    pipe = make_pipeline()
    pipe.unet = torch.compile(pipe.unet)
    pipe.save_pretrained(tmp_path)
    assert type(FlowMatchSRPipeline.from_pretrained(tmp_path).unet).__name__ == "UNetSRModel"
    assert [path.name[:8] for path in (tmp_path / "unet").glob("*.py")] == ["unet_sr_"]


class Derived(FlowMatchSRPipeline):
    pass


def test_a_derived_class_loads_what_its_base_saved(folder):
    assert type(Derived.from_pretrained(folder)) is Derived


class Private(ModelMixin, ConfigMixin):
    """A network that somebody defines in a script of their own."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))


def test_the_source_of_a_class_of_ones_own_does_not_travel(folder, tmp_path):
    unet, scheduler = make_unet(precondition=False), FlowMatchSREulerScheduler(source="prior")
    with_component = FlowMatchSRPipeline(unet, scheduler, prior=Private())
    for pipe, message in {
        with_component: "`prior` is a Private of the module test_sharing. A saved pipeline holds the source",
        Derived.from_pretrained(folder): "The pipeline is a Derived of the module test_sharing",
    }.items():
        for save in (pipe.save_pretrained, pipe.save_config):
            with pytest.raises(ValueError, match=message):
                save(tmp_path / "new")
        with pytest.raises(ValueError, match=message):  # before the Hub is asked for a repository
            pipe.push_to_hub("me/new")
    assert not (tmp_path / "new").exists()
    FlowMatchSRPipeline.from_pipe(Derived.from_pretrained(folder)).save_pretrained(tmp_path / "new")  # the way out
    assert (tmp_path / "new/model_index.json").is_file()


def test_a_component_that_cannot_be_saved_is_named_before_anything_is_written(tmp_path):
    pipe = make_pipeline()
    pipe.unet = torch.nn.Identity()
    with pytest.raises(ValueError, match="`unet` is a Identity, which cannot be saved"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "line", ["from . import beside", "from .beside import *", "from .beside import x as y", "from ..models import x"]
)
def test_an_import_that_one_file_cannot_hold_is_named(line, tmp_path):
    (tmp_path / "beside.py").write_text("x = 1\n")
    for text in (line, f"def f():\n    {line}" if "*" not in line else line):
        (tmp_path / "component.py").write_text(f"import os\n{text}\n")
        with pytest.raises(ValueError, match=r"component.py, line \d: `from .*` cannot travel with a checkpoint"):
            single_file(tmp_path / "component.py")


def test_cards_and_errors_of_the_hub_stay_at_home(folder):
    for path in folder.rglob("*.py"):
        for word in ("huggingface_hub", "ModelCard", "403"):
            assert word not in path.read_text(), path


NEWER = {
    "a setting of the network": ("unet/config.json", {"gated_blocks": True}, "unet has gated_blocks"),
    "a setting of the flow": ("scheduler/scheduler_config.json", {"warp": 2.0}, "scheduler has warp"),
    "a component": ("model_index.json", {"afterglow": ["afterglow_net", "AfterglowNet"]}, "has afterglow"),
    "a class": ("model_index.json", {"unet": ["unet_sr_01234567", "UNetSRModel2"]}, "has UNetSRModel2"),
}


@pytest.mark.parametrize("what", NEWER)
def test_what_a_newer_version_saved_is_refused_rather_than_half_understood(folder, what):
    path, changes, message = NEWER[what]
    rewrite(folder / path, **changes)
    with pytest.raises(ValueError, match=f"{message}.*newer flowsr. Update flowsr, or run the code") as error:
        FlowMatchSRPipeline.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_settings_of_a_compatible_scheduler_are_no_newer_version(tmp_path):
    scheduler = FlowMatchSREulerScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    FlowMatchSRPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    assert FlowMatchSRPipeline.from_pretrained(tmp_path).scheduler.config.shift == 3.0


def test_the_command_line_says_it_in_one_line(folder, tmp_path, capsys):
    random_picture(4, 4).save(tmp_path / "a.png")
    torch.save({"model": {}}, tmp_path / "step_10.pt")
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd/model_index.json").write_text(json.dumps(STABLE_DIFFUSION))
    rewrite(folder / "unet/config.json", gated_blocks=True)
    cases = {
        tmp_path / "step_10.pt": "`python convert_checkpoint.py step_10.pt FOLDER`",
        tmp_path / "sd": "is of a StableDiffusionPipeline, not of a FlowMatchSRPipeline",
        folder: "has gated_blocks, which the installed UNetSRModel does not know",
        tmp_path / "absent": "There is no checkpoint folder",
        tmp_path: "it has no model_index.json",
    }
    for checkpoint, message in cases.items():
        arguments = ["upscale", tmp_path / "a.png", "-o", tmp_path / "out", "--checkpoint", checkpoint]
        assert main([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("flowsr: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
