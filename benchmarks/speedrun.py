"""From nothing to a trained encoder in one command: minutes, crops, and PSNR-Y on test sets.

    python benchmarks/speedrun.py PHOTOS --data DATA --steps 6000
    python benchmarks/speedrun.py PHOTOS --data DATA --steps 6000 --teacher dat_light

PHOTOS are folders of training pictures; DATA holds Set5 and Set14 as folders with `HR` and `LRx4`. Trains by
configs/x4_encoder.yaml with one process a core, in which the batch is shared, so that the run is that of one process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flowsr.evaluation import load_pairs, measure_steps
from flowsr.loading import load_upscaler

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", nargs="+", help="folders of training pictures")
    parser.add_argument("--data", type=Path, required=True, help="folder of Set5 and Set14")
    parser.add_argument("--steps", type=int, default=6000, help="optimiser steps of 16 crops (default: 6000)")
    parser.add_argument("--teacher", help="as of train_sr.py (default: none, HR is the target)")
    parser.add_argument("--processes", type=int, default=2, help="which 16 is divided by (default: 2)")
    parser.add_argument("--output_dir", help="kept there (default: a folder that is deleted)")
    options = parser.parse_args()
    if 16 % options.processes:
        sys.exit(f"`--processes` must divide the 16 crops of a step, got {options.processes}.")

    with tempfile.TemporaryDirectory() as temporary:
        output = Path(options.output_dir or Path(temporary) / "run")
        strategy = ["--cpu"] if options.processes == 1 else ["--multi_gpu", "--num_processes", str(options.processes)]
        call = [sys.executable, "-m", "accelerate.commands.launch", *strategy, str(ROOT / "train_sr.py")]
        call += ["--train_data_dir", *options.photos, "--output_dir", str(output)]
        call += ["--max_train_steps", str(options.steps), "--train_batch_size", str(16 // options.processes)]
        call += ["--teacher", options.teacher] if options.teacher else []
        start = time.perf_counter()
        subprocess.run(call, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"})
        minutes = (time.perf_counter() - start) / 60
        pipe = load_upscaler(str(output))
    print(f"\n{minutes:.1f} minutes, {options.steps * 16:,} crops, {options.processes} processes\n")
    print("| | bicubic | fidelity 1 |\n|---|---|---|")
    for name in ("Set5", "Set14"):
        pairs = load_pairs(options.data / name / "HR", options.data / name / "LRx4", pipe.scale_factor)
        bicubic, faithful = (row["psnr_y"] for row in measure_steps(pipe, pairs, [1])["rows"])
        print(f"| {name} | {bicubic:.2f} | {faithful:.2f} |")


if __name__ == "__main__":
    main()
