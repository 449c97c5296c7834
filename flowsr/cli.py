"""The command line of flowsr: what each command takes, and what it prints.

torch takes seconds to import, so that a command imports what it needs when its arguments have been read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import flowsr

EXAMPLES = {
    "flowsr": """\
examples:
  flowsr demo
  flowsr upscale photos/ old.jpg -o large/
  flowsr upscale small.png -o large.png --fidelity 1
  flowsr info""",
    "upscale": """\
examples:
  flowsr upscale photos/ old.jpg -o large/ --compare
  flowsr upscale small.png -o large.png --fidelity 1 --consistency exact
  flowsr upscale small.png -o large.png --checkpoint me/my-upscaler --device cuda --dtype float16
  flowsr upscale photos/ -o large/ --width 1920
  flowsr upscale photos/ -o large/ --quiet --json""",
    "evaluate": """\
examples:
  flowsr evaluate Set5/HR --lr Set5/LRx4 --steps 1 2 4 8
  flowsr evaluate photos/ --fidelity 0.5 --json result.json""",
    "info": """\
examples:
  flowsr info
  flowsr info --checkpoint runs/x4 --json""",
    "degrade": """\
example:
  flowsr degrade photo.png -o draws.png --degradation bsrgan --seed 1""",
    "card": """\
example:
  flowsr card runs/x4 --results Set5=set5.json --license apache-2.0 --push_to_hub me/my-upscaler""",
    "serve": """\
example:
  flowsr serve --port 7860 --checkpoint me/my-upscaler""",
    "demo": """\
