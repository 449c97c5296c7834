"""train_sr.py on CPU processes that Accelerate takes for GPUs, where alone it shards weights and scales losses."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import DistributedType, PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_sr
from flowsr.training import settings


def set_device(state: PartialState) -> None:
    state.device = torch.device("cpu")


class AcceleratorWithLossScale(Accelerator):
    def __init__(self, **settings):
        super().__init__(**settings)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # too much at first, to see it fall


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = set_device
    train_sr.Accelerator = AcceleratorWithLossScale
    settings.has_gpu = lambda: True
    train_sr.main(sys.argv[1:])
