"""Model cards: what a pipeline is, how it is loaded, what was measured, and what it is not for."""

from __future__ import annotations

import inspect
import os
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from flowsr.metrics import COLUMNS

KEPT = "<!-- Written by flowsr down to this line; what stands below it is kept. -->"
METRICS = {"psnr_y": "psnr", "ssim_y": "ssim", "lpips": "lpips", "lr_psnr": "psnr"}  # their type in the model-index
LOAD = """\
```python
{before}
pipe = {cls}.from_pretrained("{name}"{trust})
{call}
```"""
DIAL = """\
The dial: `pipe(image, fidelity=1.0)` gives the most faithful picture, by one network evaluation; `fidelity=0.0` (the
default) follows the flow to its end, with more texture at each of `num_inference_steps`."""
CONSISTENCY = """\
`consistency="exact"` makes the output downscale to its input, for clean pictures that were downscaled;
`consistency="soft"` does so for colour and tone alone, for camera pictures and JPEGs."""
LIMITS = """\
For pictures like those of the training: noise, blur and JPEG blocks that the network has not seen are enlarged with
the rest. Texture that the input does not hold is plausible, not evidence: do not read number plates, documents or
medical and scientific pictures with it. Look at your own kind of pictures before you rely on it."""
GENERATOR_LIMITS = """\
For study and play. The pictures are made up; they carry the slant of the training data, and may resemble pictures in
it."""
MEASURED = """\
By `flowsr evaluate`: PSNR and SSIM on Y (BT.601) without a border of `scale` pixels, as in the literature; LR-PSNR
says how well the output, downscaled, agrees with its input."""


def model_card(
    pipe: DiffusionPipeline,
    name: str,
    license: str | None = None,
    evaluation: dict[str, dict] | None = None,
    settings: dict[str, Any] | None = None,
    picture: str | None = None,
) -> ModelCard:
    """The card of a pipeline.

    Args:
        pipe: what is described.
        name (`str`): repository or folder that it is loaded from.
        license (`str`, *optional*): of the weights, as the Hub abbreviates it.
        evaluation (`dict`, *optional*): results of `flowsr evaluate` by the name of the test set; what follows a comma
            in a name is a remark.
        settings (`dict`, *optional*): of the training; absolute paths are cut to their last part.
        picture (`str`, *optional*): file beside the card that shows an example.
    """
    cls, upscales = type(pipe).__name__, hasattr(pipe, "scale_factor")
    takes = inspect.signature(type(pipe).__call__).parameters
    evaluation, settings = evaluation or {}, without_places(settings or {})
    dataset, folders = settings.get("dataset_name"), settings.get("train_data_dir")
    results = list(eval_results(evaluation))
    data = ModelCardData(
        license=license,
        library_name="diffusers",
        pipeline_tag="image-to-image" if upscales else "unconditional-image-generation",
        tags=["diffusers", "flowsr", "diffusion" if cls.startswith("DDPM") else "flow-matching"]
        + ["super-resolution"] * upscales,
        datasets=[dataset] if dataset else None,
        model_name=os.path.basename(name) if results else None,
        eval_results=results or None,
    )

    def load(cls: str, library: str, trust: str = "") -> str:
        before, call = f"from {library} import {cls}\n", "pictures = pipe(batch_size=4).images"
        if upscales:
            before, call = f"{before}from PIL import Image\n", 'large = pipe(Image.open("small.png")).images[0]'
        return LOAD.format(before=before, cls=cls, name=name, trust=trust, call=call)

    scale = f" x{pipe.scale_factor}" if upscales else ""
    size = f"{pipe.unet.num_parameters():,} parameters (`{type(pipe.unet).__name__}`)"
    parts = [f"# {name}", " ".join(inspect.getdoc(type(pipe)).split("\n\n")[0].split())]
    parts.append(f"`{cls}`{scale}, {size}, `{type(pipe.scheduler).__name__}`.")
    parts += [f"![An example]({picture})"] if picture else []
    parts += ["## Use", load(cls, "flowsr"), "With diffusers alone, which runs the code in this repository:"]
    parts += [load("DiffusionPipeline", "diffusers", ", trust_remote_code=True")]
    parts += [DIAL] if "fidelity" in takes else []
    parts += [CONSISTENCY] if "consistency" in takes else []
    if evaluation:
        parts += ["## Measured", MEASURED, results_table(evaluation)]
    if settings:
        folders = [folders] if isinstance(folders, str) else folders or []
        parts += ["## Training", f"On {', '.join([dataset] if dataset else folders) or 'data not named'}."]
        parts += [f"```yaml\n{yaml_dump(settings, sort_keys=False)}```"]
    parts += ["## Intended use and limits", LIMITS if upscales else GENERATOR_LIMITS, "## Licence"]
    weights = f"The weights: {license}." if license else "None has been chosen for the weights yet: ask before use."
    parts += [f"{weights} The code beside them is that of flowsr: Apache-2.0.", KEPT]
    return ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n")


def eval_results(evaluation: dict[str, dict]):
    """The results of the pipeline as entries of the model-index."""
    for name, result in evaluation.items():
        for row in result["rows"]:
            for key, kind in METRICS.items():
                if key in row and row["method"] != "bicubic":
                    yield EvalResult(
                        task_type="image-to-image",
                        task_name=f"Super-resolution x{result['scale']}",
                        dataset_type=name.split(",")[0],
                        dataset_name=name.split(",")[0],
                        metric_type=kind,
                        metric_name=f"{COLUMNS[key][0]}, {method(row, result)}",
                        metric_value=round(row[key], 4),
                    )


def method(row: dict, result: dict) -> str:
    """A row of results with what else it depends on."""
    words = [row["method"].removeprefix("flowsr, ")]
    if row["method"] != "bicubic":
        words += [f"fidelity {result['fidelity']:g}"] if result.get("fidelity") else []
        words += [f"consistency {result['consistency']}"] if result.get("consistency") else []
    return ", ".join(words)


def results_table(evaluation: dict[str, dict]) -> str:
    columns = [key for key in METRICS if any(key in row for result in evaluation.values() for row in result["rows"])]
    titles = ["pictures", "method", *(COLUMNS[key][0] for key in columns)]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for name, result in evaluation.items():
        for row in result["rows"]:
            cells = [COLUMNS[key][1].format(row[key]) if key in row else "" for key in columns]
            lines.append(f"| {name.split(',')[0]} | {method(row, result)} | " + " | ".join(cells) + " |")
    lines = list(dict.fromkeys(lines))  # bicubic once for each test set
    measures = sorted({result["lpips"] for result in evaluation.values() if "lpips" in columns})
    return "\n".join(lines) + "".join(f"\n\nLPIPS here is {measure}." for measure in measures)


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without what says where files lie on the machine of the training, and without empty ones."""

    def short(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [short(each) for each in value]
        if isinstance(value, dict):
            return {key: short(each) for key, each in value.items()}
        if isinstance(value, str) and (os.path.isabs(value) or value.startswith(("~", "."))):
            return os.path.basename(value.rstrip(os.sep))
        return value

    dropped = ("output_dir", "resume_from_checkpoint", "push_to_hub")
    return {key: short(value) for key, value in settings.items() if value is not None and key not in dropped}
