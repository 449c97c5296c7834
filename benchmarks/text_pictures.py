"""Pictures of printed text, for training: `python benchmarks/text_pictures.py FOLDER --count 60`.

Lines of random words and digits in the fonts of this machine (and Pillow's own), in random sizes and colours, on flat
or shaded ground. Few photographs hold text, and a network that never saw any invents strokes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LOWER, UPPER = "etaoinshrdlucmfwypvbgkjqxz", "ETAOINSHRDLUCMFWYPVBGKJQXZ"
LETTERS = np.array(list(3 * LOWER + UPPER + 2 * "0123456789" + ".,:;-/%&()"))


def fonts() -> list[str | None]:
    """The TrueType files of the machine; None stands for Pillow's own font."""
    return [None, *map(str, sorted(Path("/usr/share/fonts").rglob("*.ttf")))]


def text_picture(random: np.random.Generator, side: int, files: list[str | None]) -> Image.Image:
    """RGB of `side` x `side` pixels: a ground, then lines of words from top to bottom."""
    ground, ink = random.integers(0, 256, (2, 3))
    if abs(int(ground.sum()) - int(ink.sum())) < 250:  # too little contrast to be read
        ink = 255 * (ground.sum() < 380) * np.ones(3, int)
    shade = np.linspace(0, 1, side)[:, None, None] * random.uniform(-40, 40, 3)
    picture = Image.fromarray(np.clip(ground + shade + np.zeros((side, side, 3)), 0, 255).astype(np.uint8))
    draw, top = ImageDraw.Draw(picture), 0
    while top < side:
        size = int(np.exp(random.uniform(np.log(22), np.log(110))))
        file = files[random.integers(len(files))]
        font = ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
        words = ["".join(random.choice(LETTERS, random.integers(1, 10))) for _ in range(4 * side // (3 * size))]
        draw.text((random.integers(-20, 20), top), " ".join(words), fill=tuple(map(int, ink)), font=font)
        top += int(size * random.uniform(1.0, 1.6))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--side", type=int, default=640, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    files = fonts()
    for number in range(options.count):
        picture = text_picture(np.random.default_rng([options.seed, number]), options.side, files)
        picture.save(options.folder / f"text_{number:03d}.png")


if __name__ == "__main__":
    main()
