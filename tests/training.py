"""How tests call train_sr.py, and read back what a run left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
FSDP = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP")
ALONE = ("--num_processes", "1")
DEEPSPEED = ("--use_deepspeed", "--zero_stage", "2")


def tiny(photos, output, *arguments) -> list:
    return ["--config", "configs/tiny.yaml", "--train_data_dir", photos, "--output_dir", output, *arguments]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    return [record["loss"] for record in records(output) if "loss" in record]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def launch(processes: int, *arguments) -> subprocess.CompletedProcess:
    """By accelerate's launcher; `--cpu` would start several processes through MPI alone."""
    how = ["--cpu"] if processes == 1 else ["--multi_gpu", "--num_processes", str(processes)]
    program = ["accelerate.commands.launch", *how]
    call = [sys.executable, "-m", *program, str(ROOT / "train_sr.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment)


def launch_as_on_gpus(how: tuple[str, ...], *arguments) -> None:
    if how is DEEPSPEED:
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install deepspeed")
    program = ["accelerate.commands.launch", "--num_processes", "2", *how, ROOT / "tests/train_as_on_gpus.py"]
    call = map(str, [sys.executable, "-m", *program, *arguments])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
