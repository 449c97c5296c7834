"""train_sr.py under FSDP on CPU processes: Accelerate shards on GPUs alone, so it is told that these are such."""

import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_sr


def set_device(state: PartialState) -> None:
    state.device = torch.device("cpu")


PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = set_device
train_sr.main(sys.argv[1:])
