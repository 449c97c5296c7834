"""The original recipe and ours, side by side: the same photos, machine and time. Prints a table.

    python benchmarks/recipes.py PHOTOS --minutes 10 --hr Set5/HR --lr Set5/LRx4

The original is configs/seed_flow_x4.yaml (U-Net on the HR grid, velocity from noise), ours configs/flow_unet_x4.yaml.
Each gets a run of train_sr.py that is ended by a signal after the given minutes; the last checkpoint is measured.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from flowsr.conversion import convert  # noqa: E402
from flowsr.evaluation import load_pairs, measure_steps  # noqa: E402
from flowsr.training import checkpoints  # noqa: E402

RECIPES = {"original": ("seed_flow_x4", [8]), "flowsr": ("flow_unet_x4", [1, 4])}  # config, numbers of steps measured


def train(name: str, output: Path, minutes: float, **settings) -> dict:
    """Trains by a config for so many minutes from the first logged loss on; the last record of its metrics."""
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    config.pop("dataset_name", None)
    config |= {
        "output_dir": str(output), "num_validation_images": 0, "logging_steps": 5, "checkpointing_steps": 10**9,
        "lr_scheduler": "constant", "ema_decay": 0.99, **settings,
    }  # fmt: skip
    output.mkdir(parents=True)
    (output / "config.yaml").write_text(yaml.safe_dump(config))
    metrics = output / "metrics.jsonl"
    with open(output / "output.txt", "w") as printed:
        call = [sys.executable, str(ROOT / "train_sr.py"), "--config", str(output / "config.yaml")]
        process = subprocess.Popen(call, stdout=printed, stderr=printed)
        while process.poll() is None and not (metrics.is_file() and '"loss"' in metrics.read_text()):
            time.sleep(0.2)
        time.sleep(60 * minutes)
        process.send_signal(signal.SIGTERM)
        if process.wait() != 128 + signal.SIGTERM:
            sys.exit((output / "output.txt").read_text())
    return [json.loads(line) for line in metrics.read_text().splitlines() if '"loss"' in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="+", help="folders of training pictures")
    parser.add_argument("--hr", required=True, help="folder of test pictures")
    parser.add_argument("--lr", help="folder of their LR")
    parser.add_argument("--minutes", type=float, default=10.0, help="of training, each (default: 10)")
    parser.add_argument("--mixed_precision", default="no", help="of both (default: no)")
    options = parser.parse_args()
    photos = [str(Path(folder).resolve()) for folder in options.photos]
    columns = ["recipe", "parameters", "crops", "crops per second", "inference", "PSNR-Y", "SSIM-Y"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    with tempfile.TemporaryDirectory() as folder:
        for title, (config, steps) in RECIPES.items():
            output = Path(folder) / title
            last = train(
                config, output, options.minutes, train_data_dir=photos, mixed_precision=options.mixed_precision
            )
            pipe = convert(checkpoints.found_in(output)[-1])
            size = sum(parameter.numel() for parameter in pipe.unet.parameters())
            rows = measure_steps(pipe, load_pairs(options.hr, options.lr, pipe.scale_factor), steps)["rows"]
            for count, row in zip(steps, rows[1:]):
                print(
                    f"| {title} | {size:,} | {last['images']:,} | {last['images'] / (60 * options.minutes):.1f} "
                    f"| {count} steps | {row['psnr_y']:.2f} | {row['ssim_y']:.3f} |"
                )
        print(f"| bicubic | 0 | | | | {rows[0]['psnr_y']:.2f} | {rows[0]['ssim_y']:.3f} |")


if __name__ == "__main__":
    main()
