"""What happens on the web page of app.py: its events, from files and settings to what is seen and downloaded."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

import gradio as gr
import numpy as np
import PIL.Image
from diffusers import DiffusionPipeline

import flowsr
from flowsr.dial import Ends, at_fidelity, blend_ends, both_ends, enlarge, invention_heat, resized
from flowsr.files import as_rgb, check_target, read_file, with_provenance, write_file
from flowsr.picture_file import PictureFile
from flowsr.pipelines.output_size import OutputSize
from flowsr.upscaler import check_pixels, has_dial, resize_facts, side_by_side

MAX_PIXELS = 2**24  # of a result: one megapixel of input at x4
SEEN = 1400  # pixels of the longest side on the page; the file has all of them
FEATHER = 0.01  # of the longest side: std of the soft edge of a stroke
FAITHFUL_PAINT, VIVID_PAINT = "#2f6bff", "#ff8a1f"
AS_IT_CAME = "as it came"
KEPT = 3600  # seconds that a download stays
FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WebP": ".webp", "TIFF": ".tif"}


def picture_input(**options) -> gr.Image:
    """An image input that hands the file over untouched: what it is, `read_file` finds out."""
    component = gr.Image(**options)
    component.preprocess = lambda payload: payload and payload.path
    return component


class Work:
    """A picture of one session: both ends, what is seen of them, and where the dial and the brush stand.

    Attributes:
        dial: fidelity where nothing is painted.
        strokes: map of what is painted, NaN elsewhere; `None` where nothing is.
        exact: the flow's own answer stands, rather than a blend.
    """

    def __init__(self, name: str, ends: Ends, dial: float):
        self.name, self.ends, self.dial = name, ends, dial
        self.strokes: np.ndarray | None = None
        self.exact = True
        self.faithful, self.vivid = seen(ends.faithful), seen(ends.vivid)
        self.bicubic = as_rgb(ends.source).resize(self.faithful.size, PIL.Image.BICUBIC)

    @property
    def fidelity(self) -> float | np.ndarray:
        if self.strokes is None:
            return self.dial
        return np.where(np.isnan(self.strokes), np.float32(self.dial), self.strokes)

    def glance(self) -> PIL.Image.Image:
        """The blend at the size that is seen, in milliseconds."""
        ends = np.asarray(self.faithful), np.asarray(self.vivid)
        return PIL.Image.fromarray(
            blend_ends(*ends, self.fidelity, FEATHER * max(self.vivid.size)).round().astype("u1")
        )

    def result(self, pipe: DiffusionPipeline) -> PictureFile:
        """The picture as the dial and the brush stand, whole."""
        if self.exact:
            return at_fidelity(pipe, self.ends, self.dial)
        height, width = self.ends.vivid.frames[0].shape[:2]
        return self.ends.blend(self.fidelity, FEATHER * max(height, width))


class Page:
    """The events of the page around one pipeline, which works for one visitor at a time.

    Args:
        pipe: with a dial of fidelity.
        model (`str`): its name, as it is written into files.
        max_pixels (`int`): of a result.

    Raises:
        ValueError: for a pipeline without a dial.
    """

    def __init__(self, pipe: DiffusionPipeline, model: str = "x4", max_pixels: int = MAX_PIXELS):
        if not has_dial(pipe):
            raise ValueError(
                f"The page is built around the dial of fidelity, which a {type(pipe).__name__} lacks; take x4, for "
                "example."
            )
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.model, self.max_pixels = pipe, model, max_pixels
        self.scale = pipe.scale_factor
        self.one_at_a_time = threading.Lock()
        self.cancelled: set[str | None] = set()  # sessions
        self.folder = tempfile.TemporaryDirectory(prefix="flowsr-page-")  # of downloads

    def open(self, path: str | None) -> tuple[str | None, PIL.Image.Image | None, str]:
        """A dropped file -> the same, what is seen of it, and what there is to say."""
        if path is None:
            return None, None, ""
        picture = self.read(path)
        height, width = picture.frames[0].shape[:2]
        large = f"{width * self.scale}x{height * self.scale}"
        notes = "".join(f" Note: {note}." for note in picture.notes)
        return path, seen(picture), f"{Path(path).name}: {width}x{height}, which becomes {large}.{notes}"

    def read(self, path: str | None) -> PictureFile:
        if path is None:
            raise gr.Error("Drop or paste a picture first.", duration=8)
        try:
            picture = read_file(path, self.max_pixels // self.scale**2)
            if len(picture.frames) > 1:
                raise ValueError(
                    f"{path}: holds {len(picture.frames)} frames; `flowsr upscale` takes animations and pages."
                )
        except ValueError as error:
            raise self.refusal(error, path) from error
        return picture

    def refusal(self, error: ValueError, path: str) -> gr.Error:
        return gr.Error(str(error).replace(str(path), Path(path).name), duration=10)  # no folders of this machine

    def begin(self, request: gr.Request) -> None:
        """Forgets an earlier "cancel" of this visitor."""
        self.cancelled.discard(request.session_hash)

    def cancel(self, request: gr.Request) -> str:
        self.cancelled.add(request.session_hash)
        return "Cancelled."

    def watch(self, session: str | None, progress: gr.Progress, total: int):
        """A `callback_on_step_end` that reports each step, and ends the work of who has cancelled."""
        done = 0

        def on_step(pipe: DiffusionPipeline, step: int, timestep, tensors: dict) -> dict:
            nonlocal done
            done += 1
            if session in self.cancelled:
                raise gr.Error("Cancelled.", duration=4, title="flowsr")
            progress((min(done, total), total), desc="network evaluations", unit="evaluations")
            return tensors

        if session in self.cancelled:
            raise gr.Error("Cancelled.", duration=4, title="flowsr")
        return on_step

    def run(
        self,
        path: str | None,
        fidelity: float,
        steps: float,
        seed: float,
        consistency: str,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008  Gradio finds it by this default
    ) -> tuple:
        """Both ends of a picture, and the picture at `fidelity`."""
        picture, steps = self.read(path), int(steps)
        options = {"num_inference_steps": steps, "consistency": agreement(consistency), "tile": 256}
        with self.one_at_a_time:
            on_step = self.watch(request.session_hash, progress, 1 + steps * (1 if fidelity in (0, 1) else 2))
            ends = both_ends(self.pipe, picture, int(seed), on_step, **options)
            shown = seen(at_fidelity(self.pipe, ends, float(fidelity), on_step))
        work = Work(Path(path).stem, ends, float(fidelity))
        heat = PIL.Image.fromarray(invention_heat(np.asarray(work.faithful), np.asarray(work.vivid)))
        pair = side_by_side([work.bicubic, shown])
        canvas = {"background": work.faithful, "layers": [], "composite": None}
        return work, (work.bicubic, shown), pair, heat, canvas, self.words(work)

    def turn(self, work: Work | None, fidelity: float) -> tuple:
        """The dial in motion: a blend of the ends."""
        if work is None:
            return gr.skip(), gr.skip()
        work.dial, work.exact = float(fidelity), work.strokes is None and fidelity in (0, 1)
        return (work.bicubic, work.glance()), self.words(work)

    def settle(
        self,
        work: Work | None,
        fidelity: float,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> tuple:
        """The dial let go: the answer of the flow itself. A painted map stays a blend."""
        if work is None:
            return gr.skip(), gr.skip(), gr.skip()
        work.dial = float(fidelity)
        if work.strokes is not None:
            return self.views(work, work.glance())
        with self.one_at_a_time:
            on_step = self.watch(request.session_hash, progress, work.ends.options["num_inference_steps"])
            shown = seen(at_fidelity(self.pipe, work.ends, work.dial, on_step))
        work.exact = True
        return self.views(work, shown)

    def paint(self, work: Work | None, canvas: dict | None, fidelity: float) -> tuple:
        """The brush: strokes of two colours over the dial's fidelity make a map."""
        layers = (canvas or {}).get("layers") or []
        strokes = read_strokes([np.asarray(layer) for layer in layers if layer is not None])
        if work is None or (strokes is None and work.strokes is None):
            return gr.skip(), gr.skip(), gr.skip()
        work.dial, work.strokes = float(fidelity), strokes
        work.exact = strokes is None and fidelity in (0, 1)
        return self.views(work, work.glance())

    def views(self, work: Work, shown: PIL.Image.Image) -> tuple:
        """For the slider, the comparison and the words."""
        return (work.bicubic, shown), side_by_side([work.bicubic, shown]), self.words(work)

    def words(self, work: Work) -> str:
        if work.strokes is not None:
            faithful, vivid = (f"{100 * (work.strokes == end).mean():.0f} %" for end in (1, 0))
            return (
                f"A painted map: {faithful} of the picture faithful, {vivid} vivid, fidelity {work.dial:.2f} "
                "elsewhere; a feathered blend of the two ends."
            )
        if work.exact:
            return f"Fidelity {work.dial:.2f}, exact: the answer of the flow itself."
        return f"Fidelity {work.dial:.2f}: a blend of the two ends. Let go of the dial for the exact answer."

    def save(self, work: Work | None, format: str, outscale: float) -> str | None:
        """The whole picture as a file with its metadata, for download."""
        if work is None:
            return None
        with self.one_at_a_time:
            result = work.result(self.pipe)
        facts = {"fidelity": work.dial if work.strokes is None else f"painted, {work.dial} elsewhere"}
        if not work.exact:
            facts["dial"] = "blend of both ends"
        ends = work.ends
        return self.write(result, ends.source, ends.seed, ends.options, facts, format, outscale, work.name)

    def upscale(
        self,
        image: str,
        fidelity: float,
        steps: float,
        seed: float,
        consistency: str,
        format: str,
        outscale: float,
        request: gr.Request,
        progress=gr.Progress(),  # noqa: B008
    ) -> str:
        """Upscales a picture file in one call; the answer is a file."""
        picture = self.read(image)
        options = {"num_inference_steps": int(steps), "consistency": agreement(consistency), "tile": 256}
        with self.one_at_a_time:
            on_step = self.watch(request.session_hash, progress, int(steps))
            result = enlarge(self.pipe, picture, int(seed), on_step, fidelity=float(fidelity), **options)
        facts = {"fidelity": float(fidelity)}
        return self.write(result, picture, int(seed), options, facts, format, outscale, Path(image).stem)

    def write(
        self,
        result: PictureFile,
        source: PictureFile,
        seed: int,
        options: dict,
        facts: dict,
        format: str,
        outscale: float | None,
        name: str,
    ) -> str:
        """The path of a file with the picture and how it was made; it stays for an hour."""
        outscale = self.scale if outscale is None else outscale  # an empty field
        try:
            size = OutputSize(self.scale, outscale)
            check_pixels(source, size, self.max_pixels)
        except ValueError as error:
            raise self.refusal(error, name) from error
        made = {"software": f"flowsr {flowsr.__version__}", "model": self.model, "scale": self.scale, "seed": seed}
        made |= {"steps": options["num_inference_steps"], **facts, **resize_facts(source, size)}
        if options["consistency"]:
            made["consistency"] = options["consistency"]
        picture = with_provenance(resized(result, size.of(*source.frames[0].shape[:2])), made)
        for old in Path(self.folder.name).iterdir():
            if old.stat().st_mtime < time.time() - KEPT:
                shutil.rmtree(old, ignore_errors=True)
        target = Path(tempfile.mkdtemp(dir=self.folder.name)) / f"{name}_x{outscale:g}"
        target = target.with_name(target.name + (FORMATS.get(format) or picture.suffix))
        try:
            for note in check_target(picture, target):
                gr.Info(f"{note}.")
            write_file(picture, target)
        except ValueError as error:
            raise self.refusal(error, str(target)) from error
        return str(target)


def agreement(choice: str) -> str | None:
    return None if choice == "none" else choice


def seen(picture: PictureFile) -> PIL.Image.Image:
    """The first frame in 8-bit RGB, no larger than the page shows it."""
    image = as_rgb(picture)
    image.thumbnail((SEEN, SEEN), PIL.Image.LANCZOS)
    return image


def read_strokes(layers: list[np.ndarray]) -> np.ndarray | None:
    """Layers `(h, w, 4)` of uint8 -> `(h, w)`, float32: 1 where blue, 0 where orange, NaN where nothing is painted."""
    if not any((layer[..., 3] > 127).any() for layer in layers):
        return None
    strokes = np.full(layers[0].shape[:2], np.nan, np.float32)
    for layer in layers:
        strokes = np.where(layer[..., 3] > 127, layer[..., 2] > layer[..., 0], strokes)
    return strokes.astype(np.float32)


def layout() -> ModuleType:
    """app.py: beside the package in a checkout, in it where that was installed from a wheel."""
    package = Path(flowsr.__file__).parent
    path = next(path for path in (package / "app.py", package.parent / "app.py") if path.exists())
    spec = importlib.util.spec_from_file_location("flowsr_app", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
