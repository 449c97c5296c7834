"""Few steps of DDIM against a thousand ancestral ones, of one trained diffusion.

    python benchmarks/samplers.py runs/small_ddpm Set5/HR --lr Set5/LRx4 --lpips_weights lpips_squeeze_v0.1.safetensors

Prints the numbers of `flowsr evaluate`, a row for each sampler.
"""

import argparse

from diffusers import DDIMScheduler, DDPMScheduler, UniPCMultistepScheduler

from flowsr.evaluation import load_pairs, measure_steps
from flowsr.loading import load

SAMPLERS = {  # name: scheduler, its own settings, steps
    "UniPC": (UniPCMultistepScheduler, {}, 10),
    "DDIM": (DDIMScheduler, {"timestep_spacing": "trailing"}, 50),
    "DDPM, ancestral": (DDPMScheduler, {}, 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder of a DDPMSRPipeline")
    parser.add_argument("hr", help="folder of test pictures")
    parser.add_argument("--lr", default=None, help="folder of their LR (default: made in MATLAB's convention)")
    parser.add_argument("--lpips_weights", default=None, help="safetensors of LPIPS v0.1 with SqueezeNet")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    pipe = load(options.checkpoint)
    pairs = load_pairs(options.hr, options.lr, pipe.scale_factor)
    print("| sampler | steps | PSNR-Y | SSIM-Y | LPIPS | detail | s / MP |\n|---|---|---|---|---|---|---|")
    for number, (name, (scheduler, settings, steps)) in enumerate(SAMPLERS.items()):
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
        result = measure_steps(pipe, pairs, [steps], seed=options.seed, lpips_weights=options.lpips_weights)
        rows = result["rows"] if number == 0 else result["rows"][1:]  # bicubic once
        for row in rows:
            label, count = (name, steps) if row["method"] != "bicubic" else ("bicubic", 0)
            lpips = f"{row['lpips']:.3f}" if "lpips" in row else "-"
            print(
                f"| {label} | {count} | {row['psnr_y']:.2f} | {row['ssim_y']:.3f} | {lpips} | {row['detail']:.2f} | "
                f"{row['seconds_per_megapixel']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
