"""The network as an ONNX file of any picture size, and that file in place of the network.

    export(pipe.unet, "unet.onnx")
    pipe.unet = OnnxUNet("unet.onnx")
    pipe(image)

Source noise, steps, tiles and consistency stay the pipeline's; only the network runs in onnxruntime.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

WAY_OUT = "pip install 'flowsr[onnx]'"


def export(unet: ModelMixin, path: str | Path) -> None:
    """Writes a super-resolution network, its weights and its config to one ONNX file.

    The file takes `sample` `(batch, c, H, W)`, `timestep` `(batch,)` and `lr` `(batch, c, H / scale, W / scale)`, all
    float32, and answers `prediction` of the shape of `sample`; batch and sizes are free, H and W in steps of
    `unet.size_multiple`.

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
    example = (
        torch.zeros(2, config["in_channels"], 2 * step, 3 * step),
        torch.zeros(2),
        torch.zeros(2, config["lr_channels"], 2 * step // scale, 3 * step // scale),
    )
    program = torch.onnx.export(
        unet.eval(),
        example,
        dynamo=True,
        verbose=False,
        input_names=["sample", "timestep", "lr"],
        output_names=["prediction"],
        dynamic_shapes={
            "sample": {0: batch, 2: step * rows, 3: step * columns},
            "timestep": {0: batch},
            "lr": {0: batch, 2: step // scale * rows, 3: step // scale * columns},
        },
    )
    about = {"config": config, "size_multiple": unet.size_multiple, "receptive_field": unet.receptive_field}
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
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError(f"An ONNX network needs onnxruntime: {WAY_OUT}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        about = self.session.get_modelmeta().custom_metadata_map.get("flowsr")
        if about is None:
            raise ValueError(f"{path} holds no network of flowsr; write it with `flowsr.onnx.export`.")
        about = json.loads(about)
        self.config = FrozenDict(about["config"])
        self.size_multiple, self.receptive_field = about["size_multiple"], about["receptive_field"]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        lr: torch.Tensor,
        drop_condition: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> BaseOutput | tuple[torch.Tensor]:
        if drop_condition is not None:
            raise ValueError("The ONNX file holds the network with its condition alone; leave `guidance_scale` at 1.")
        timestep = torch.as_tensor(timestep, dtype=torch.float32).expand(sample.shape[0])
        feed = {"sample": sample, "timestep": timestep, "lr": lr}
        feed = {name: tensor.detach().cpu().float().contiguous().numpy() for name, tensor in feed.items()}
        prediction = torch.from_numpy(self.session.run(["prediction"], feed)[0]).to(sample)
        return BaseOutput(sample=prediction) if return_dict else (prediction,)
