"""Checkpoints by any name that they have, and what an import costs."""

import subprocess
import sys

import pytest
import torch
from conftest import make_pipeline, random_picture
from diffusers import DDPMPipeline, ModelMixin, UNet2DModel
from diffusers.utils import logging

import flowsr
from flowsr.cli import main
from flowsr.conversion import write_single_file
from flowsr.loading import class_named, load, load_upscaler, resolve


def python(script: str, *options: str) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, *options, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("name", "cls"), [("x4", "FlowMatchSRPipeline"), ("ddpm_x4", "DDPMSRPipeline"), ("digits", "FlowMatchPipeline")]
)
def test_names_and_their_folders_give_one_pipeline(name, cls):
    by_name, by_folder = load(name), load(flowsr.bundled(name))
    assert type(by_name).__name__ == type(by_folder).__name__ == cls
    weights, same = by_name.unet.state_dict(), by_folder.unet.state_dict()
    assert weights and all(torch.equal(weights[key], same[key]) for key in weights | same)


def test_a_single_file_upscales_as_its_folder_does(tmp_path):
    pipe = make_pipeline(block_out_channels=(12,))
    pipe.save_pretrained(tmp_path / "folder")
    write_single_file(pipe, tmp_path / "one.safetensors")
    random_picture(6, 5).save(tmp_path / "a.png")
    for checkpoint in ("folder", "one.safetensors"):
        call = ["upscale", tmp_path / "a.png", "-o", tmp_path / f"{checkpoint}.png", "--no-provenance", "--checkpoint"]
        assert main([*map(str, call), str(tmp_path / checkpoint)]) == 0
    assert (tmp_path / "folder.png").read_bytes() == (tmp_path / "one.safetensors.png").read_bytes()
    assert load(tmp_path / "one.safetensors", dtype=torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_folder_goes_before_a_name_if_it_holds_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x4").mkdir()  # of pictures, say
    assert resolve("x4") == flowsr.bundled("x4")
    make_pipeline().save_pretrained("x4")
    assert resolve("x4") == "x4"
    assert resolve("me/x4") == "me/x4"


def test_what_is_no_checkpoint_is_named_with_what_is(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"1234")
    torch.save({}, tmp_path / "step_1.pt")
    cases = {
        "x9": "no bundled checkpoint 'x9'; these ship with flowsr: .*x4",
        str(tmp_path): "it has no model_index.json",
        str(tmp_path / "cut.safetensors"): "cut.safetensors cannot be loaded",
        str(tmp_path / "step_1.pt"): "convert_checkpoint.py step_1.pt FOLDER",
    }
    for checkpoint, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load(checkpoint)
    with pytest.raises(ValueError, match="generates pictures and upscales none"):
        load_upscaler("digits")
    with pytest.raises(ValueError, match="has a class 'VGG' that fits here"):
        class_named("VGG", ModelMixin)
    with pytest.raises(ValueError, match="has a class 'DDIMScheduler'"):
        class_named("DDIMScheduler", ModelMixin)


def test_a_host_program_keeps_its_verbosity():
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load("digits")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


def test_the_parser_is_built_without_torch():
    script = """
import sys
import flowsr.cli
flowsr.cli.parser()
flowsr.bundled("x4")
print([name for name in ("torch", "diffusers", "transformers", "numpy", "PIL") if name in sys.modules])
"""
    assert python(script).stdout.strip() == "[]"


def test_importing_flowsr_makes_its_components_available_to_diffusers(tmp_path):
    # A pipeline of diffusers with a scheduler of ours: diffusers imports nothing that a folder names.
    unet = UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1
    )
    DDPMPipeline(unet, flowsr.FlowMatchSREulerScheduler()).save_pretrained(tmp_path)
    script = f"""
import flowsr
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_library_or_raise
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
assert type(pipe.scheduler).__module__ == "flowsr.schedulers.scheduling_flow_match_sr_euler"
for name, module in flowsr.COMPONENTS.items():
    assert getattr(_get_library_or_raise(module), name) is getattr(flowsr, name), name
    assert getattr(flowsr, name).__module__ == module
import flowsr.models.unet_sr
from flowsr.schedulers.scheduling_flow_match_sr_euler import FlowMatchSREulerScheduler
assert flowsr.models.unet_sr.UNetSRModel is flowsr.UNetSRModel
assert FlowMatchSREulerScheduler is flowsr.FlowMatchSREulerScheduler
try:
    flowsr.absent
except AttributeError:
    print("available")
"""
    assert python(script).stdout.strip() == "available"


def test_no_import_prints_a_warning_of_what_is_not_used_and_others_still_do():
    script = """
import logging
import flowsr
flowsr.FlowMatchSRPipeline
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no kernels")
logger.warning("Something else failed.")
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logger.warning("Failed to load CPU gemm_4bit_forward again.")
"""
    lines = python(script).stderr.splitlines()
    assert lines == ["Something else failed.", "INFO Failed to load CPU gemm_4bit_forward again."]


def test_no_command_prints_it():
    done = subprocess.run([sys.executable, "-m", "flowsr", "info"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
