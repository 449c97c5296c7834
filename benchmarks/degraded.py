"""Pictures as they come: noise, blur and JPEG, upscaled by bicubic, by checkpoints and by other networks.

    python benchmarks/degraded.py SET5/HR SET14/HR --lpips_weights lpips_squeeze_v0.1.safetensors --sheet sheet.png
    python benchmarks/degraded.py SET14/HR --ncnn realesrgan-x4plus=MODELS/realesrgan-x4plus.param  (pip install ncnn)

Each HR picture is damaged in seven fixed ways (a function of its name and a seed) and reduced to a quarter. Printed
for each way: PSNR-Y in dB, LPIPS v0.1 with SqueezeNet (lower is better) and HaarPSI (higher is better), the mean over
all pictures. An ncnn model takes RGB in [0, 1] as `data` and gives x4 as `output`, as those of Real-ESRGAN do.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowsr.degradations import blur, cut_to_multiple, gaussian_kernel, gaussian_noise, jpeg, matlab_bicubic
from flowsr.loading import load_upscaler
from flowsr.metrics import haarpsi, load_lpips, psnr_y
from flowsr.picture_file import PICTURE_SUFFIXES

SCALE = 4


def damaged(hr: np.ndarray, way: str, random: np.random.Generator) -> np.ndarray:
    """The LR of a picture, uint8: `way` is a list of steps such as "blur 2, noise 5, jpeg 60".

    Blur has its standard deviation in HR pixels and precedes MATLAB's bicubic; noise has it in levels of 255.
    """
    steps = {name: float(strength) for name, strength in (step.split() for step in way.split(", ") if way != "clean")}
    if "blur" in steps:
        x = torch.from_numpy(hr.transpose(2, 0, 1).astype(np.float32)) / 255
        x = blur(x, gaussian_kernel(21, (steps["blur"],) * 2, 0.0))
        hr = (x * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    x = torch.from_numpy(matlab_bicubic(hr, SCALE).transpose(2, 0, 1).astype(np.float32)) / 255
    if "noise" in steps:
        x = gaussian_noise(x, random, (steps["noise"],) * 2)
    if "jpeg" in steps:
        x = jpeg(x, random, (int(steps["jpeg"]),) * 2)
    return (x * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


WAYS = ("clean", "jpeg 60", "jpeg 30", "noise 5", "noise 15", "blur 2", "blur 1, noise 5, jpeg 60")


def checkpoint_system(name: str, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    pipe = load_upscaler(name)
    pipe.set_progress_bar_config(disable=True)

    def upscale(lr: np.ndarray) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe(Image.fromarray(lr), num_inference_steps=steps, generator=generator).images[0])

    return upscale


def ncnn_system(param: str) -> Callable[[np.ndarray], np.ndarray]:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.load_param(param)
    net.load_model(str(Path(param).with_suffix(".bin")))

    def upscale(lr: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        pixels = np.ascontiguousarray(lr.transpose(2, 0, 1), np.float32) / 255
        extractor.input("data", ncnn.Mat(pixels).clone())  # as a Mat does not keep its array alive
        _, answer = extractor.extract("output")
        return (np.array(answer).transpose(1, 2, 0) * 255).round().clip(0, 255).astype(np.uint8)

    return upscale


def bicubic(lr: np.ndarray) -> np.ndarray:
    picture = Image.fromarray(lr)
    return np.asarray(picture.resize([side * SCALE for side in picture.size], Image.BICUBIC))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of HR pictures")
    parser.add_argument("--lpips_weights", required=True)
    parser.add_argument("--checkpoints", nargs="+", default=["x4", "x4-real"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--ncnn", nargs="*", default=[], metavar="NAME=PARAM", help="models of ncnn, bin beside param")
    parser.add_argument("--ways", nargs="+", default=WAYS, help="such as 'noise 5, jpeg 60'")
    parser.add_argument("--sheet", help="PNG: the middle of the first picture, a way a row, a system a column")
    options = parser.parse_args()

    systems = {"bicubic": bicubic}
    for name in options.checkpoints:
        systems |= {f"{Path(name).name}, {n} step{'s' * (n > 1)}": checkpoint_system(name, n) for n in options.steps}
    for name, param in (each.split("=", 1) for each in options.ncnn):
        systems[name] = ncnn_system(param)
    files = [f for folder in options.folders for f in sorted(folder.iterdir()) if f.suffix.lower() in PICTURE_SUFFIXES]
    lpips, words = load_lpips(options.lpips_weights)
    print(f"{len(files)} pictures; PSNR-Y / {words} / HaarPSI\n")
    print(f"| | {' | '.join(options.ways)} |", "|---" * (len(options.ways) + 1) + "|", sep="\n")
    found = {name: {way: [] for way in options.ways} for name in systems}
    rows = []
    for way in options.ways:
        for number, file in enumerate(files):
            hr = cut_to_multiple(np.asarray(Image.open(file).convert("RGB")), SCALE)
            lr = damaged(hr, way, np.random.default_rng([0, zlib.crc32(file.name.encode())]))
            made = {name: system(lr) for name, system in systems.items()}
            for name, sr in made.items():
                found[name][way].append((psnr_y(sr, hr, SCALE), lpips(sr, hr), haarpsi(sr, hr)))
            if number == 0:
                top, left = (side // 2 - 96 for side in hr.shape[:2])
                place = slice(max(top, 0), top + 192), slice(max(left, 0), left + 192)
                rows.append(np.concatenate([picture[place] for picture in (*made.values(), hr)], 1))
    for name, of_ways in found.items():
        means = [np.mean(of_ways[way], axis=0) for way in options.ways]
        print(f"| {name} | {' | '.join(f'{p:.2f} / {d:.3f} / {h:.3f}' for p, d, h in means)} |")
    if options.sheet:
        Image.fromarray(np.concatenate(rows)).save(options.sheet)


if __name__ == "__main__":
    main()
