"""The pipeline as a user calls it."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from bad_calls import BAD_ARGUMENTS, BAD_IMAGES
from conftest import make_pipeline, random_picture, run_without_flowsr, seeded, smooth_picture

from flowsr import FlowMatchSREulerScheduler, FlowMatchSRPipeline
from flowsr.cli import main
from flowsr.pipelines import image_processor
from flowsr.pipelines.consistency import downscale


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (13, 17), (64, 48)])
@pytest.mark.parametrize(
    "config",
    [{}, {"block_out_channels": (8, 8, 8)}, {"block_out_channels": (8, 8), "patch_size": 1, "norm": "group"},
     {"scale_factor": 2, "patch_size": 2}, {"scale_factor": 3, "patch_size": 3}],
)  # fmt: skip
def test_output_is_exactly_scale_times_the_input(size, config):
    pipe = make_pipeline(**config)
    out = pipe(random_picture(*size), num_inference_steps=2).images[0]
    assert out.size == (size[0] * pipe.scale_factor, size[1] * pipe.scale_factor)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I"])
def test_every_mode_comes_back_in_kind(pipe, mode):
    picture = random_picture(6, 5)
    if mode == "PA":
        picture = picture.convert("P").convert("PA")
    elif mode in ("I;16", "I"):
        levels = np.random.default_rng(0).integers(0, 65536, (5, 6), dtype=np.uint16)
        picture = PIL.Image.fromarray(levels)
        picture = picture if mode == "I;16" else PIL.Image.fromarray(levels.astype(np.int32))
    else:
        picture = picture.convert(mode)
    out = pipe(picture, num_inference_steps=1).images[0]
    assert out.size == (24, 20)
    assert out.mode == {"1": "L", "P": "RGB", "PA": "RGBA", "I": "I;16"}.get(mode, mode)


def test_alpha_and_transparent_palettes_are_upscaled_not_dropped(pipe):
    alpha = PIL.Image.fromarray((np.arange(8)[None].repeat(8, 0) > 3).astype(np.uint8) * 255)
    picture = random_picture(8, 8)
    picture.putalpha(alpha)
    out = pipe(picture, num_inference_steps=1).images[0]
    expected = alpha.resize((32, 32), PIL.Image.BICUBIC)
    assert np.abs(np.asarray(out.getchannel("A")).astype(int) - np.asarray(expected)).max() <= 1
    palette = random_picture(8, 8, "P")
    palette.info["transparency"] = 0
    assert pipe(palette, num_inference_steps=1).images[0].mode == "RGBA"


def test_sixteen_bits_stay_sixteen_bits(pipe):
    ramp = np.linspace(20000, 20200, 64).astype(np.uint16).reshape(8, 8)  # less than one step of 8 bits
    out = np.asarray(pipe(PIL.Image.fromarray(ramp), num_inference_steps=1, fidelity=1.0).images[0])
    assert out.dtype == np.uint16
    assert len(np.unique(out)) > 64


def test_profiles_and_exif_are_carried(pipe):
    picture = random_picture(4, 4)
    picture.info.update(icc_profile=b"profile", exif=b"Exif\x00\x00", comment=b"not carried")
    info = pipe(picture, num_inference_steps=1).images[0].info
    assert info == {"icc_profile": b"profile", "exif": b"Exif\x00\x00"}


def test_one_picture_in_any_form_gives_one_answer(pipe):
    picture = random_picture(10, 7)
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [picture, array, array[None], array / 255.0, (array.astype(np.uint16) * 257), tensor, tensor[None],
             tensor / 255.0, [picture], [tensor / 255.0]]  # fmt: skip
    outs = [pipe(form, generator=seeded(), output_type="pt").images for form in forms]
    for out in outs:
        assert out.shape == (1, 3, 28, 40)
        torch.testing.assert_close(out, outs[0], atol=1e-5, rtol=0)
    out = pipe(picture, generator=seeded(), output_type="np").images
    np.testing.assert_allclose(out, outs[0].permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pil = np.asarray(pipe(picture, generator=seeded()).images[0]) / 255
    assert np.abs(pil - out[0]).max() <= 0.5 / 255 + 1e-6


def test_a_list_is_its_pictures_one_by_one(pipe):
    same, mixed = [random_picture(6, 5, seed=i) for i in range(3)], [random_picture(6 + i, 5) for i in range(3)]
    for pictures in (same, mixed):
        together = pipe(pictures, generator=[seeded(i) for i in range(3)]).images
        alone = [pipe(p, generator=seeded(i)).images[0] for i, p in enumerate(pictures)]
        for a, b in zip(together, alone):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b)).max() <= 1
    assert [image.shape for image in pipe(mixed, output_type="pt").images] == [(3, 20, 24 + 4 * i) for i in range(3)]


def test_several_outputs_per_picture_differ_by_their_noise(pipe):
    pictures = [random_picture(6, 5, seed=i) for i in range(2)]
    images = pipe(pictures, num_images_per_prompt=2, generator=seeded(), output_type="pt").images
    assert images.shape == (4, 3, 20, 24)
    assert not torch.equal(images[0], images[1])
    nearer_first = (images[0] - images[1]).abs().mean() < (images[0] - images[2]).abs().mean()
    assert nearer_first


def test_seed_decides():
    pipe, picture = make_pipeline(), random_picture(6, 5)
    first, again, other = (pipe(picture, generator=seeded(s), output_type="pt").images for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("config", [{}, {"norm": "layer"}, {"block_out_channels": (8, 8)}])
def test_tiled_equals_whole_for_local_networks(config):
    pipe, random = make_pipeline(**config), np.random.default_rng(0)
    for trial in range(6):
        width, height, tile = (int(random.integers(a, b)) for a, b in ((1, 70), (1, 70), (3, 40)))
        steps = int(random.integers(1, 5))
        picture = random_picture(width, height, seed=trial)
        whole, tiled = (
            pipe(picture, num_inference_steps=steps, generator=seeded(trial), tile=side).images[0]
            for side in (None, tile)
        )
        difference = np.abs(np.asarray(whole).astype(int) - np.asarray(tiled)).max()
        assert difference <= 1, (width, height, tile, steps, difference)


def test_tiles_bound_what_the_network_sees(pipe):
    seen = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-2:]))
    pipe(random_picture(100, 80), num_inference_steps=1, tile=16)
    handle.remove()
    halo = -(-pipe.unet.receptive_field // 4)
    assert len(seen) == 7 * 5
    assert max(max(shape) for shape in seen) <= 16 + 2 * halo


def test_tiles_of_global_networks_blend_without_seams():
    pipe = make_pipeline(norm="group")
    picture = smooth_picture(60, 50)
    whole, tiled = (
        pipe(picture, fidelity=1.0, generator=seeded(), tile=t, output_type="pt").images for t in (None, 20)
    )
    assert tiled.shape == whole.shape
    assert torch.isfinite(tiled).all()
    # No jump at tile borders: neighbours differ in the blended picture no more than in the whole one.
    jump = lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((0, 1, 2))  # noqa: E731
    assert jump(tiled).max() < 1.5 * jump(whole).max()


def test_fidelity_one_is_one_evaluation_from_the_source(pipe):
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    faithful = pipe(random_picture(6, 5), 8, fidelity=1.0, generator=seeded(), output_type="pt").images
    single = pipe(random_picture(6, 5), 1, generator=seeded(), output_type="pt").images
    handle.remove()
    assert len(calls) == 2
    assert torch.equal(faithful, single)


def test_the_dial_is_continuous_and_follows_the_flow_to_its_sigma(pipe):
    picture = random_picture(6, 5)
    values = [0.0, 0.25, 0.26, 0.5, 0.51, 0.75, 0.76, 1.0]
    outs = [pipe(picture, 4, fidelity=f, generator=seeded(), output_type="latent").images for f in values]
    assert torch.equal(outs[0], outs[1])  # 1 / 4: the last of four equal steps
    full = (outs[0] - outs[-1]).abs().max()
    for i in (1, 3, 5):
        assert (outs[i] - outs[i + 1]).abs().max() < 0.1 * full
    pipe(picture, 4, fidelity=0.4)
    np.testing.assert_allclose(pipe.scheduler.sigmas, [1.0, 0.8, 0.6, 0.4, 0.0], atol=1e-6)


def test_consistency_exact_agrees_with_the_input(pipe):
    picture = smooth_picture(20, 16).point(lambda level: 64 + level // 2)  # the answer lies within the range
    lr = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    error = {}
    for kind in (None, "soft", "exact"):
        out = pipe(picture, consistency=kind, generator=seeded(), output_type="pt").images * 2 - 1
        error[kind] = float((downscale(out, 4) - lr).abs().max())
    assert error["exact"] < 1e-3 < error["soft"] < error[None]


def test_latents_are_the_initial_state(pipe):
    picture = random_picture(6, 5)
    lr = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    lr_up = F.interpolate(lr, scale_factor=4.0, mode="bicubic", antialias=True)
    source = pipe.scheduler.sample_source(lr_up, generator=seeded())
    given = pipe(picture, latents=source, output_type="pt").images
    torch.testing.assert_close(given, pipe(picture, generator=seeded(), output_type="pt").images, atol=1e-5, rtol=0)


def test_callbacks_see_change_and_stop_the_flow(pipe):
    steps = []

    def watch(pipeline, step, timestep, tensors):
        steps.append((step, float(timestep), tensors["latents"].shape))
        if step == 1:
            pipeline._interrupt = True
        return {"latents": tensors["latents"] * 0}

    out = pipe(random_picture(6, 5), 4, callback_on_step_end=watch, output_type="latent").images
    assert steps == [(0, 1000.0, (1, 3, 20, 24)), (1, 750.0, (1, 3, 20, 24))]
    assert not out.any()


def test_guidance_extrapolates_from_the_dropped_condition():
    pipe = make_pipeline(condition_dropout=0.1)
    outs = [
        pipe(random_picture(6, 5), 1, guidance_scale=g, generator=seeded(), output_type="latent").images
        for g in (0.0, 1.0, 2.0)
    ]
    torch.testing.assert_close(outs[2] - outs[1], outs[1] - outs[0], atol=1e-5, rtol=0)
    assert (outs[1] - outs[0]).abs().max() > 1e-3


def test_save_and_load_round_trip(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = FlowMatchSRPipeline.from_pretrained(tmp_path, disable_mmap=True)
    picture = random_picture(6, 5)
    outs = [p(picture, generator=seeded(), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*outs)
    assert type(loaded.unet).__module__ == "flowsr.models.unet_sr"
    assert str(tmp_path) not in (tmp_path / "model_index.json").read_text()
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model_index.json").read_text() == (tmp_path / "model_index.json").read_text()


def test_a_saved_folder_loads_where_flowsr_is_not_installed(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "folder")
    expected = pipe(torch.full((3, 4, 5), 0.5), generator=seeded(), output_type="pt").images
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True, disable_mmap=True)
out = pipe(torch.full((3, 4, 5), 0.5), generator=torch.Generator().manual_seed(0), output_type="pt").images
assert torch.equal(out, torch.load("expected.pt")), "another result"
pipe.save_pretrained("again")
print("loaded without flowsr")
"""
    assert "loaded without flowsr" in run_without_flowsr(script, tmp_path)


