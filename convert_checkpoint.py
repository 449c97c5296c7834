"""Turns a checkpoint of an original project into a pipeline folder.

    python convert_checkpoint.py runs/sr_x4/checkpoints/step_1000.pt CONVERTED
    python convert_checkpoint.py step_1000.pt CONVERTED --weights model --push_to_hub me/my-upscaler

Then `FlowMatchSRPipeline.from_pretrained("CONVERTED")` gives the original's numbers. Recognised today: `step_N.pt` of
the flow-matching x4 project and `*_best.pth` of the DDPM project, and bare state dicts of both, also as safetensors.
"""

import argparse
import sys
from pathlib import Path

from flowsr.conversion import convert


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help=".pt, .pth or .safetensors file")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema", help="which of a training state")
    parser.add_argument("--scale", type=int, default=4, help="HR pixels per LR pixel (default: 4)")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="also upload it")
    options = parser.parse_args(arguments)
    try:
        if Path(options.output).exists() and any(Path(options.output).iterdir()):
            raise ValueError(f"{options.output} is not empty; name a new folder.")
        pipe = convert(options.checkpoint, ema=options.weights == "ema", scale=options.scale)
        pipe.save_pretrained(options.output)
        size, predicts = pipe.unet.num_parameters(), pipe.scheduler.config.prediction_type
        print(f"{type(pipe).__name__}, {size:,} parameters, x{pipe.scale_factor}, {predicts}, in {options.output}.")
        if options.push_to_hub:
            print(pipe.push_to_hub(options.push_to_hub))
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
