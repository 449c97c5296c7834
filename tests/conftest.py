"""Tiny real components; nothing here needs a network connection."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler

from flowsr import (
    ContextUNetSRModel,
    DDPMSRPipeline,
    EncodedSRModel,
    FlowMatchPipeline,
    FlowMatchSREulerScheduler,
    FlowMatchSRPipeline,
    UNetSRModel,
)

ROOT = Path(__file__).resolve().parents[1]
TINY = {"block_out_channels": (8,), "layers_per_block": 1, "mid_layers": 1, "time_embedding_dim": 16}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_unet(**config) -> UNetSRModel:
    """A small network with random weights everywhere, also where a fresh network has zeros."""
    unet = UNetSRModel(**{**TINY, **config}).eval()
    generator = seeded()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return unet


def make_encoded(**config) -> EncodedSRModel:
    """A small network that encodes once, with random weights everywhere."""
    sizes = {"encoder_channels": 8, "encoder_blocks": 2, "head_channels": 8, "head_blocks": 1, "time_embedding_dim": 8}
    model = EncodedSRModel(**{**sizes, **config}).eval()
    generator = seeded()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    return model


def make_pipeline(scheduler: dict | None = None, **config) -> FlowMatchSRPipeline:
    pipe = FlowMatchSRPipeline(make_unet(**config), FlowMatchSREulerScheduler(**(scheduler or {})))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_context_unet(**config) -> ContextUNetSRModel:
    small = {"block_out_channels": (8, 16), "layers_per_block": 1, "time_embedding_dim": 8, "context_channels": 8}
    unet = ContextUNetSRModel(**{**small, **config}).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded())
    return unet


def make_ddpm(unet=None, scheduler=None, target="residual", residual_std=1.0) -> DDPMSRPipeline:
    scheduler = scheduler or DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        timestep_spacing="trailing", rescale_betas_zero_snr=False,
    )  # fmt: skip
    pipe = DDPMSRPipeline(unet or make_context_unet(), scheduler, target, residual_std=residual_std)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_generator(classes: int | None = 3, **kwargs) -> FlowMatchPipeline:
    unet = make_unet(
        in_channels=1, out_channels=1, lr_channels=None, scale_factor=1, patch_size=1, precondition=False,
        num_class_embeds=classes, condition_dropout=0.1,
    )  # fmt: skip
    scheduler = FlowMatchSREulerScheduler(source="noise", source_noise_std=1.0, prediction_type="velocity")
    pipe = FlowMatchPipeline(unet, scheduler, sample_size=[8, 12], **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_encoded_pipeline(**config) -> FlowMatchSRPipeline:
    pipe = FlowMatchSRPipeline(
        make_encoded(**config), FlowMatchSREulerScheduler(source="prior", noise="positional", evaluate_shift=1.05)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_picture(width: int, height: int, mode: str = "RGB", seed: int = 0) -> PIL.Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(levels).convert(mode)


def smooth_picture(width: int, height: int) -> PIL.Image.Image:
    """Waves of a few wave lengths: something that a network can learn to upscale."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 5 + c) * np.cos(y / (7 + c)) + np.sin((x + y) / (3 + c)) for c in range(3)]
    return PIL.Image.fromarray((np.stack(waves, -1) * 60 + 128).clip(0, 255).astype(np.uint8))


@pytest.fixture
def pipe() -> FlowMatchSRPipeline:
    return make_pipeline()


@pytest.fixture
def photo_folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(9):
        smooth_picture(100 + 8 * number, 96).save(folder / f"{number}.png")
    return folder


def run_without_flowsr(script: str, folder: Path) -> str:
    """What a script prints in a clean process that works in `folder`, cannot import flowsr and reaches no Hub."""
    absent = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "flowsr":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""
    environment = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", absent + script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@dataclass
class Finished:
    """How a run of train_sr.py ended: its exit status (negative for a signal) and all that it printed."""

    status: int
    output: str


@pytest.fixture(scope="session")
def train_script(tmp_path_factory):
    """`train_script(*arguments, ...)` runs train_sr.py on one thread and returns how it `Finished`."""
    log = tmp_path_factory.mktemp("train_script") / "log.txt"
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("forkserver.py"))],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path_factory.mktemp("hf_home"))},
    )  # fmt: skip

    def run(*arguments, folder=ROOT, kill=None, terminate_at=None, file_limit=None) -> Finished:
        log.write_text("")
        request = {
            "arguments": [str(argument) for argument in arguments], "folder": str(folder), "log": str(log),
            "kill": kill, "terminate_at": terminate_at, "file_limit": file_limit,
        }  # fmt: skip
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Finished(json.loads(server.stdout.readline()), log.read_text())

    yield run
    server.stdin.close()
    server.wait()
