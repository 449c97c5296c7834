"""The network as an ONNX file of any picture size, and that file in place of the network.

    export(pipe.unet, "unet.onnx")
    pipe.unet = OnnxUNet("unet.onnx")
    pipe(image)

Source noise, steps, tiles and consistency stay the pipeline's; only the network runs in onnxruntime. A network that
encodes becomes two files: the head under the given name, and its encoder beside it as `*.encoder.onnx`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from flowsr.models.encoded_sr import SREncoding

WAY_OUT = "pip install 'flowsr[onnx]'"


def export(unet: ModelMixin, path: str | Path) -> None:
    """Writes a super-resolution network, its weights and its config to one ONNX file.

    The file takes `sample` `(batch, c, H, W)`, `timestep` `(batch,)` and `lr` `(batch, c, H / scale, W / scale)`, all
    float32, and answers `prediction` of the shape of `sample`; batch and sizes are free, H and W in steps of
    `unet.size_multiple`. A network that encodes is written in two: its encoder takes `lr` and answers `features` and
    `mean`, which its head takes in place of `lr`.

    Raises:
        ValueError: for a network without LR, or with weights that are not float32.
        ImportError: without the packages of the extra `onnx`.
    """
    config = json.loads(unet.to_json_string())
    if config.get("lr_channels") is None or config.get("num_class_embeds") is not None:
        raise ValueError("Only networks with an LR condition and without classes can be exported.")
    if unet.dtype != torch.float32:
        raise ValueError(f"The weights must be float32 for the export, got {unet.dtype}; call `unet.float()` first.")
    try:
        import onnxscript  # noqa: F401  (what torch's exporter is written in)
    except ImportError as error:
        raise ImportError(f"The export needs onnxscript: {WAY_OUT}") from error

    scale = config["scale_factor"]
    step = math.lcm(unet.size_multiple, scale)  # HR pixels
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))

    def image(channels: int, unit: int) -> tuple[torch.Tensor, dict]:
        """An example whose sides are twice and three times `unit`, and what of its shape is free."""
        free = {0: batch, 2: unit * rows if unit > 1 else rows, 3: unit * columns if unit > 1 else columns}
        return torch.zeros(2, channels, 2 * unit, 3 * unit), free

    about = {"config": config} | {name: getattr(unet, name) for name in PROPERTIES if hasattr(unet, name)}
    sample, lr = image(config["in_channels"], step), image(config["lr_channels"], step // scale)
    inputs = {"sample": sample, "timestep": (torch.zeros(2), {0: batch}), "lr": lr}
    network = unet.eval()
    if hasattr(unet, "encode"):
        features, mean = image(config["encoder_channels"], step // scale), image(config["out_channels"], step)
        write(Encoder(unet), {"lr": lr}, ["features", "mean"], encoder_path(path), {})
        inputs = {"sample": sample, "timestep": inputs["timestep"], "features": features, "mean": mean}
        network = Head(unet)
    write(network, inputs, ["prediction"], path, about)


PROPERTIES = ("size_multiple", "receptive_field", "encoder_receptive_field", "head_receptive_field")


class Encoder(torch.nn.Module):
    """LR -> features and mean."""

    def __init__(self, unet: ModelMixin):
        super().__init__()
        self.encoder = unet.encoder

    def forward(self, lr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(lr)


class Head(torch.nn.Module):
    """State, timestep and an encoding -> image."""

    def __init__(self, unet: ModelMixin):
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, features: torch.Tensor, mean: torch.Tensor
    ) -> torch.Tensor:
        return self.unet(sample, timestep, None, SREncoding(features, mean), return_dict=False)[0]


def encoder_path(path: str | Path) -> Path:
    return Path(path).with_suffix(".encoder.onnx")


def write(
    network: torch.nn.Module, inputs: dict[str, tuple[torch.Tensor, dict]], outputs: list[str], path, about: dict
) -> None:
    """One ONNX file of a network, with `about` in its metadata; `inputs` are examples with what of them is free."""
    program = torch.onnx.export(
        network,
        tuple(example for example, _ in inputs.values()),
        dynamo=True,
        verbose=False,
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes={name: free for name, (_, free) in inputs.items()},
    )
    program.model.metadata_props["flowsr"] = json.dumps(about)
    program.save(str(path))


class OnnxUNet(torch.nn.Module):
    """A file written by [`export`], called as the network was, on the CPU in float32.

    Args:
        path: of the file.
        providers (`list[str]`): of onnxruntime, such as `["CUDAExecutionProvider"]`.

    Raises:
        ValueError: for a file that [`export`] did not write.
        ImportError: without onnxruntime.
    """

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, path: str | Path, providers: list[str] = ["CPUExecutionProvider"]):
        super().__init__()
        self.session = open_session(path, providers)
        about = self.session.get_modelmeta().custom_metadata_map.get("flowsr")
        if about is None:
            raise ValueError(f"{path} holds no network of flowsr; write it with `flowsr.onnx.export`.")
        about = json.loads(about)
        self.config = FrozenDict(about.pop("config"))
        for name, value in about.items():  # fields and sizes, as the network has them
            setattr(self, name, value)
        if "head_receptive_field" in about:
            if not encoder_path(path).is_file():
                raise ValueError(f"{path} is the head of a network; its encoder {encoder_path(path)} is not there.")
            self.encoder_session = open_session(encoder_path(path), providers)
            self.encode = self.run_encoder  # whether a network has it tells pipelines that it encodes

    def run_encoder(self, lr: torch.Tensor) -> SREncoding:
        return SREncoding(*run(self.encoder_session, ["features", "mean"], {"lr": lr}))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        lr: torch.Tensor,
        drop_condition: torch.Tensor | None = None,
        encoding: SREncoding | None = None,
        return_dict: bool = True,
    ) -> BaseOutput | tuple[torch.Tensor]:
        if drop_condition is not None:
            raise ValueError("The ONNX file holds the network with its condition alone; leave `guidance_scale` at 1.")
        timestep = torch.as_tensor(timestep, dtype=torch.float32).expand(sample.shape[0])
        feed = {"sample": sample, "timestep": timestep, "lr": lr}
        if hasattr(self, "encode"):
            features, mean = self.encode(lr) if encoding is None else encoding
            feed = {"sample": sample, "timestep": timestep, "features": features, "mean": mean}
        (prediction,) = run(self.session, ["prediction"], feed)
        return BaseOutput(sample=prediction) if return_dict else (prediction,)


def open_session(path: str | Path, providers: list[str]):
    """A file in onnxruntime, on as many threads as torch has."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(f"An ONNX network needs onnxruntime: {WAY_OUT}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=providers)


def run(session, outputs: list[str], feed: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a session, on the device and in the type of the first input."""
    first = next(iter(feed.values()))
    arrays = {name: tensor.detach().cpu().float().contiguous().numpy() for name, tensor in feed.items()}
    return [torch.from_numpy(array).to(first) for array in session.run(outputs, arrays)]
