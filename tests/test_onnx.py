"""The network in onnxruntime, and with int8 weights."""

import numpy as np
import pytest
import torch
from conftest import make_encoded, make_pipeline, make_unet, random_picture

from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline, UNetSRModel

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from flowsr.onnx import OnnxUNet, export  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """The network of `make_pipeline()` as a file: exporting takes seconds."""
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    export(make_unet(), path)
    return path


def test_any_size_and_batch_give_what_torch_gives(tmp_path):
    unet = make_unet(block_out_channels=(8, 8), norm="layer")
    export(unet, tmp_path / "unet.onnx")
    loaded = OnnxUNet(tmp_path / "unet.onnx")
    assert loaded.config.scale_factor == unet.config.scale_factor
    assert (loaded.size_multiple, loaded.receptive_field) == (unet.size_multiple, unet.receptive_field)
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in ((1, 4, 14), (3, 10, 2)):
        sample = torch.rand(batch, 3, 4 * height, 4 * width, generator=generator) * 2 - 1
        lr = torch.rand(batch, 3, height, width, generator=generator) * 2 - 1
        timestep = torch.rand(batch, generator=generator) * 1000
        with torch.no_grad():
            expected = unet(sample, timestep, lr).sample
        torch.testing.assert_close(loaded(sample, timestep, lr).sample, expected, atol=1e-4, rtol=1e-4)


def test_the_same_picture_to_one_grey_level(flat):
    pipe = make_pipeline()
    calls = [(random_picture(9, 7), {}), (random_picture(30, 5), {"tile": 8}), (random_picture(1, 1, "LA"), {})]

    def upscale():
        seed = torch.Generator().manual_seed
        return [np.asarray(pipe(image, generator=seed(0), **more).images[0]).astype(int) for image, more in calls]

    expected = upscale()
    pipe.unet = OnnxUNet(flat)
    for a, b in zip(upscale(), expected):
        assert np.abs(a - b).max() <= 1


def test_encoder_and_head_are_two_files_and_one_network(tmp_path):
    pipe = FlowMatchSRPipeline(make_encoded(), FlowMatchSREulerScheduler(source="prior"))
    pipe.set_progress_bar_config(disable=True)
    export(pipe.unet, tmp_path / "unet.onnx")
    calls = [{}, {"tile": 8}, {"fidelity": 1.0}, {"num_images_per_prompt": 2}]
    image, seed = random_picture(13, 10), torch.Generator().manual_seed

    def upscale():
        return [np.asarray(pipe(image, generator=seed(0), **call).images[-1]).astype(int) for call in calls]

    expected = upscale()
    pipe.unet = OnnxUNet(tmp_path / "unet.onnx")
    for a, b in zip(upscale(), expected):
        assert np.abs(a - b).max() <= 1
    (tmp_path / "unet.encoder.onnx").unlink()
    with pytest.raises(ValueError, match="its encoder .* is not there"):
        OnnxUNet(tmp_path / "unet.onnx")


def test_what_cannot_be_exported_or_loaded_says_so(flat, tmp_path):
    with pytest.raises(ValueError, match="LR condition"):
        export(make_unet(lr_channels=None, precondition=False), tmp_path / "unet.onnx")
    with pytest.raises(ValueError, match="float32"):
        export(make_unet().to(torch.bfloat16), tmp_path / "unet.onnx")
    import onnx

    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    same = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "same", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(same, ir_version=9, opset_imports=opset), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"flowsr\.onnx\.export"):
        OnnxUNet(tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="guidance_scale"):
        OnnxUNet(flat)(torch.zeros(1, 3, 4, 4), 0, torch.zeros(1, 3, 1, 1), torch.ones(1) > 0)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_weights_by_torchao(kind, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    pipe = make_pipeline()
    picture = random_picture(9, 7)
    expected = np.asarray(pipe(picture, fidelity=1.0, generator=torch.Generator().manual_seed(0)).images[0])
    pipe.unet.save_pretrained(tmp_path / "float")
    config = TorchAoConfig(getattr(quantization, kind)())
    quantised = UNetSRModel.from_pretrained(tmp_path / "float", quantization_config=config, torch_dtype=torch.float32)
    linear = [name for name, p in quantised.named_parameters() if type(p).__name__ == "Int8Tensor"]
    assert sorted(linear) == sorted(
        f"{name}.weight" for name, module in pipe.unet.named_modules() if isinstance(module, torch.nn.Linear)
    )
    quantised.save_pretrained(tmp_path / "int8")
    pipe.unet = UNetSRModel.from_pretrained(tmp_path / "int8", torch_dtype=torch.float32)
    out = np.asarray(pipe(picture, fidelity=1.0, generator=torch.Generator().manual_seed(0)).images[0])
    assert np.abs(out.astype(int) - expected).mean() < 3