def test_another_scheduler_can_be_made_from_the_config(pipe):
    scheduler = FlowMatchSREulerScheduler.from_config(pipe.scheduler.config, evaluate_at="middle")
    swapped = FlowMatchSRPipeline(pipe.unet, scheduler)
    swapped.set_progress_bar_config(disable=True)
    assert swapped(random_picture(6, 5)).images[0].size == (24, 20)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_pictures_are_refused_with_the_way_out(pipe, name):
    image, message = BAD_IMAGES[name]
    with pytest.raises(ValueError, match=message):
        pipe(image)


@pytest.mark.parametrize(
    "image", ["picture.png", None, np.zeros((4, 4, 3), np.int64), torch.zeros(3, 4, 4, dtype=int)]
)
def test_pictures_of_other_types_are_refused(pipe, image):
    with pytest.raises(TypeError, match="must be"):
        pipe(image)


MORE_BAD_ARGUMENTS = [  # more than one for a name
    ("num_inference_steps", True, "whole number from 1, got True"),
    ("num_inference_steps", 2.5, "whole number from 1, got 2.5"),
    ("fidelity", None, r"\[0, 1\].*got None"),
    ("guidance_scale", float("nan"), "finite number, got nan"),
    ("generator", 0, r"torch.Generator.*got 0; a seed becomes one by `torch.Generator\(\).manual_seed"),
    ("generator", [0], "torch.Generator"),
    ("latents", torch.full((1, 3, 20, 24), torch.nan), "NaN"),
    ("rtol", 0, "`rtol` must be a positive number.*got 0"),
    ("atol", -1, "`atol` must be a positive number.*got -1"),
    ("tile", True, "whole number from 1, got True"),
    ("num_images_per_prompt", 1.5, "whole number from 1, got 1.5"),
]


