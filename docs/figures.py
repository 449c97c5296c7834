"""Draws docs/figures: what the bundled networks do along the flow, the dial, and the gallery.

python docs/figures.py                      # from examples/
python docs/figures.py --photos PHOTOS      # also the gallery, from a folder with the files that GALLERY names
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import PIL.Image
import torch
from diffusers import DDPMScheduler, DiffusionPipeline

from flowsr.degradations import cut_to_multiple, matlab_bicubic
from flowsr.dial import blend_ends
from flowsr.loading import load_upscaler
from flowsr.upscaler import side_by_side

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FIGURES = Path(__file__).with_name("figures")
FIRST, SECOND, GREY = "#2a6fb0", "#e07b39", "#9a9a9a"
SIDE = 200  # HR pixels of a picture in the gallery
GALLERY = {  # name: file, and column and row of the corner; docs/gallery.md has their licences
    "faces": ("astronaut.png", 160, 40),
    "text": ("text.png", 128, 0),
    "foliage": ("budgie_kitten-on-lawn_1.jpg", 460, 90),
    "fur": ("budgie_kitten-on-lawn_0.jpg", 220, 40),
    "feathers": ("budgie_budgie-branch_0.jpg", 60, 60),
    "bricks": ("brick.png", 160, 160),
    "windows": ("budgie_san-francisco-skyline_0.jpg", 180, 60),
    "sky": ("rocket.jpg", 220, 160),
}


def pair(path: Path, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """A piece of a picture and its LR, uint8 `(h, w, 3)`."""
    with PIL.Image.open(path) as picture:
        hr = np.asarray(picture.convert("RGB"))[top : top + height, left : left + width]
    hr = cut_to_multiple(hr, 4)
    return hr, matlab_bicubic(hr, 4)


def upscale(pipe: DiffusionPipeline, lr: np.ndarray, **options) -> PIL.Image.Image:
    return pipe(PIL.Image.fromarray(lr), generator=torch.Generator().manual_seed(0), **options).images[0]


def save_jpeg(picture: PIL.Image.Image, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    picture.save(FIGURES / f"{name}.jpg", quality=90, subsampling=0, optimize=True)


def save_plot(figure: plt.Figure, name: str) -> None:
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / f"{name}.png", dpi=90)
    plt.close(figure)


# The flow in one dimension, where its velocity is known exactly.

MODES, SPREAD, NOISE = np.array([-0.6, 0.6]), 0.06, 0.35  # of the pictures and of the source, which lies around 0


def expected_picture(x: np.ndarray, sigma: float) -> np.ndarray:
    """E[hr | x_t = x] for hr from two narrow normal distributions and a normal source, on the linear path."""
    x = np.asarray(x)[..., None]
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2 * NOISE**2
    offset = x - (1 - sigma) * MODES
    weights = np.exp(-(offset**2 - (offset**2).min(-1, keepdims=True)) / (2 * variance))
    means = MODES + (1 - sigma) * SPREAD**2 / variance * offset
    return (weights * means).sum(-1) / weights.sum(-1)


def plot_paths(pairs: int = 24, steps: int = 200) -> None:
    """Left: the straight lines of training, which cross. Right: the mean velocity, and where it leads."""
    random = np.random.default_rng(2)
    source = NOISE * random.standard_normal(pairs)
    hr = random.choice(MODES, pairs) + SPREAD * random.standard_normal(pairs)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for start, end in zip(source, hr):
        left.plot([1, 0], [start, end], color=FIRST if end > 0 else SECOND, lw=1)
    left.set(title="training: straight lines from source to picture", ylabel="value of a pixel")

    sigmas = np.linspace(1, 0, steps + 1)
    paths = [source]
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        velocity = (paths[-1] - expected_picture(paths[-1], sigma)) / sigma
        paths.append(paths[-1] + (following - sigma) * velocity)
    for path in np.stack(paths, 1):
        right.plot(sigmas, path, color=FIRST if path[-1] > 0 else SECOND, lw=1)
    places, times = np.meshgrid(np.linspace(-0.8, 0.8, 13), np.linspace(0.1, 1, 10))
    velocity = np.stack([(x - expected_picture(x, sigma)) / sigma for x, sigma in zip(places, times[:, 0])])
    right.quiver(times, places, -np.ones_like(velocity), -velocity, color=GREY, angles="xy", scale=28, width=0.003)
    for start in (-0.4, 0.0, 0.4):
        right.plot([1, 0], [start, expected_picture(np.array(start), 1.0)], "k:", lw=1)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    right.text(0.36, -0.03, "one step:\nthe mean", va="top", bbox=box)
    right.set(title="sampling: follow the mean velocity")
    for axes in (left, right):
        axes.set(xlim=(1.02, -0.02), xlabel="sigma: 1 is the source, 0 the picture")
    save_plot(figure, "paths")


# What the bundled networks do.


def flow_states(pipe: DiffusionPipeline, lr: np.ndarray, steps: int, outputs: int = 1):
    """Sigmas, the states of the flow at them, and the network's picture at each but the last.

    Returns:
        arrays of shape `(steps + 1,)`, `(steps + 1, outputs, h, w, 3)` and `(steps, outputs, h, w, 3)` in [-1, 1].
    """
    x = torch.from_numpy(lr / np.float32(127.5) - 1).permute(2, 0, 1)[None].repeat(outputs, 1, 1, 1)
    encoding = pipe.encode(x)
    generators = [torch.Generator().manual_seed(seed) for seed in range(outputs)]
    state = pipe.prepare_source(x, generators, prior_estimate=encoding.mean)
    pipe.scheduler.set_timesteps(steps)
    states, pictures = [state], []
    for timestep in pipe.scheduler.timesteps:
        prediction = pipe.unet(state, timestep, **pipe.conditions(x, encoding=encoding)).sample
        step = pipe.scheduler.step(prediction, timestep, state)
        state = step.prev_sample
        states.append(state)
        pictures.append(step.pred_original_sample)
    sigmas, *found = (pipe.scheduler.sigmas, torch.stack(states), torch.stack(pictures))
    return sigmas.numpy(), *(each.movedim(2, -1).numpy() for each in found)


def draw_states(pipe: DiffusionPipeline, lr: np.ndarray) -> None:
    """Above: the state. Below: the picture that the network expects from there. Sigma is 1, 0.75, 0.5, 0.25 and 0."""
    _, states, pictures = flow_states(pipe, lr, 4)
    rows = states[:, 0], np.concatenate([pictures, states[-1:]])[:, 0]
    whole = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    save_jpeg(PIL.Image.fromarray(((whole.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)), "states")


def plot_pixels(pipe: DiffusionPipeline, hr: np.ndarray, lr: np.ndarray, steps: int = 8, outputs: int = 64) -> None:
    """Green of a pixel that the LR all but decides, and of one that it leaves open: on its way, and at the end."""
    sigmas, states, pictures = flow_states(pipe, lr, steps, outputs)
    inside = states[-1, :, 16:-16, 16:-16, 1].std(axis=0)
    order = np.argsort(inside, axis=None)
    figure, axes = plt.subplots(1, 4, figsize=(9, 3), width_ratios=[3, 1, 3, 1], layout="constrained")
    for title, place, (way, ends) in zip(("a pixel in shade", "a pixel in fur"), (0.02, 0.97), axes.reshape(2, 2)):
        row, column = np.add(np.unravel_index(order[int(place * order.size)], inside.shape), 16)
        values = (states[:, :, row, column, 1] + 1) / 2
        way.plot(sigmas, values[:, :10], color=FIRST, lw=1, alpha=0.8)
        ends.hist(values[-1], bins=12, orientation="horizontal", color=FIRST)
        for part in (way, ends):
            part.axhline((pictures[0, 0, row, column, 1] + 1) / 2, color=SECOND, label="fidelity 1")
            part.axhline(hr[row, column, 1] / 255, color="k", ls=":", label="original")
            part.set_ylim(values[0].mean() - 0.16, values[0].mean() + 0.16)
        way.set(title=title, xlabel="sigma", xlim=(1, 0))
        ends.set(xticks=[], yticks=[], title=f"{outputs} samples")
    axes[0].set(ylabel="green, 0 to 1")
    axes[0].legend(loc="lower left", fontsize=8)
    save_plot(figure, "pixels")


def diffusion_states(pipe: DiffusionPipeline, lr: np.ndarray, steps: int, seeds: int) -> torch.Tensor:
    """The states of a diffusion after each step, `(steps, seeds, 3, h, w)`."""
    states = []
    pipe(
        [PIL.Image.fromarray(lr)] * seeds,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(seed) for seed in range(seeds)],
        callback_on_step_end=lambda pipe, step, timestep, given: states.append(given["latents"]) or {},
    )
    return torch.stack(states)


def plot_diffusion(pipe: DiffusionPipeline, flow: DiffusionPipeline, lr: np.ndarray, seeds: int = 6) -> None:
    """The same pixel by a diffusion's random steps, by its deterministic ones, and by the flow."""
    row = column = 2 * len(lr)
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), layout="constrained")
    deterministic = pipe.scheduler
    ancestral = DDPMScheduler.from_config(deterministic.config, clip_sample=False, variance_type="fixed_large")
    for part, scheduler, steps in ((axes[0], ancestral, 200), (axes[1], deterministic, 50)):
        pipe.scheduler = scheduler
        values = diffusion_states(pipe, lr, steps, seeds)[:, :, 1, row, column]
        part.plot(np.linspace(1, 0, steps), values, lw=0.8)
    axes[0].set(title="diffusion, 200 random steps", ylabel="state of a pixel")
    axes[1].set(title="diffusion, 50 steps of DDIM")
    sigmas, states, _ = flow_states(flow, lr, 8, seeds)
    axes[2].plot(sigmas, states[:, :, row, column, 1], "-o", ms=3, lw=0.8)
    axes[2].set(title="flow, 8 steps of Euler")
    for part in axes:
        part.set(xlabel="time: 1 is noise, 0 the picture", xlim=(1.02, -0.02))
    save_plot(figure, "diffusion")


