"""Turns a checkpoint into a pipeline folder, or into a single file.

    python convert_checkpoint.py runs/sr_x4/checkpoints/step_1000.pt CONVERTED
    python convert_checkpoint.py runs/x4/checkpoint-1000 FOLDER          # of train_sr.py
    python convert_checkpoint.py FOLDER upscaler.safetensors             # all in one file ...
    python convert_checkpoint.py upscaler.safetensors FOLDER             # ... and back, bit for bit
    python convert_checkpoint.py step_1000.pt CONVERTED --weights model --push_to_hub me/my-upscaler

Then `FlowMatchSRPipeline.from_pretrained("CONVERTED")` gives the original's numbers. Recognised: `step_N.pt` of the
flow-matching x4 project and `*_best.pth` of the DDPM project, and bare state dicts of both, also as safetensors;
checkpoints of train_sr.py; pipeline folders; single files.
"""

import argparse
import sys
from pathlib import Path

from flowsr.conversion import convert, write_single_file


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help=".pt, .pth or .safetensors file, or folder")
    parser.add_argument("output", help="folder to write, or .safetensors file for all in one")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which of a training state")
    parser.add_argument("--scale", type=int, default=4, help="HR pixels per LR pixel (default: 4)")
    parser.add_argument(
        "--prediction_type",
        choices=("epsilon", "v_prediction"),
        help="of a network of the DDPM project (default: as its file name says, else v_prediction)",
    )
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="also upload it")
    options = parser.parse_args(arguments)
    try:
        output = Path(options.output)
        if output.is_file() or (output.is_dir() and any(output.iterdir())):
            raise ValueError(f"{output} exists and is not empty; name a new one.")
        ema = options.weights == "ema"
        pipe = convert(options.checkpoint, ema, options.scale, options.prediction_type)
        if output.suffix == ".safetensors":
            write_single_file(pipe, output)
        else:
            pipe.save_pretrained(output)
        scale, predicts = pipe.unet.config.scale_factor, pipe.scheduler.config.prediction_type
        size = pipe.unet.num_parameters()
        print(f"{type(pipe).__name__}, {size:,} parameters, x{scale}, {predicts}, in {output}.")
        if options.push_to_hub:
            print(pipe.push_to_hub(options.push_to_hub))
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
