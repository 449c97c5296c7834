"""Size on disk, seconds per picture and PSNR of one network made smaller or faster by known tools.

    python benchmarks/smaller.py Set5/HR --lr Set5/LRx4
    python benchmarks/smaller.py Set5/HR --lr Set5/LRx4 --variants float32 bfloat16 onnx --threads 2

Every variant upscales all pictures twice; the second time counts, so that compilation and warming up do not. Sizes are
those of the weights (of the ONNX file). torchao's int8 reaches linear layers alone, which in a network of convolutions
are few; the rest of the weights stays bfloat16 there.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from diffusers import TorchAoConfig

from flowsr import FlowMatchSRPipeline
from flowsr.evaluation import load_pairs, measure_steps
from flowsr.loading import load, resolve

VARIANTS = ("float32", "bfloat16", "compile", "int8", "int8-dynamic", "onnx")


def make(variant: str, checkpoint: str, folder: Path) -> tuple[FlowMatchSRPipeline, int]:
    """The pipeline with its network as `variant`, and the bytes of that network, which is saved in `folder`.

    Raises:
        ImportError: for a tool that is not installed.
    """
    pipe = load(checkpoint)
    if variant == "onnx":
        from flowsr.onnx import OnnxUNet, export

        export(pipe.unet, folder / "unet.onnx")
        pipe.unet = OnnxUNet(folder / "unet.onnx")
    elif variant.startswith("int8"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

        kind = Int8WeightOnlyConfig if variant == "int8" else Int8DynamicActivationInt8WeightConfig
        pipe.unet = type(pipe.unet).from_pretrained(
            resolve(checkpoint),
            subfolder="unet",
            quantization_config=TorchAoConfig(kind()),
            torch_dtype=torch.bfloat16,
        )
        pipe.unet.save_pretrained(folder)
    else:
        pipe.to(torch.bfloat16 if variant == "bfloat16" else torch.float32)
        pipe.unet.save_pretrained(folder)
        if variant == "compile":
            parts = (pipe.unet.encoder, pipe.unet.head) if hasattr(pipe.unet, "encode") else (pipe.unet,)
            for part in parts:  # `encode` does not go through the whole network's call
                part.compile(dynamic=True)
    return pipe, sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hr", help="folder of test pictures")
    parser.add_argument("--lr", default=None, help="folder of their LR (default: made in MATLAB's convention)")
    parser.add_argument("--checkpoint", default="x4", help="name, folder or Hub id (default: x4)")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations per picture (default: 1)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    checkpoint = options.checkpoint
    pairs = None
    print("| variant | size on disk | seconds per picture | PSNR-Y |\n|---|---|---|---|", flush=True)
    for variant in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            try:
                pipe, size = make(variant, checkpoint, Path(folder))
            except ImportError as error:
                print(f"| {variant} | not measured: {error} | | |", flush=True)
                continue
            pairs = pairs or load_pairs(options.hr, options.lr, pipe.scale_factor)
            for _ in range(2):
                row = measure_steps(pipe, pairs, [options.steps])["rows"][-1]
        megapixels = sum(pair.hr.shape[0] * pair.hr.shape[1] for pair in pairs) / 1e6 / len(pairs)
        seconds = row["seconds_per_megapixel"] * megapixels
        print(f"| {variant} | {size / 1e6:.2f} MB | {seconds:.3f} | {row['psnr_y']:.2f} |", flush=True)
    print(f"\n{options.steps} step(s), mean of {len(pairs)} pictures, {options.threads} threads")


if __name__ == "__main__":
    main()
