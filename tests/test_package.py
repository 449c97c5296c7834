"""What others rely on: names, module paths, the layout, and the files that ship."""

import subprocess
import sys
from pathlib import Path

import flowsr

ROOT = Path(__file__).resolve().parents[1]

MODULES = {  # written into model_index.json: a file format
    "FlowMatchSRPipeline": "flowsr.pipelines.pipeline_flow_match_sr",
    "FlowMatchPipeline": "flowsr.pipelines.pipeline_flow_match",
    "DDPMSRPipeline": "flowsr.pipelines.pipeline_ddpm_sr",
    "UNetSRModel": "flowsr.models.unet_sr",
    "ContextUNetSRModel": "flowsr.models.unet_sr_context",
    "EncodedSRModel": "flowsr.models.encoded_sr",
    "FlowMatchSREulerScheduler": "flowsr.schedulers.scheduling_flow_match_sr_euler",
}


def test_module_paths_stay():
    for name, module in MODULES.items():
        assert getattr(flowsr, name).__module__ == module
        assert name in flowsr.__all__


def test_travelling_files_import_nothing_that_stays_behind():
    for path in [p for folder in ("models", "schedulers", "pipelines") for p in (ROOT / folder).glob("[a-z]*.py")]:
        imports = [line for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        modules = {line.split()[1] for line in imports}
        beside = {f"{module[1:]}.py" for module in modules if module.startswith(".")}
        assert not beside or path.parent.name == "pipelines", path
        roots = {module.split(".")[0] for module in modules if not module.startswith(".")}
        allowed = {"torch", "numpy", "PIL", "diffusers", "huggingface_hub", "__future__"} | set(
            sys.stdlib_module_names
        )
        assert roots <= allowed, path


def test_works_from_the_root_without_installing(tmp_path):
    script = f"""
import sys
sys.path = [p for p in sys.path if "__editable__" not in p and p != {str(ROOT)!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path.insert(0, {str(ROOT)!r})
import flowsr
assert flowsr.__file__.startswith({str(ROOT)!r})
assert flowsr.UNetSRModel.__module__ == "flowsr.models.unet_sr"
print("works")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "works", done.stderr


def test_the_wheel_holds_code_weights_and_example(tmp_path):
    call = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        ".",
    ]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 14 * 2**20
    script = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path = [{str(wheel)!r}] + [p for p in sys.path if p not in ("", {str(ROOT)!r})]
import zipfile
names = zipfile.ZipFile({str(wheel)!r}).namelist()
for name in ("flowsr/weights/x4/unet/diffusion_pytorch_model.safetensors", "flowsr/weights/x4/README.md",
             "flowsr/examples/budgie.png", "flowsr/models/unet_sr.py", "flowsr/py.typed", "flowsr/app.py"):
    assert name in names, name
assert not [name for name in names if name.startswith(("models/", "tests/"))]
target = {str(tmp_path / "site")!r}
zipfile.ZipFile({str(wheel)!r}).extractall(target)
sys.path[0] = target
import flowsr
assert flowsr.__file__.startswith(target)
pipe = flowsr.FlowMatchSRPipeline.from_pretrained(flowsr.bundled("x4"))
from flowsr.demo import example_photo
assert str(example_photo()).startswith(target)
print("works")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "works", done.stderr