def draw_dial(pipe: DiffusionPipeline, lr: np.ndarray) -> None:
    """Above: the pipeline's answers at fidelity 1, 0.75, 0.5, 0.25 and 0. Below: blends of the two ends."""
    places = (1.0, 0.75, 0.5, 0.25, 0.0)
    answers = [np.asarray(upscale(pipe, lr, fidelity=place)) for place in places]
    blends = [blend_ends(answers[0], answers[-1], place).round().astype(np.uint8) for place in places]
    save_jpeg(PIL.Image.fromarray(np.concatenate([np.concatenate(row, 1) for row in (answers, blends)])), "dial")


def draw_gallery(pipe: DiffusionPipeline, photos: Path) -> None:
    """Each piece by bicubic interpolation, at fidelity 1, in four steps, and as it was."""
    for name, (file, left, top) in GALLERY.items():
        hr, lr = pair(photos / file, left, top, SIDE, SIDE)
        bicubic = PIL.Image.fromarray(lr).resize(hr.shape[1::-1], PIL.Image.BICUBIC)
        answers = [upscale(pipe, lr, fidelity=1.0), upscale(pipe, lr)]
        save_jpeg(side_by_side([bicubic, *answers, PIL.Image.fromarray(hr)]), f"gallery_{name}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--photos", type=Path, help="folder of the gallery's files")
    options = parser.parse_args()
    pipe, diffusion = load_upscaler("x4"), load_upscaler("ddpm_x4")
    for each in (pipe, diffusion):
        each.set_progress_bar_config(disable=True)
    hr, lr = pair(ROOT / "examples/kitten.png", 190, 40, 160, 160)
    plot_paths()
    draw_states(pipe, lr)
    plot_pixels(pipe, hr, lr)
    plot_diffusion(diffusion, pipe, lr[:24, :24])
    draw_dial(pipe, lr)
    if options.photos:
        draw_gallery(pipe, options.photos)


if __name__ == "__main__":
    main()
