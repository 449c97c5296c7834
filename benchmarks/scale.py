"""Cost against area: core-seconds per output megapixel and peak memory, beside EDSR-baseline and bicubic in one run.

    python benchmarks/scale.py                                        # 0.25, 1, 4 and 16 megapixels, 1 and 4 steps
    python benchmarks/scale.py --megapixels 0.25 1 4 16 64 --csv scale.csv --plot scale.png
    python benchmarks/scale.py --estimate                             # also what was foretold beside what came
    python benchmarks/scale.py --stream 20000                         # 400 megapixels into a file: hours on a CPU

Every number is of a process of its own, and the peak is what that process takes beyond weights and imports. Time is
that of the processor (all threads together), so that other work on the machine counts little. The share of the peak
is the network's floating-point operations, without what is computed twice around parts, against those of the fastest
of a few plain convolutions in the same run.
"""

import argparse
import csv
import math
import multiprocessing
import resource
import statistics
import tempfile
import time

import numpy as np
import PIL.Image
import psutil
import torch
import torch.nn.functional as F
from diffusers.utils import logging
from speed import EDSRBaseline
from torch.utils.flop_counter import FlopCounterMode

from flowsr.estimate import estimate
from flowsr.loading import load_upscaler
from flowsr.streaming import Upscaled, stream

COLUMNS = ("method", "megapixels", "seconds", "seconds_per_megapixel", "memory_MiB", "share_of_peak")
BESIDE = ("bicubic", "EDSR-baseline")
STREAM_MEMORY = 2**30  # bytes for the network's work where a large picture is streamed


def method_of(name: str, checkpoint: str):
    """A function from `(h, w, 3)` uint8 to what is four times as large, whole or as `flowsr.stream` cuts it."""
    if name == "bicubic":
        return lambda pixels: PIL.Image.fromarray(pixels).resize(
            [4 * s for s in pixels.shape[1::-1]], PIL.Image.BICUBIC
        )
    if name == "EDSR-baseline":
        edsr = EDSRBaseline().eval().to(memory_format=torch.channels_last).requires_grad_(False)
        return lambda pixels: edsr(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)
    pipe = pipeline(checkpoint)
    return lambda pixels: Upscaled(pixels, pipe, num_inference_steps=int(name.split()[1]))[:]