example:
  flowsr demo -o demo_output --checkpoint ddpm_x4 --steps 10""",
}

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
    as_written = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    top = argparse.ArgumentParser(
        "flowsr", description="Image super-resolution by flow matching.", epilog=EXAMPLES["flowsr"], **as_written
    )
    top.add_argument("--version", action="version", version=f"flowsr {flowsr.__version__}")
    try:
        import shtab
    except ImportError:  # of the extra `completion`
        pass
    else:
        shtab.add_argument_to(top, "--print-completion", help="print the completion script of a shell")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(run, description: str) -> argparse.ArgumentParser:
        name = run.__name__
        added = commands.add_parser(
            name, help=description, description=description, epilog=EXAMPLES[name], **as_written
        )
        added.set_defaults(run=run)
        return added

    def checkpoint_option(to: argparse.ArgumentParser, default: str = "x4") -> None:
        auto = "; auto: x4, or x4-real for JPEGs and noise" if default == "auto" else ""
        kinds = f"bundled name, folder, single file or Hub id{auto} (default: {default})"
        to.add_argument("--checkpoint", default=default, help=kinds)

    def device_option(to: argparse.ArgumentParser) -> None:
        to.add_argument("--device", default="auto", help="torch device; auto: a GPU where there is one (default)")

    def flow_options(to: argparse.ArgumentParser, checkpoint: str = "x4") -> None:
        checkpoint_option(to, checkpoint)
        device_option(to)
        to.add_argument("--fidelity", type=float, default=0.0, help="0 vivid ... 1 faithful (default: 0)")
        to.add_argument("--consistency", choices=("exact", "soft"), help="make the output agree with its input")
        to.add_argument("--tile", type=int, help="LR pixels per tile; 0 for none (default: 256, or as memory allows)")
        to.add_argument("--seed", type=int, default=0, help="of the source noise (default: 0)")
        to.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (default: as saved)")

    it = command(upscale, "Upscale pictures and folders of pictures.")
    it.add_argument("input", nargs="+", help="picture files and folders; - for the standard input")
    it.add_argument("-o", "--output", required=True, help="folder, or a file name for one picture; - for stdout")
    it.add_argument("--format", choices=FORMATS, help="of the results (default: that of the name)")
    it.add_argument("--suffix", default="", help="behind the names of results in a folder, such as _x4")
    it.add_argument("--quality", type=int, help="1..100, of jpg, avif and heic (default: 95), and of lossy webp")
    it.add_argument("--overwrite", action="store_true", help="replace results that exist")
    it.add_argument(
        "--skip-existing", action="store_true", help="leave results that a call with this flag would make again"
    )
    it.add_argument("--max-pixels", type=int, help="largest result, all frames together")
    it.add_argument(
        "--max-memory", type=size_in_bytes, help="for the network's work, such as 2G (default: half of free)"
    )
    it.add_argument("--shard", type=shard_of, metavar="I/N", help="only the I-th of N parts of the pictures, by paths")
    it.add_argument("--engine", choices=("here", "ray"), default="here", help="this process, or workers of Ray")
    it.add_argument("--workers", type=int, help="of Ray (default: as many as there is room for)")
    it.add_argument("--gpus", type=float, default=0.0, help="of each of them; 0.5 puts two on a GPU (default: 0)")
    it.add_argument("--dry-run", action="store_true", help="say what it would take, and write nothing")
    it.add_argument(
        "--no-provenance", dest="provenance", action="store_false", help="do not write into the file how it was made"
    )
    it.add_argument("--fidelity-map", metavar="FILE", help="picture, white where faithful; stretched over each input")
    it.add_argument("--outscale", type=float, help="size of the result, times the input (default: the network's)")
    it.add_argument("--width", type=int, help="of the result in pixels; alone, the proportions stay")
    it.add_argument("--height", type=int, help="of the result in pixels; alone, the proportions stay")
    it.add_argument("--steps", type=int, default=4, help="network evaluations (default: 4)")
    it.add_argument("--compare", action="store_true", help="also write `bicubic | flowsr` side by side")
    it.add_argument("--uncertainty", action="store_true", help="also write a heat map of how far 8 samples lie apart")
    it.add_argument("--quiet", action="store_true", help="print errors alone")
    it.add_argument("--json", action="store_true", help="print one line of JSON for each picture")
    it.add_argument("--json-progress", action="store_true", help="likewise, and one after each step within a picture")
    flow_options(it, "auto")

    it = command(evaluate, "Measure on a folder of pictures: PSNR-Y, SSIM-Y, LPIPS, LR-PSNR.")
    it.add_argument("hr", help="folder of high-resolution pictures")
    it.add_argument("--lr", help="folder of low-resolution ones (default: MATLAB's bicubic of the first)")
    it.add_argument("--steps", type=int, nargs="+", default=[1, 4], help="network evaluations (default: 1 4)")
    it.add_argument("--lpips_weights", help="safetensors of LPIPS v0.1 with SqueezeNet")
    it.add_argument("--curve", metavar="PNG", help="measure the whole dial and plot PSNR-Y against LPIPS")
    it.add_argument("--others", metavar="CSV", help="other systems for the plot: columns system, psnr_y, lpips")
    it.add_argument("--json", metavar="FILE", help="also write every number to this file")
    flow_options(it)

    it = command(info, "Describe this machine, the checkpoints that ship, and one checkpoint.")
    it.add_argument("--json", action="store_true", help="print JSON")
    checkpoint_option(it)

    it = command(degrade, "Show draws of a training degradation of a picture, enlarged, beside the original.")
    it.add_argument("input", help="picture file")
    it.add_argument("-o", "--output", default="degraded.png", help="picture file (default: degraded.png)")
    it.add_argument("--degradation", default="real_esrgan", help="bicubic, bsrgan, photo or real_esrgan (the default)")
    it.add_argument("--scale", type=int, default=4, help="HR pixels per LR pixel (default: 4)")
    it.add_argument("--count", type=int, default=7, help="draws (default: 7)")
    it.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")

    it = command(card, "Write the model card of a pipeline folder from its evaluation, settings and example.*.")
    it.add_argument("folder", help="of a saved pipeline")
    it.add_argument("--results", nargs="+", default=[], metavar="NAME=JSON", help="of `flowsr evaluate --json`")
    it.add_argument("--license", help="of the weights, as the Hub abbreviates it, such as apache-2.0")
    it.add_argument("--push_to_hub", metavar="USER/NAME", help="also upload the pipeline with its card")

    it = command(serve, "Open the web page: dial, brush, heat map, download (extra `app`).")
    it.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for others too (default: 127.0.0.1)")
    it.add_argument("--port", type=int, default=7860, help="default: 7860")
    it.add_argument("--max-pixels", type=int, default=2**24, help="largest result (default: 2 ** 24)")
    it.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights (default: as saved)")
    checkpoint_option(it)
    device_option(it)

    it = command(demo, "Upscale the example photo and compare with bicubic and the original.")
    it.add_argument("-o", "--output", default="demo_output", help="folder (default: demo_output)")
    it.add_argument("--steps", type=int, default=4, help="network evaluations (default: 4)")
    checkpoint_option(it)
    device_option(it)
    return top


def upscale(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from tqdm import tqdm

    from flowsr.folders import shard_of_process
    from flowsr.streaming import Progress
    from flowsr.upscale_files import FileUpscaler, UpscaleSettings, is_one_file, left_to_do, plan, refuse_existing

    settings = UpscaleSettings(**{field.name: getattr(options, field.name) for field in fields(UpscaleSettings)})
    if options.engine == "ray":
        return upscale_by_ray(options, settings)
    if options.workers or options.gpus:
        raise ValueError("`--workers` and `--gpus` are of `--engine ray`; `--device` is that of this process.")
    shard, streamed = shard_of_process(options.shard), options.output == "-"
    if streamed and (shard or options.skip_existing):
        raise ValueError("`--shard` and `--skip-existing` need a folder; the standard output takes one picture.")
    if options.skip_existing and is_one_file(options.output):
        raise ValueError(f"`--skip-existing` needs a folder of results, `-o {options.output}` is one file.")
    jobs = planned = plan(options.input, options.output, settings, shard)
    if streamed and sys.stdout.isatty():
        raise ValueError("The standard output is a terminal; send it to a file or another program.")
    if not (options.overwrite or options.skip_existing):
        refuse_existing(jobs, settings)
    upscaler, done = FileUpscaler(settings), None
    if options.skip_existing:
        jobs, done = left_to_do(planned, options.output, upscaler.deciding(), shard)
        if not options.overwrite:
            refuse_existing(jobs, settings)
    if options.dry_run:
        return dry_run(upscaler, [job.source for job in jobs], options.json)

    if not options.quiet and (seconds := upscaler.foresee([job.source for job in jobs]) or 0) > 60:
        print(f"flowsr: about {tqdm.format_interval(seconds)} for {len(jobs)} pictures.", file=sys.stderr)
    line = int(os.environ.get("LOCAL_RANK", 0))  # of the screen, among processes that were launched together
    printed, as_json = sys.stderr if streamed else sys.stdout, options.json or options.json_progress
    failures, bar = [], tqdm(jobs, unit="picture", position=line, disable=True if options.quiet else None)

    def say(note: str) -> None:
        bar.write(f"flowsr: {job.source}: {note}.", file=sys.stderr)

    def inside(so_far: Progress) -> None:
        left = (time.perf_counter() - start) * (1 / so_far.share - 1) if so_far.share else 0.0
        parts = f"part {so_far.part} of {so_far.parts}, " if so_far.parts > 1 else ""
        bar.set_postfix_str(f"{parts}step {so_far.step} of {so_far.steps}, {bar.format_interval(left)} left")
        if options.json_progress:
            event = {"input": str(job.source), **so_far._asdict(), "seconds_left": round(left, 3)}
            print(json.dumps(event), file=printed, flush=True)

    for job in bar:
        bar.set_description(job.source.name)
        bar.set_postfix_str("")
        start = time.perf_counter()
        stream = sys.stdout.buffer if streamed else None
        report = upscaler(*job, done, stream=stream, say=say, advice=not options.quiet, progress=inside)
        failures += [report["error"]] if "error" in report else []
        if as_json:
            print(json.dumps(report), file=printed, flush=True)
    for failure in failures:
        print(f"flowsr: {failure}", file=sys.stderr)
    if not options.quiet and not as_json:
        where = "standard output" if streamed else options.output
        before = f" {len(planned) - len(jobs)} were there already." if done is not None else ""
        print(f"{len(jobs) - len(failures)} of {len(jobs)} pictures written to {where}.{before}", file=printed)
    return 1 if failures else 0


def upscale_by_ray(options: argparse.Namespace, settings) -> int:
    """Leaves the pictures to workers of Ray, and prints what they report."""
    from dataclasses import asdict

    from flowsr.ray import upscale

    second = options.compare or options.uncertainty
    if options.dry_run or second or len(options.input) > 1 or "-" in (*options.input, options.output):
        raise ValueError(
            "`--engine ray` takes one folder to another, without `--dry-run`, `--compare` and `--uncertainty`."
        )

    def on_report(report: dict) -> None:
        if options.json or options.json_progress:
            print(json.dumps(report), flush=True)
        for note in report.get("notes", []):
            print(f"flowsr: {report['input']}: {note}.", file=sys.stderr)

    workers = {"workers": options.workers, "gpus": options.gpus, "shard": options.shard}
    place = (options.input[0], options.output)
    done = upscale(*place, **workers, overwrite=options.overwrite, on_report=on_report, **asdict(settings))
    for failure in done.failures:
        print(f"flowsr: {failure}", file=sys.stderr)
    if not (options.quiet or options.json or options.json_progress):
        count = f"{done.made} of {done.made + len(done.failures)} pictures"
        print(f"{count} written to {options.output}. {done.skipped} were there already.")
    return 1 if done.failures else 0


def dry_run(upscaler, sources: list[Path], as_json: bool) -> int:
    """Prints what each picture would take; 1 where one cannot be done."""
    from dataclasses import asdict

    from flowsr.picture_reader import shape_of

    failures, seconds, disk = [], 0.0, 0
    for source in sources:
        try:
            needed = upscaler.estimate(source)
        except ValueError as error:
            failures.append(str(error) if str(source) in str(error) else f"{source}: {error}")
            continue
        seconds, disk = seconds + needed.seconds, disk + needed.disk
        if as_json:
            print(json.dumps({"input": str(source), **asdict(needed)}))
        else:
            lr_width, lr_height, *_ = shape_of(source)
            print(
                f"{source}: {lr_width}x{lr_height} -> {needed.width}x{needed.height} in {needed.parts} parts, about "
                f"{needed.seconds:.1f} s, {needed.memory / 2**20:.0f} MiB of memory, {needed.disk / 2**20:.1f} MiB "
                "before compression"
            )
    if not as_json:
        print(f"Together about {seconds:.0f} s and {disk / 2**20:.1f} MiB before compression; nothing was written.")
    for failure in failures:
        print(f"flowsr: {failure}", file=sys.stderr)
    return 1 if failures else 0


def shard_of(text: str) -> tuple[int, int]:
    """`2/4`: the second of four."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"a shard is I/N with I from 1 to N, such as 2/4; got {text!r}")
    return int(number), int(count)