@pytest.mark.parametrize(("name", "value", "message"), MORE_BAD_ARGUMENTS)
def test_what_looks_like_an_argument_but_is_none_is_refused(pipe, name, value, message):
    handle = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(random_picture(6, 5), **{name: value})
    handle.remove()
    assert len(pipe(random_picture(6, 5), np.int64(2)).images) == 1


def test_a_callback_that_returns_nothing_is_named(pipe):
    with pytest.raises(ValueError, match="`callback_on_step_end` must return a dict.* got None"):
        pipe(random_picture(6, 5), callback_on_step_end=lambda *_: None)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "dopri5"])
def test_nan_is_refused_and_not_painted_black(pipe, solver):
    pipe.unet.conv_out.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="answer.* NaN"):
        pipe(random_picture(6, 5), solver=solver)


def test_the_command_line_fails_where_the_weights_are_broken(pipe, tmp_path, capsys):
    pipe.unet.conv_out.bias.data.fill_(torch.nan)
    pipe.save_pretrained(tmp_path / "folder")
    random_picture(6, 5).save(tmp_path / "a.png")
    arguments = ["upscale", tmp_path / "a.png", "-o", tmp_path / "out", "--checkpoint", tmp_path / "folder"]
    assert main([str(argument) for argument in arguments]) == 1
    assert "NaN" in capsys.readouterr().err
    assert not (tmp_path / "out/a.png").exists()


