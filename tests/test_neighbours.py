"""The pipeline as other programs call it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_pipeline

from flowsr import DDPMSRPipeline, Upscaler, bundled

ROOT = Path(__file__).resolve().parents[1]


def test_upscaler_is_a_function_of_tensors(pipe):
    model = Upscaler(pipe, num_inference_steps=2).to("cpu").eval()
    images = torch.rand(3, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    large = model(images)
    assert large.shape == (3, 3, 5 * model.scale, 6 * model.scale)
    assert 0 <= large.min() <= large.max() <= 1
    assert (large.dtype, model.dtype, model.device) == (images.dtype, torch.float32, torch.device("cpu"))
    assert torch.equal(large, model(images))
    torch.testing.assert_close(model(images[1:2]), large[1:2], atol=1e-5, rtol=0)
    assert not torch.equal(Upscaler(pipe, seed=1, num_inference_steps=2)(images), large)
    assert model(images.half()).dtype == torch.float16
    assert model.model is pipe.unet
    assert [each().dtype for each in (model.bfloat16, model.float)] == [torch.bfloat16, torch.float32]
    assert (model.purpose, model.input_channels, model.output_channels) == ("SR", 3, 3)


def test_upscaler_hands_options_on_and_refuses_other_shapes(pipe):
    image = torch.rand(1, 3, 4, 4)
    expected = pipe(image, fidelity=1.0, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert torch.equal(Upscaler(pipe, fidelity=1.0)(image), expected)
    for wrong in (torch.rand(3, 4, 4), torch.rand(1, 4, 4, 4)):
        with pytest.raises(ValueError, match=r"shape \(n, 3, h, w\)"):
            Upscaler(pipe)(wrong)


def test_upscaler_takes_checkpoints_by_name():
    image = torch.rand(1, 3, 4, 4)
    pipe = DDPMSRPipeline.from_pretrained(bundled("ddpm_x4"))
    assert torch.equal(Upscaler("ddpm_x4", num_inference_steps=1)(image), Upscaler(pipe, num_inference_steps=1)(image))
    with pytest.raises(ValueError, match="`fidelity` is a dial of flow matching"):
        Upscaler(pipe, fidelity=0.5)


@pytest.fixture
def node():
    """Found and called as ComfyUI does: by path, through the mappings, with the declared defaults."""
    path = ROOT / "integrations/comfyui/__init__.py"
    spec = importlib.util.spec_from_file_location(str(path.parent).replace(".", "_x_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS.keys() == module.NODE_DISPLAY_NAME_MAPPINGS.keys()
    (cls,) = module.NODE_CLASS_MAPPINGS.values()
    declared = cls.INPUT_TYPES()["required"]
    defaults = {name: options[0]["default"] for name, (_, *options) in declared.items() if options}
    assert cls.RETURN_TYPES == ("IMAGE",)
    assert set(declared) == set(defaults) | {"image", "consistency"}

    def call(image, **changes):
        return getattr(cls(), cls.FUNCTION)(image=image, **{**defaults, "consistency": "none", **changes})

    return call


def test_comfyui_node_with_the_bundled_network(node):
    image = torch.rand(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    (large,) = node(image)
    assert large.shape == (2, 20, 28, 3)
    assert large.device == torch.device("cpu")
    assert 0 <= large.min() <= large.max() <= 1
    assert torch.equal(node(image)[0], large)
    assert not torch.equal(node(image, seed=1)[0], large)
    torch.testing.assert_close(node(image, tile=4)[0], large, atol=1e-4, rtol=0)
    (faithful,) = node(image, checkpoint=bundled("x4"), fidelity=1.0, consistency="exact")
    assert faithful.shape == large.shape
    white = torch.ones(1, 4, 4, 3)
    assert torch.equal(node(white + 0.01)[0], node(white)[0])  # a slight overshoot is no error


def test_comfyui_shows_progress_with_a_preview_and_can_end_the_work(node, monkeypatch):
    bars, interrupted = [], []

    class ProgressBar:
        def __init__(self, total):
            self.calls = []
            bars.append(self)

        def update_absolute(self, value, total=None, preview=None):
            self.calls.append((value, total, preview))

    class InterruptProcessingException(Exception):
        pass

    def throw():
        if interrupted:
            raise InterruptProcessingException

    management = ModuleType("comfy.model_management")
    management.throw_exception_if_processing_interrupted = throw
    management.get_torch_device = lambda: torch.device("cpu")
    utils = ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    for name, module in (("comfy", ModuleType("comfy")), ("comfy.model_management", management)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "comfy.utils", utils)
    image = torch.rand(2, 5, 7, 3, generator=torch.Generator().manual_seed(0))
    (large,) = node(image, steps=3)
    values, totals, previews = zip(*bars[0].calls)
    assert (values, set(totals)) == ((1, 2, 3, 4, 5, 6), {6})
    kind, picture, side = previews[2]  # the last step of the first picture: its result, before nothing but rounding
    assert (kind, picture.size, side) == ("JPEG", (28, 20), 512)
    difference = torch.from_numpy(np.asarray(picture).copy()) / 255 - large[0]
    assert difference.abs().max() <= 0.5 / 255 + 1e-6
    node(image[:1], checkpoint="ddpm_x4", steps=1)
    assert bars[1].calls == [(1, 1, None)]
    interrupted.append(True)
    with pytest.raises(InterruptProcessingException):
        node(image)


@pytest.fixture
def chainner(monkeypatch):
    """The node of chaiNNer among what it imports there, with the arguments that it was registered with."""
    registered = {}

    class Group:
        def register(self, **options):
            registered.update(options)
            return lambda function: function

    def declared(*args, **options):
        return {"args": args, **options}

    settings = ModuleType("chain.settings")
    settings.get_settings = lambda context: SimpleNamespace(device=torch.device("cpu"))
    inputs = ModuleType("nodes.properties.inputs")
    for name in ("EnumInput", "ImageInput", "NumberInput", "SliderInput", "TextInput"):
        setattr(inputs, name, declared)
    outputs = ModuleType("nodes.properties.outputs")
    outputs.ImageOutput = declared
    api = ModuleType("api")
    api.NodeContext = object
    package = ModuleType("chain.pytorch")
    package.processing_group = Group()
    folders = [ModuleType(name) for name in ("chain", "chain.pytorch.processing", "nodes", "nodes.properties")]
    for module in (*folders, package, settings, inputs, outputs, api):
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    path = ROOT / "integrations/chainner/upscale_flowsr.py"
    spec = importlib.util.spec_from_file_location("chain.pytorch.processing.upscale_flowsr", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, registered


def test_chainner_node(chainner):
    module, registered = chainner
    seen = []
    context = SimpleNamespace(set_progress=seen.append)
    _, *others = registered["inputs"]
    defaults = [each["default"] if "default" in each else each["args"][2] for each in others]
    img = np.random.default_rng(0).random((5, 7, 3), np.float32)
    large = module.upscale_flowsr_node(context, img, *defaults)
    assert (large.shape, large.dtype, seen) == ((20, 28, 3), np.float32, [0.25, 0.5, 0.75, 1.0])
    expected = Upscaler("x4", num_inference_steps=4)(torch.from_numpy(img[..., ::-1].copy()).movedim(-1, 0)[None])
    np.testing.assert_allclose(large[..., ::-1], expected[0].movedim(0, -1), atol=1e-5)
    for shape in ((5, 7), (5, 7, 4)):
        large = module.upscale_flowsr_node(context, np.ones(shape, np.float32), *defaults)
        assert large.shape == (20, 28, *shape[2:])


def test_comfyui_node_with_alpha_and_another_checkpoint(node, tmp_path):
    make_pipeline(scale_factor=2, patch_size=2).save_pretrained(tmp_path)
    assert node(torch.rand(1, 4, 4, 4), checkpoint=str(tmp_path))[0].shape == (1, 8, 8, 4)
    assert node(torch.rand(1, 4, 4, 3), checkpoint="ddpm_x4", steps=1)[0].shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="no bundled checkpoint"):
        node(torch.rand(1, 4, 4, 3), checkpoint="x9")