def picture(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def measure(name: str, side: int, checkpoint: str, threads: int, repeats: int) -> tuple[float, float, float]:
    """Median of core-seconds, peak memory in bytes, and operations per LR pixel, of a picture of `side` LR pixels."""
    torch.set_num_threads(threads)
    method, pixels, seconds = method_of(name, checkpoint), picture(side), []
    before = psutil.Process().memory_info().rss
    with FlopCounterMode(display=False) as counter:  # also chooses kernels
        method(pixels[:96, :96])
    operations = counter.get_total_flops() / min(side, 96) ** 2
    for _ in range(repeats):
        start = time.process_time()
        method(pixels)
        seconds.append(time.process_time() - start)
    return statistics.median(seconds), peak_memory() - before, operations


def peak_memory() -> int:
    """Of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def pipeline(checkpoint: str):
    logging.disable_progress_bar()
    pipe = load_upscaler(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def convolution_peak(threads: int) -> float:
    """Operations per core-second of the fastest plain convolution of 3x3, after one that chooses kernels."""
    torch.set_num_threads(threads)
    best = 0.0
    for channels, side in ((64, 64), (64, 128), (128, 64), (128, 128)):
        x = torch.rand(1, channels, side, side).contiguous(memory_format=torch.channels_last)
        weight = torch.rand(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
        for _ in range(6):
            start = time.process_time()
            F.conv2d(x, weight, padding=1)
            best = max(best, 2 * 9 * channels**2 * side**2 / (time.process_time() - start))
    return best


def compare_estimate(side: int, steps: int, checkpoint: str, threads: int) -> tuple[float, float, float, float]:
    """Seconds and bytes of the process: foretold, then taken."""
    torch.set_num_threads(threads)
    pipe = pipeline(checkpoint)
    foretold, start = estimate(pipe, (side, side), num_inference_steps=steps), time.perf_counter()
    Upscaled(picture(side), pipe, num_inference_steps=steps)[:]
    seconds = time.perf_counter() - start
    return foretold.seconds, seconds, foretold.memory, peak_memory()


def measure_stream(side: int, steps: int, checkpoint: str, threads: int) -> tuple[float, int]:
    """Core-seconds and peak memory of a process that streams a result of `side` x `side` pixels into a file."""
    torch.set_num_threads(threads)
    pipe, small = pipeline(checkpoint), np.tile(picture(64), (math.ceil(side / 256), math.ceil(side / 256), 1))
    start = time.process_time()
    with tempfile.TemporaryFile() as file:
        stream(
            small[: side // 4, : side // 4], lambda rows: file.write(rows.tobytes()), pipe, num_inference_steps=steps,
            max_memory=STREAM_MEMORY,
        )  # fmt: skip
    return time.process_time() - start, peak_memory()


def line(area: list[float], cost: list[float]) -> tuple[float, float, float]:
    """The straight line closest to cost in proportion: what it starts from, its slope, and the largest residual.

    Residuals are shares of the cost, so that small pictures count as much as large ones.
    """
    area, cost = np.asarray(area), np.asarray(cost)
    rows = np.stack([1 / cost, area / cost], axis=1)
    (start, slope), *_ = np.linalg.lstsq(rows, np.ones(len(cost)), rcond=None)
    return start, slope, np.abs(rows @ (start, slope) - 1).max()


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, column, label in zip(axes, ("seconds", "memory_MiB"), ("core-seconds", "peak memory, MiB")):
        for name in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == name]
            axis.loglog([row["megapixels"] for row in mine], [row[column] for row in mine], "o-", label=name)
        axis.set(xlabel="output megapixels", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default="x4", help="name, folder, file or Hub id (default: x4)")
    parser.add_argument("--megapixels", type=float, nargs="+", default=[0.25, 1, 4, 16], help="of the results")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="of results below two megapixels; larger ones: 1")
    parser.add_argument("--estimate", action="store_true", help="also compare `pipe.estimate` on three sizes")
    parser.add_argument(
        "--stream", type=int, metavar="SIDE", help="instead: a result of SIDE x SIDE pixels, to a file"
    )
    parser.add_argument("--csv", help="also write the numbers to this file")
    parser.add_argument("--plot", help="also draw them into this file")
    options = parser.parse_args()

    processes = multiprocessing.get_context("forkserver")  # imports once, and no threads are forked
    processes.set_forkserver_preload(["flowsr.estimate", "flowsr.loading", "matplotlib"])
    sides = {each: round(math.sqrt(each) * 1024 / 4) for each in options.megapixels}
    fixed = (options.checkpoint, options.threads)
    with processes.Pool(1, maxtasksperchild=1) as pool:
        if options.stream:
            for steps in options.steps:
                seconds, memory = pool.apply(measure_stream, (options.stream, steps, *fixed))
                told = f"{options.stream} x {options.stream}, {steps} steps: {seconds:.0f} core-seconds"
                print(f"{told}, at most {memory >> 20} MiB of memory, imports and weights included")
            return
        peak = pool.apply(convolution_peak, (options.threads,))
        print(f"{options.checkpoint}, {options.threads} threads; the fastest convolution: {peak / 1e9:.1f} GFLOP/s\n")
        print("| | output MP | core-s / MP | peak MiB | share of the peak |\n|---|---|---|---|---|")
        rows = []
        for name in (*BESIDE, *(f"flowsr {steps} steps" for steps in options.steps)):
            for megapixels, side in sides.items():
                repeats = options.repeats if megapixels < 2 else 1
                seconds, memory, operations = pool.apply(measure, (name, side, *fixed, repeats))
                share = operations * side**2 / seconds / peak
                values = (name, megapixels, seconds, seconds / megapixels, memory / 2**20, share)
                rows.append(dict(zip(COLUMNS, values)))
                told = f"{share:.0%}" if share else ""
                print(
                    f"| {name} | {megapixels:g} | {seconds / megapixels:.3f} | {memory >> 20} | {told} |", flush=True
                )
        if len(sides) > 2:
            print("\n| core-seconds against megapixels | start | slope | largest residual |\n|---|---|---|---|")
            for name in dict.fromkeys(row["method"] for row in rows):
                start, slope, residual = line(
                    *zip(*((r["megapixels"], r["seconds"]) for r in rows if r["method"] == name))
                )
                print(f"| {name} | {start:.3f} | {slope:.3f} | {residual:.1%} |")
        if options.estimate:
            print("\n| output MP, steps | seconds: foretold, taken | ratio | MiB: foretold, taken | ratio |")
            print("|---|---|---|---|---|")
            for megapixels, side in list(sides.items())[:3]:
                steps = max(options.steps)
                told, taken, bytes_told, bytes_taken = pool.apply(compare_estimate, (side, steps, *fixed))
                print(
                    f"| {megapixels:g}, {steps} | {told:.2f}, {taken:.2f} | {told / taken:.2f} "
                    f"| {bytes_told >> 20}, {bytes_taken >> 20} | {bytes_told / bytes_taken:.2f} |"
                )
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
