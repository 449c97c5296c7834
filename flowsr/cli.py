"""The command line: `flowsr upscale`, `flowsr evaluate`, `flowsr info`, `flowsr card`, `flowsr demo`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

FORMATS = ("png", "jpg", "webp", "tif", "avif", "heic", "jp2", "bmp")  # suffixes of files that are written


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; 0 for success, 1 where something could not be done, 2 for a wrong call."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"flowsr: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flowsr: interrupted; every file written so far is whole.", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="flowsr", description="Image super-resolution by flow matching.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run, description: str) -> argparse.ArgumentParser:
        made = commands.add_parser(run.__name__, help=description, description=description)
        made.set_defaults(run=run)
        made.add_argument("--checkpoint", default="x4", help="bundled name, folder or Hub id (default: x4)")
        return made

    def flow_options(made: argparse.ArgumentParser) -> None:
        made.add_argument("--fidelity", type=float, default=0.0, help="0 vivid ... 1 faithful (default: 0)")
        made.add_argument("--consistency", choices=("exact", "soft"), help="make the output agree with its input")
        made.add_argument("--tile", type=int, default=256, help="LR pixels per tile; 0 for none (default: 256)")
        made.add_argument("--seed", type=int, default=0, help="of the source noise (default: 0)")
        made.add_argument("--device", default="cpu", help="torch device (default: cpu)")
        made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")

    made = command(upscale, "Upscale pictures and folders of pictures.")
    made.add_argument("input", nargs="+", help="picture files and folders; - for the standard input")
    made.add_argument("-o", "--output", required=True, help="folder, or a file name for one picture; - for stdout")
    made.add_argument("--format", choices=FORMATS, help="of the results (default: that of the name)")
    made.add_argument("--suffix", default="", help="behind the names of results in a folder, such as _x4")
    made.add_argument("--quality", type=int, help="1..100, of jpg, avif and heic (default: 95), and of lossy webp")
    made.add_argument("--overwrite", action="store_true", help="replace results that exist")
    made.add_argument("--max-pixels", type=int, help="largest result, all frames together")
    made.add_argument("--no-provenance", action="store_true", help="do not write into the file how it was made")
    made.add_argument("--steps", type=int, default=4, help="network evaluations (default: 4)")
    made.add_argument("--compare", action="store_true", help="also write `bicubic | flowsr` side by side")
    flow_options(made)

    made = command(evaluate, "Measure on a folder of pictures: PSNR-Y, SSIM-Y, LPIPS, LR-PSNR.")
    made.add_argument("hr", help="folder of high-resolution pictures")
    made.add_argument("--lr", help="folder of low-resolution ones (default: MATLAB's bicubic of the first)")
    made.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="network evaluations (default: 1 4)")
    made.add_argument("--lpips_weights", help="safetensors of LPIPS v0.1 with SqueezeNet")
    made.add_argument("--json", help="also write every number to this file")
    flow_options(made)

    command(info, "Describe a checkpoint and this machine.")

    described = "Show what a training degradation does to a picture: a grid of draws, enlarged, beside the original."
    made = commands.add_parser("degrade", help=described, description=described)
    made.set_defaults(run=degrade)
    made.add_argument("input", help="picture file")
    made.add_argument("-o", "--output", default="degraded.png", help="picture file (default: degraded.png)")
    made.add_argument("--degradation", default="real_esrgan", help="bicubic, bsrgan or real_esrgan (the default)")
    made.add_argument("--scale", type=int, default=4, help="HR pixels per LR pixel (default: 4)")
    made.add_argument("--count", type=int, default=7, help="draws (default: 7)")
    made.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")

    described = "Write the model card of a pipeline folder from its evaluation.json, settings.yaml and example.*."
    made = commands.add_parser("card", help=described, description=described)
    made.set_defaults(run=card)
    made.add_argument("folder", help="of a saved pipeline")
    made.add_argument("--results", nargs="+", default=[], metavar="NAME=JSON", help="of `flowsr evaluate --json`")
    made.add_argument("--license", help="of the weights, as the Hub abbreviates it, such as apache-2.0")
    made.add_argument("--push_to_hub", metavar="USER/NAME", help="also upload the pipeline with its card")

    made = command(demo, "Upscale the example photo and compare with bicubic and the original.")
    made.add_argument("-o", "--output", default="demo_output", help="folder (default: demo_output)")
    made.add_argument("--steps", type=int, default=4, help="network evaluations (default: 4)")
    return top


def load(checkpoint: str, device: str = "cpu", dtype: str = "float32"):
    """The pipeline of a bundled name, a folder or a Hub id."""
    import torch
    from diffusers.utils import logging

    import flowsr

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what matters comes as an error
    where = flowsr.bundled(checkpoint) if not Path(checkpoint).exists() and "/" not in checkpoint else checkpoint
    try:
        pipe = super_resolution_class(where).from_pretrained(where).to(device)
        return pipe if dtype == "float32" else pipe.to(getattr(torch, dtype))
    except Exception as error:  # loaders raise many kinds: safetensors' own, JSON's, the Hub's, torch's
        reason = str(error).strip().split("\n")[0]
        reason = reason if reason.startswith(where) else f"The checkpoint {checkpoint} cannot be loaded: {reason}"
        raise ValueError(reason) from error


def super_resolution_class(checkpoint: str) -> type:
    """The class of a saved pipeline that upscales; where it cannot be told, the one whose loader says why."""
    from diffusers import DiffusionPipeline

    import flowsr

    try:
        kind = DiffusionPipeline.load_config(checkpoint)["_class_name"]
    except (OSError, KeyError):
        return flowsr.FlowMatchSRPipeline
    kind = kind[-1] if isinstance(kind, (list, tuple)) else kind  # self-contained folders name their file too
    return flowsr.DDPMSRPipeline if kind == "DDPMSRPipeline" else flowsr.FlowMatchSRPipeline


def dial(options: argparse.Namespace, pipe) -> dict:
    """`fidelity` where it is asked for, which a diffusion does not have."""
    if options.fidelity and type(pipe).__name__ == "DDPMSRPipeline":
        raise ValueError(
            f"`--fidelity` is a dial of flow matching, and {options.checkpoint} is a diffusion; leave it."
        )
    return {"fidelity": options.fidelity} if options.fidelity else {}


def upscale(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from flowsr.files import MAX_PIXELS, find_pictures
    from flowsr.upscaler import upscale_file

    max_pixels = MAX_PIXELS if options.max_pixels is None else options.max_pixels
    if max_pixels < 1:
        raise ValueError(f"`--max-pixels` must be positive, got {max_pixels}.")
    inputs = find_pictures(options.input)
    targets = plan_targets(inputs, options)
    streamed = options.output == "-"
    pipe = load(options.checkpoint, options.device, options.dtype)
    call = {"num_inference_steps": options.steps, "consistency": options.consistency, "tile": options.tile or None}
    call |= dial(options, pipe)
    pipe.set_progress_bar_config(disable=True)
    model = Path(options.checkpoint).name if Path(options.checkpoint).exists() else options.checkpoint
    failures = []
    for source, target in (bar := tqdm(list(zip(inputs, targets)), unit="picture", disable=None)):
        bar.set_description(source.name)
        try:
            upscale_file(
                pipe,
                source,
                target,
                seed=options.seed,
                compare_to=compare_path(target) if options.compare else None,
                model=None if options.no_provenance else model,
                quality=options.quality,
                max_pixels=max_pixels,
                stream=sys.stdout.buffer if streamed else None,
                say=lambda note, source=source: bar.write(f"flowsr: {source}: {note}.", file=sys.stderr),
                **call,
            )
        except ValueError as error:
            failures.append(str(error) if str(source) in str(error) else f"{source}: {error}")
    for failure in failures:
        print(f"flowsr: {failure}", file=sys.stderr)
    where = "standard output" if streamed else options.output
    done = f"{len(inputs) - len(failures)} of {len(inputs)} pictures written to {where}."
    print(done, file=sys.stderr if streamed else sys.stdout)
    return 1 if failures else 0


def plan_targets(inputs: list[Path], options: argparse.Namespace) -> list[Path]:
    """Where each result goes; refuses two results with one name, and results on top of inputs and other files.

    For the standard output, `-` with the suffix of the format; without one where only the input knows it.
    """
    from flowsr.files import PICTURE_SUFFIXES, check_place, format_of

    output, suffix = Path(options.output), f".{options.format}" if options.format else ""
    streams = [path for path in inputs if str(path) == "-"]
    if streams and len(inputs) > 1:
        raise ValueError("The standard input `-` is one picture; upscale others by another call.")
    if Path(f"a{options.suffix}").name != f"a{options.suffix}":
        raise ValueError(f"`--suffix` is a part of a name, got {options.suffix!r}.")
    if options.output == "-":
        if len(inputs) > 1 or options.compare:
            raise ValueError(f"The standard output takes one picture; name a folder for {len(inputs)} or `--compare`.")
        if sys.stdout.isatty():
            raise ValueError("The standard output is a terminal; send it to a file or another program.")
        return [Path(f"-{suffix or inputs[0].suffix}")]
    if output.suffix and not output.is_dir() and not options.output.endswith(("/", os.sep)):
        if output.suffix.lower() not in PICTURE_SUFFIXES:
            raise ValueError(
                f"`-o {output}` has no suffix of a picture ({', '.join(sorted(PICTURE_SUFFIXES))}); for a folder, end "
                "it with a slash."
            )
        if options.format and format_of(output) != format_of(f"-{suffix}"):
            raise ValueError(f"`-o {output}` and `--format {options.format}` disagree; leave one.")
        format_of(output)
        if len(inputs) > 1:
            raise ValueError(f"`-o {output}` is one file, but there are {len(inputs)} pictures; name a folder.")
        targets = [output]
    elif output.is_file():
        raise ValueError(f"`-o {output}` is a file that is no picture; name a folder or a picture file.")
    elif streams and not suffix:
        raise ValueError("The standard input has no name; name the result by `-o`, or its format by `--format`.")
    else:
        stems = ["stdin" if path in streams else path.stem for path in inputs]
        targets = [output / f"{stem}{options.suffix}{suffix or path.suffix}" for stem, path in zip(stems, inputs)]
    sources, planned = {path.resolve() for path in inputs}, set()
    for target in targets + [compare_path(target) for target in targets if options.compare]:
        check_place(target)
        if target in planned:
            raise ValueError(f"Two inputs would be written to {target}; upscale them into different folders.")
        planned.add(target)
        if target.resolve() in sources:
            raise ValueError(f"{target} is an input and would be overwritten; choose another `-o` or a `--suffix`.")
        if target.exists() and not options.overwrite:
            raise ValueError(f"{target} exists; pass `--overwrite` to replace it, or choose another `-o`.")
    return targets


def compare_path(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.png")


def evaluate(options: argparse.Namespace) -> int:
    from flowsr.evaluate import evaluate as measure
    from flowsr.evaluate import load_pairs, markdown_table

    pipe = load(options.checkpoint, options.device, options.dtype)
    pairs = load_pairs(options.hr, options.lr, pipe.scale_factor)
    result = measure(
        pipe,
        pairs,
        steps=options.steps,
        consistency=options.consistency,
        seed=options.seed,
        tile=options.tile or None,
        lpips_weights=options.lpips_weights,
        **dial(options, pipe),
    )
    print(f"{len(pairs)} pictures of {options.hr}, x{pipe.scale_factor}, seed {options.seed}; {result['lpips']}\n")
    print(markdown_table(result))
    if options.json:
        partial = Path(f"{options.json}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, options.json)
    return 0


def info(options: argparse.Namespace) -> int:
    import diffusers
    import torch

    import flowsr

    pipe = load(options.checkpoint)
    unet, flow = pipe.unet.config, pipe.scheduler.config
    field = pipe.unet.receptive_field
    print(f"flowsr {flowsr.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    print(f"checkpoint       {options.checkpoint}")
    print(f"scale            x{pipe.scale_factor}")
    print(f"network          {type(pipe.unet).__name__}, {pipe.unet.num_parameters():,} parameters")
    print(f"widths           {tuple(unet.block_out_channels)} on patches of {unet.get('patch_size', 1)} HR pixels")
    if "source" in flow:
        print(f"flow             from {flow.source} with noise of std {flow.source_noise_std}, {flow.path} path")
    else:
        kind, target = type(pipe.scheduler).__name__, pipe.config.target
        print(f"diffusion        {kind}, {flow.beta_schedule} betas, of the {target}")
    print(f"predicts         the {flow.prediction_type}")
    print(
        "tiles            " + ("blended (attention or group norm)" if field is None else f"exact, halo {field} pixels")
    )
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    print(f"device           {device}")
    return 0


def card(options: argparse.Namespace) -> int:
    from diffusers.utils import logging

    from flowsr.publish import publish, write_card

    logging.disable_progress_bar()
    wrong = [given for given in options.results if "=" not in given]
    if wrong:
        raise ValueError(f"`--results` takes NAME=JSON, such as Set5=set5.json; got {wrong[0]}.")
    results = dict(given.split("=", 1) for given in options.results)
    if options.push_to_hub:
        print(publish(options.folder, options.push_to_hub, options.license, results))
    else:
        print(write_card(options.folder, license=options.license, results=results))
    return 0


def degrade(options: argparse.Namespace) -> int:
    import numpy as np
    import PIL.Image

    from flowsr import degradations

    if options.scale < 1 or options.count < 1:
        raise ValueError(f"`--scale` and `--count` must be positive, got {options.scale} and {options.count}.")
    with PIL.Image.open(options.input) as picture:
        hr = degradations.cut_to_multiple(np.asarray(picture.convert("RGB")), options.scale)
    if 0 in hr.shape:
        raise ValueError(f"{options.input} is smaller than one pixel of LR at scale {options.scale}.")
    random = np.random.default_rng(options.seed)
    draws = [degradations.degrade(hr, options.scale, options.degradation, random) for _ in range(options.count)]
    panels = [hr, *(draw.repeat(options.scale, axis=0).repeat(options.scale, axis=1) for draw in draws)]
    panels += [np.full_like(hr, 255)] * (-len(panels) % 4)
    rows = [np.concatenate(panels[start : start + 4], axis=1) for start in range(0, len(panels), 4)]
    PIL.Image.fromarray(np.concatenate(rows)).save(options.output)
    print(f"{options.output}: the original and {options.count} draws of {options.degradation}, seed {options.seed}.")
    return 0


def demo(options: argparse.Namespace) -> int:
    import numpy as np
    import PIL.Image
    import torch

    from flowsr.degradations import cut_to_multiple, downscale
    from flowsr.files import read_picture, save_picture
    from flowsr.metrics import psnr_y
    from flowsr.upscaler import side_by_side

    pipe = load(options.checkpoint)
    pipe.set_progress_bar_config(disable=True)
    scale = pipe.scale_factor
    photo = example_photo()
    hr = cut_to_multiple(np.asarray(read_picture(photo).convert("RGB")), scale)
    lr = PIL.Image.fromarray(downscale(hr, scale))
    start = time.perf_counter()
    sr = pipe(lr, num_inference_steps=options.steps, generator=torch.Generator().manual_seed(0)).images[0]
    seconds = time.perf_counter() - start
    faithful = pipe(lr, fidelity=1.0, generator=torch.Generator().manual_seed(0)).images[0]
    bicubic = lr.resize(sr.size, PIL.Image.BICUBIC)

    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "lr.png": lr,
        "flowsr.png": sr,
        "flowsr_faithful.png": faithful,
        "comparison.png": side_by_side([bicubic, sr, PIL.Image.fromarray(hr)]),
    }
    for name, image in written.items():
        save_picture(image, folder / name)
    print(
        f"{photo.name}: {lr.width}x{lr.height} -> {sr.width}x{sr.height} in {seconds:.2f} s ({options.steps} steps)."
    )
    for name, image in (
        ("bicubic", bicubic),
        (f"flowsr, {options.steps} steps", sr),
        ("flowsr, fidelity 1", faithful),
    ):
        print(f"  PSNR-Y {psnr_y(np.asarray(image), hr, scale):.2f} dB  {name}")
    print("bicubic | flowsr | original: " + str((folder / "comparison.png").resolve()))
    print("the upscaled picture:        " + str((folder / "flowsr.png").resolve()))
    return 0


def example_photo() -> Path:
    """The photo of the demo: inside the installed package, or beside it in a source checkout."""
    import flowsr

    for root in flowsr.__path__:
        photos = sorted((Path(root) / "examples").glob("*.png"))
        if photos:
            return photos[0]
    raise ValueError("The example photo is missing from this installation.")


if __name__ == "__main__":
    sys.exit(main())