def test_batches_are_of_neighbours_of_one_size_and_of_bounded_memory(pipe, monkeypatch):
    sizes, pictures = [(6, 5), (6, 5), (7, 5), (6, 5), (6, 5), (6, 5)], []
    for number, size in enumerate(sizes):
        pictures.append(random_picture(*size, seed=number))
    seen = []
    handle = pipe.unet.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    together = pipe(pictures, 1, generator=seeded(), output_type="pt").images
    assert seen == [2, 1, 3]  # one of another size is alone, and no other is
    monkeypatch.setattr(image_processor, "BATCH_PIXELS", 2 * 6 * 5 + 1)
    bounded = pipe(pictures, 1, generator=seeded(), output_type="pt").images
    assert seen[3:] == [2, 1, 2, 1]
    pipe(np.stack([np.asarray(picture) for picture in pictures[3:]]), 1)  # in one array too
    assert seen[7:] == [2, 1]
    pipe(pictures[:2], 1, num_images_per_prompt=2)
    assert seen[9:] == [2, 2]
    handle.remove()
    shared = seeded()  # one generator gives each its noise in turn, whatever the batches
    for number, picture in enumerate(pictures):
        alone = pipe(picture, 1, generator=shared, output_type="pt").images[0]
        torch.testing.assert_close(together[number], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(bounded[number], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_any_work(pipe, name):
    value, message = BAD_ARGUMENTS[name]
    handle = pipe.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        pipe(random_picture(6, 5), **{name: value})
    handle.remove()
    with pytest.raises(ValueError, match="not both"):
        pipe(random_picture(6, 5), sigmas=[1.0], fidelity=0.5)


def test_float16_on_a_cpu_is_refused(pipe):
    with pytest.raises(ValueError, match="bfloat16"):
        pipe.to(torch.float16)(random_picture(4, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_a_gpu_agrees_with_the_cpu(dtype):
    picture = random_picture(32, 24)
    expected = np.asarray(make_pipeline()(picture, generator=seeded()).images[0]).astype(int)
    pipe = make_pipeline().to("cuda", dtype)
    out = np.asarray(pipe(picture, generator=seeded()).images[0]).astype(int)
    assert np.abs(out - expected).mean() < 1
