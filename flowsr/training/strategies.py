"""Several processes: what FSDP and DeepSpeed need to know, and what they cannot do here."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator
from accelerate.utils import DistributedType

from flowsr.training.optimizers import MAX_NORM
from flowsr.training.settings import Settings

STRICT_ABOUT_LAYOUT = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # weights in channels_last are refused


def fit_strategy(accelerator: Accelerator, settings: Settings) -> None:
    """Tells FSDP and DeepSpeed what they need to know; refuses what leaves a process without weights to average."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 hides the weights, of which averages are kept: choose `fsdp_version: 2`.")
    if accelerator.is_fsdp2 and settings.mixed_precision != "no":  # networks here keep pictures in float32 themselves
        fsdp = accelerator.state.fsdp_plugin
        exact = {"cast_forward_inputs": False, "output_dtype": None}
        fsdp.mixed_precision_policy = replace(fsdp.mixed_precision_policy, **exact)
    if deepspeed := accelerator.state.deepspeed_plugin:
        if settings.optimizer == "muon":
            raise ValueError("DeepSpeed flattens weights, and Muon needs matrices: use `optimizer: adamw`, or FSDP 2.")
        if deepspeed.zero_stage == 3:
            raise ValueError(
                "ZeRO stage 3 hides the weights, of which averages are kept: choose `zero_stage` 1 or 2, or FSDP 2."
            )
        deepspeed.deepspeed_config["gradient_clipping"] = MAX_NORM  # it clips by itself
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = settings.train_batch_size


def leave_together(accelerator: Accelerator) -> None:
    """Ends all processes at once: one that ends while the first still writes can fall over its own idle threads."""
    accelerator.wait_for_everyone()
    accelerator.end_training()