def size_in_bytes(text: str) -> int:
    """`512M` or `2G`, in powers of 1024; a number alone is bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = int(float(number) * 1024 ** ["", "K", "M", "G", "T"].index(unit))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"a size is a positive number with K, M, G or T, such as 2G; got {text!r}")
    return size


def pipeline_of(options: argparse.Namespace):
    """The pipeline of `--checkpoint`, `--device` and `--dtype`, which prints nothing but errors."""
    import torch

    from flowsr.loading import load_silently

    dtype = getattr(options, "dtype", None)
    return load_silently(options.checkpoint, options.device, dtype and getattr(torch, dtype))


def evaluate(options: argparse.Namespace) -> int:
    from flowsr.evaluation import load_pairs, markdown_table, measure_dial, measure_steps, plot_dial, read_others

    if options.others and not options.curve:
        raise ValueError("`--others` is drawn into the plot of `--curve PNG`; give that too.")
    if options.curve and options.fidelity:
        raise ValueError(f"`--curve` measures the whole dial; leave `--fidelity`, got {options.fidelity}.")
    others = read_others(options.others) if options.others else []
    pipe = pipeline_of(options)
    pairs = load_pairs(options.hr, options.lr, pipe.scale_factor)
    how = {
        "consistency": options.consistency,
        "seed": options.seed,
        "tile": 256 if options.tile is None else options.tile or None,
    }
    how["lpips_weights"] = options.lpips_weights
    if options.curve:
        result = measure_dial(pipe, pairs, options.steps, **how)
        plot_dial(result, others, options.curve, f"{Path(options.hr).resolve().parent.name}, x{pipe.scale_factor}")
    else:
        result = measure_steps(pipe, pairs, options.steps, options.fidelity, **how)
    print(f"{len(pairs)} pictures of {options.hr}, x{pipe.scale_factor}, seed {options.seed}; {result['lpips']}\n")
    print(markdown_table(result["rows"]))
    if options.json:
        partial = Path(f"{options.json}.partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(partial, options.json)
    return 0


def info(options: argparse.Namespace) -> int:
    from diffusers.utils import logging

    from flowsr import doctor
    from flowsr.loading import load

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    parts = {
        "versions": doctor.versions(),
        "machine": doctor.machine(),
        "bundled": doctor.BUNDLED,
        "checkpoint": {"name": options.checkpoint, **doctor.describe(load(options.checkpoint))},
    }
    if options.json:
        print(json.dumps(parts, indent=1))
        return 0
    print(", ".join(f"{name} {version}" for name, version in parts.pop("versions").items()))
    for title, words in parts.items():
        print(f"\n{title}")
        for name, value in words.items():
            print(f"  {name:<14} {value}")
    return 0


def card(options: argparse.Namespace) -> int:
    from diffusers.utils import logging

    from flowsr.hub import publish, write_card

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
    from flowsr.demo import degradation_sheet

    sheet = degradation_sheet(options.input, options.degradation, options.scale, options.count, options.seed)
    sheet.save(options.output)
    print(f"{options.output}: the original and {options.count} draws of {options.degradation}, seed {options.seed}.")
    return 0


def serve(options: argparse.Namespace) -> int:
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ImportError("The page needs Gradio: pip install 'flowsr[app]'.") from None
    from flowsr.page import Page, layout

    model = Path(options.checkpoint).name if Path(options.checkpoint).exists() else options.checkpoint
    app, page = layout(), Page(pipeline_of(options), model, options.max_pixels)
    app.build(page).launch(server_name=options.host, server_port=options.port, **app.LAUNCH)
    return 0


def demo(options: argparse.Namespace) -> int:
    pipe = pipeline_of(options)
    from flowsr.demo import run_demo

    made = run_demo(pipe, Path(options.output), options.steps)
    (width, height), (lr_width, lr_height) = made.size, made.lr_size
    print(
        f"{made.photo.name}: {lr_width}x{lr_height} -> {width}x{height} in {made.seconds:.2f} s "
        f"({options.steps} steps)."
    )
    for name, psnr in made.psnr.items():
        print(f"  PSNR-Y {psnr:.2f} dB  {name}")
    print(f"bicubic | flowsr | original: {made.comparison.resolve()}")
    print(f"the upscaled picture:        {made.upscaled.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
