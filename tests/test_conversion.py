"""Original checkpoints: the same numbers here, and no surprises from files that are something else."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from conftest import make_pipeline, make_unet
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from original_checkpoints import write_original
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model

from flowsr import (
    ContextUNetSRModel,
    DDPMSRPipeline,
    FlowMatchPipeline,
    FlowMatchSREulerScheduler,
    FlowMatchSRPipeline,
)
from flowsr.conversion import ConversionError, convert, write_single_file
from flowsr.models.unet_sr_context import ContextAttention
from flowsr.originals import diffusion_name, reverse_time

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT.parent / "shared/fixtures"
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="no original checkpoints beside this checkout")


def run(*arguments) -> int:
    sys.path.insert(0, str(ROOT))
    import convert_checkpoint

    return convert_checkpoint.main([str(a) for a in arguments])


@needs_fixtures
def test_the_flow_matching_project_keeps_its_numbers(tmp_path):
    assert run(FIXTURES / "flow_matching_step_10.pt", tmp_path / "out") == 0
    pipe = FlowMatchSRPipeline.from_pretrained(tmp_path / "out", disable_mmap=True)
    pipe.set_progress_bar_config(disable=True)
    expected = load_file(FIXTURES / "flow_matching_expected.safetensors")
    with torch.no_grad():
        velocity = -pipe.unet(expected["noise"], (1 - expected["t"]) * 1000, expected["lr"]).sample
    error = (velocity - expected["velocity"]).abs().max() / expected["velocity"].abs().max()
    assert error < 1e-5
    sr = pipe(image=expected["lr"], latents=expected["noise"], num_inference_steps=4, output_type="pt").images
    assert (sr - expected["sr_4_euler_midpoint_steps"]).abs().max() < 1e-4


@needs_fixtures
def test_the_ddpm_project_keeps_its_numbers(tmp_path):
    assert run(FIXTURES / "diffusion_model_v_prediction_best.pth", tmp_path / "out") == 0
    pipe = DDPMSRPipeline.from_pretrained(tmp_path / "out", disable_mmap=True)
    pipe.set_progress_bar_config(disable=True)
    expected = load_file(FIXTURES / "diffusion_v_prediction_expected.safetensors")
    with torch.no_grad():
        output = pipe.unet(expected["noise"], expected["timestep"], expected["lr"]).sample
    error = (output - expected["model_output"]).abs().max() / expected["model_output"].abs().max()
    assert error < 1e-5
    assert pipe.config.bicubic_coefficient == -0.75  # the original upsamples with the cubic of OpenCV and torch
    image, noise = (expected["lr"] + 1) / 2, expected["noise"]
    residual = pipe(image=image, latents=noise, num_inference_steps=10, output_type="latent").images
    assert (residual - expected["residual_10_ddim_steps"]).abs().max() < 1e-4


@needs_fixtures
def test_ddpm_states_of_every_kind(tmp_path):
    path = FIXTURES / "diffusion_model_v_prediction_best.pth"
    state = torch.load(path, weights_only=True)["model_state_dict"]
    expected = convert(path).unet.conv_in.weight
    other = {name: value + 1 for name, value in state.items()}
    kinds = {"bare_best.pth": state, "parallel_best.pth": {f"module.{k}": v for k, v in state.items()},
             "both.pth": {"epoch": 1, "ema_state": state, "model_state": other}}  # fmt: skip
    for name, content in kinds.items():
        torch.save(content, tmp_path / name)
        assert torch.equal(convert(tmp_path / name).unet.conv_in.weight, expected)
    assert torch.equal(convert(tmp_path / "both.pth", ema=False).unet.conv_in.weight, expected + 1)
    torch.save(state, tmp_path / "model_noise_best.pth")
    assert convert(tmp_path / "model_noise_best.pth").scheduler.config.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("widths", "blocks", "context_dim"),
    [((16, 32, 64), 2, None), ((16,), 1, None), ((8, 16), 3, None), ((8, 16), 1, 40)],
)
def test_ddpm_sizes_are_read_off_the_shapes(tmp_path, widths, blocks, context_dim):
    unet = write_original(tmp_path, widths, blocks, context_dim)
    converted = convert(tmp_path / "x_best.pth").unet
    assert converted.config.block_out_channels == widths
    assert converted.config.context_dim == context_dim
    for name, value in unet.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value)


def test_attention_to_a_context_of_another_width_is_that_of_torch():
    original = torch.nn.MultiheadAttention(16, 4, kdim=40, vdim=40, batch_first=True)  # as the DDPM project has it
    torch.nn.init.normal_(original.in_proj_bias)
    ours, renamed = ContextAttention(16, 4, context_dim=40), {}
    for key, value in original.state_dict().items():
        name = diffusion_name(f"bottleneck.1.cross_attn.{key}", 1, 1).removeprefix("transformer_blocks.1.attn2.")
        if name == "in_proj_bias":
            renamed |= {f"to_{letter}.bias": part for letter, part in zip("qkv", value.chunk(3))}
        else:
            renamed[name] = value
    ours.load_state_dict(renamed)
    tokens, context = torch.randn(2, 5, 16), torch.randn(2, 7, 40)
    torch.testing.assert_close(ours(tokens, context), original(tokens, context, context)[0])


def test_the_prediction_type_can_be_given(tmp_path, capsys):
    write_original(tmp_path, (16,), 1)  # x_best.pth, whose name says nothing
    for given, found in (("epsilon", "epsilon"), ("v_prediction", "v_prediction"), (None, "v_prediction")):
        out = tmp_path / str(given)
        assert run(tmp_path / "x_best.pth", out, *(["--prediction_type", given] if given else [])) == 0
        assert f"x4, {found}, in" in capsys.readouterr().out
        assert DDPMSRPipeline.from_pretrained(out).scheduler.config.prediction_type == found
    assert run(tmp_path / "epsilon", tmp_path / "again", "--prediction_type", "v_prediction") == 1
    assert "tells itself what its network predicts" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_the_width_of_the_context_has_one_owner():
    with pytest.raises(ValueError, match="`context_dim=12` is the width of tokens that the network makes"):
        ContextUNetSRModel(block_out_channels=(8,), context_dim=12, cross_attention_dim=12)


@needs_fixtures
def test_averaged_and_raw_weights_and_bare_states(tmp_path):
    checkpoint = torch.load(FIXTURES / "flow_matching_step_10.pt", weights_only=True)
    path = FIXTURES / "flow_matching_step_10.pt"
    averaged, raw = convert(path), convert(path, ema=False)
    assert not torch.equal(averaged.unet.conv_in.weight, raw.unet.conv_in.weight)
    save_file(checkpoint["model"], tmp_path / "bare.safetensors")
    torch.save({f"module.{k}": v for k, v in checkpoint["model"].items()}, tmp_path / "parallel.pt")
    for name in ("bare.safetensors", "parallel.pt"):
        assert torch.equal(convert(tmp_path / name).unet.conv_in.weight, raw.unet.conv_in.weight)
    damaged = dict(checkpoint["model"])
    damaged.pop("mid1.conv1.bias")
    torch.save(damaged, tmp_path / "damaged.pt")
    with pytest.raises(ConversionError, match="mid_stage.resnets.0.conv1.bias"):
        convert(tmp_path / "damaged.pt")


@pytest.mark.parametrize(("width", "levels", "blocks"), [(8, 2, 1), (16, 4, 3)])
def test_sizes_are_read_off_the_shapes(tmp_path, width, levels, blocks):
    state, time = {}, 32
    widths = [width * 2**level for level in range(levels)]

    def weight(name, *shape, bias=True):
        state[f"{name}.weight"] = torch.randn(*shape)
        if bias:
            state[f"{name}.bias"] = torch.randn(shape[0])

    def block(name, i, o):
        weight(f"{name}.norm1", i)
        weight(f"{name}.conv1", o, i, 3, 3)
        weight(f"{name}.time_to_film.1", 2 * o, time)
        weight(f"{name}.norm2", o)
        weight(f"{name}.conv2", o, o, 3, 3)
        if i != o:
            weight(f"{name}.shortcut", o, i, 1, 1)

    weight("time_mlp.net.0", time, time)
    weight("time_mlp.net.2", time, time)
    weight("in_conv", width, 6, 3, 3)
    for level, w in enumerate(widths):
        for n in range(blocks):
            block(f"down_blocks.{2 * level}.{n}", widths[max(level - 1, 0)] if n == 0 else w, w)
        if level < levels - 1:
            weight(f"down_blocks.{2 * level + 1}", w, w, 3, 3)
    last = widths[-1]
    block("mid1", last, last)
    weight("mid_attn.norm", last)
    weight("mid_attn.qkv", 3 * last, last, 1, 1)
    weight("mid_attn.proj", last, last, 1, 1)
    block("mid2", last, last)
    for k, level in enumerate(reversed(range(levels))):
        w, above = widths[level], widths[min(level + 1, levels - 1)]
        for n in range(blocks):
            block(f"up_blocks.{3 * k}.{n}", above + w if n == 0 else w, w)
        if level:
            weight(f"up_blocks.{3 * k + 2}", w, w, 3, 3)
    weight("out_norm", width)
    weight("out_conv", 3, width, 3, 3)
    torch.save({"step": 1, "model": state, "ema": state}, tmp_path / "step_1.pt")
    unet = convert(tmp_path / "step_1.pt").unet
    assert unet.config.block_out_channels == tuple(widths)
    assert unet.config.layers_per_block == blocks
    assert unet.num_parameters() == sum(v.numel() for v in state.values())


def test_time_is_reversed_exactly():
    half = 16
    f = torch.exp(-4 * torch.arange(half, dtype=torch.float64) / (half - 1))
    weight = torch.randn(5, 2 * half, dtype=torch.float64)
    t = torch.linspace(0, 1, 7, dtype=torch.float64)[:, None]
    embed = lambda time: torch.cat([(time * f).sin(), (time * f).cos()], dim=1)  # noqa: E731
    torch.testing.assert_close(embed(1 - t) @ reverse_time(weight).T, embed(t) @ weight.T)


def test_a_malicious_pickle_executes_nothing(tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    with open(tmp_path / "step_1.pt", "wb") as file:
        pickle.dump({"model": Malicious()}, file)
    assert run(tmp_path / "step_1.pt", tmp_path / "out") == 1
    assert "is refused" in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_files_that_are_something_else_are_named(tmp_path, capsys):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {"step": 3}, "ema": {"step": 3}}, tmp_path / "empty.pt")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "noema.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    messages = {
        "other.pt": "layer.weight",
        "list.pt": "holds a list",
        "empty.pt": "No weights",
        "noema.pt": "--weights",
        "broken.safetensors": "cannot be read",
        "absent.pt": "There is no file",
    }
    for name, message in messages.items():
        assert run(tmp_path / name, tmp_path / "out") == 1
        assert message in capsys.readouterr().err, name
    assert run(tmp_path / "other.pt", tmp_path / "full") == 1
    assert "not empty" in capsys.readouterr().err


def make_one_of(kind: str):
    """A pipeline of each class, with settings that are not the defaults."""
    if kind == "flow matching":
        return make_pipeline({"evaluate_at": "middle"}, scale_factor=2, patch_size=2).to(torch.bfloat16)
    if kind == "generator":
        unet = make_unet(
            in_channels=1, out_channels=1, lr_channels=None, scale_factor=1, patch_size=1, precondition=False
        )
        scheduler = FlowMatchSREulerScheduler(source="noise", source_noise_std=1.0, prediction_type="velocity")
        return FlowMatchPipeline(unet, scheduler, sample_size=[8, 12], data_range=[0.0, 1.0])
    unet = {"block_out_channels": (8,), "layers_per_block": 1, "time_embedding_dim": 8}
    if kind == "diffusion":
        return DDPMSRPipeline(ContextUNetSRModel(**unet, context_channels=8), DDIMScheduler(), target="image")
    encoder = Dinov2Model(
        Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    )
    half = [0.5, 0.5, 0.5]
    network = ContextUNetSRModel(**unet, cross_attention_dim=12)
    return DDPMSRPipeline(network, DDIMScheduler(), image_encoder=encoder, image_mean=half, image_std=half)


def test_every_weight_of_an_encoder_is_accounted_for(tmp_path, capsys):
    path = tmp_path / "one.safetensors"
    write_single_file(make_one_of("diffusion with an encoder"), path)
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    weights = load_file(path)
    key = "image_encoder.layernorm.weight"
    for tensors in ({**weights, f"{key}s": weights[key] + 1}, {k: v for k, v in weights.items() if k != key}):
        save_file(tensors, path, metadata=texts)
        assert run(path, tmp_path / "out") == 1
        assert "layernorm.weight" in capsys.readouterr().err.split("do not fit the Dinov2Model")[1]


@pytest.mark.parametrize("kind", ["flow matching", "generator", "diffusion", "diffusion with an encoder"])
def test_folder_to_single_file_and_back_bit_for_bit(kind, tmp_path):
    pipe, folder, again = make_one_of(kind), tmp_path / "folder", tmp_path / "again"
    pipe.save_pretrained(folder)
    assert run(folder, tmp_path / "one.safetensors") == 0
    assert run(tmp_path / "one.safetensors", again) == 0
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == sorted(str(file.relative_to(again)) for file in again.rglob("*") if file.is_file())
    single = load_file(tmp_path / "one.safetensors")
    for name in files:
        if name.endswith(".safetensors"):
            first, second = load_file(folder / name), load_file(again / name)
            assert first.keys() == second.keys()
            for key, value in first.items():
                packed = single.pop(f"{Path(name).parent}.{key}")
                for other in (second[key], packed):
                    assert value.dtype == other.dtype
                    assert torch.equal(value, other)
        elif name.endswith(".json"):
            assert json.loads((folder / name).read_text()) == json.loads((again / name).read_text())
        else:
            assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert not single
    assert type(type(pipe).from_pretrained(again)) is type(pipe)


def test_single_files_that_do_not_fit_are_named(tmp_path, capsys):
    pipe, path = make_one_of("diffusion"), tmp_path / "one.safetensors"
    pipe.save_pretrained(tmp_path / "folder")
    assert run(tmp_path / "folder", path) == 0
    with safe_open(path, "pt") as file:
        texts = file.metadata()
    weights = load_file(path)
    index = texts["model_index.json"]
    strange = index.replace("DDIMScheduler", "Popen"), index.replace("DDPMSRPipeline", "DDIMPipeline")
    without = {key: value for key, value in weights.items() if key != "unet.conv_in.bias"}
    cases = {
        "conv_in.bias": (without, texts),
        "unet.more": ({**weights, "unet.more": torch.zeros(1)}, texts),
        "belongs to none of": ({**weights, "vae.more": torch.zeros(1)}, texts),
        "has no weights": ({**weights, "scheduler.more": torch.zeros(1)}, texts),
        "has a class 'Popen'": (weights, {**texts, "model_index.json": strange[0]}),
        "has a class 'DDIMPipeline'": (
            weights,
            {**texts, "model_index.json": strange[1]},
        ),
        "one config": (weights, {key: text for key, text in texts.items() if not key.startswith("unet/")}),
    }
    capsys.readouterr()
    for message, (tensors, metadata) in cases.items():
        save_file(tensors, path, metadata=metadata)
        assert run(path, tmp_path / "out") == 1
        assert message.removeprefix("unet.") in capsys.readouterr().err
    assert run(tmp_path / "folder", path) == 1
    assert "exists and is not empty" in capsys.readouterr().err
    shutil.copy(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors", tmp_path / "folder/unet/x.safetensors")
    assert run(tmp_path / "folder", tmp_path / "other.safetensors") == 1
    assert "more than once" in capsys.readouterr().err


def test_a_training_checkpoint_is_the_pipeline_that_the_run_leaves(photo_folder, tmp_path, capsys):
    out = tmp_path / "run"
    call = [
        sys.executable, str(ROOT / "train_sr.py"), "--config", "configs/tiny.yaml", "--train_data_dir", photo_folder,
        "--output_dir", out, "--max_train_steps", "2", "--num_validation_images", "0", "--learning_rate", "0.01",
        "--lr_warmup_steps", "0",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run(out / "checkpoint-2", tmp_path / "averaged") == 0
    assert run(out / "checkpoint-2", tmp_path / "raw", "--weights", "model") == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    left, averaged, raw = (load_file(folder / weights) for folder in (out, tmp_path / "averaged", tmp_path / "raw"))
    trained = load_file(out / "checkpoint-2/model.safetensors")
    assert left.keys() == averaged.keys() == raw.keys() == trained.keys()
    assert all(torch.equal(left[key], averaged[key]) and torch.equal(trained[key], raw[key]) for key in left)
    assert not torch.equal(left["conv_out.weight"], raw["conv_out.weight"])
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((tmp_path / "averaged" / name).read_text())
    capsys.readouterr()
    (out / "checkpoint-2/custom_checkpoint_0.pkl").unlink()
    assert run(out / "checkpoint-2", tmp_path / "none") == 1
    assert "no averaged weights" in capsys.readouterr().err
    assert run(out / "checkpoint-2/..", tmp_path / "whole") == 0  # the run's folder is a pipeline folder
    assert run(photo_folder, tmp_path / "none") == 1
    assert "neither a pipeline folder" in capsys.readouterr().err


def test_training_checkpoints_of_every_pipeline(tmp_path, capsys):
    unet = {"_class_name": "ContextUNetSRModel", "block_out_channels": [8], "layers_per_block": 1}
    settings = {
        "pipeline": {"_class_name": "DDPMSRPipeline", "target": "image"}, "unet": unet,
        "scheduler": {"prediction_type": "sample"},
    }  # fmt: skip
    network = ContextUNetSRModel(**{key: value for key, value in unet.items() if key != "_class_name"})
    averages = EMAModel(network.parameters(), decay=0.5)
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(network)
    accelerator.register_for_checkpointing(averages)
    for parameter in network.parameters():
        torch.nn.init.ones_(parameter)
    accelerator.save_state(tmp_path / "checkpoint-1")
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(settings))
    averaged, raw = (convert(tmp_path / "checkpoint-1", ema=ema) for ema in (True, False))
    for pipe in (averaged, raw):
        assert type(pipe) is DDPMSRPipeline
        assert pipe.config.target == "image"
        assert pipe.scheduler.config.prediction_type == "sample"
    assert all(torch.equal(a, b) for a, b in zip(raw.unet.parameters(), prepared.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(averaged.unet.parameters(), averages.shadow_params))

    raw.save_pretrained(tmp_path / "start")  # fine-tuning takes the configs from there
    (tmp_path / "settings.yaml").write_text(
        yaml.safe_dump({"unet": {}, "pretrained_model_name_or_path": str(tmp_path / "start")})
    )
    tuned = convert(tmp_path / "checkpoint-1")
    assert type(tuned) is DDPMSRPipeline
    assert tuned.config.target == "image"
    assert torch.equal(tuned.unet.conv_in.weight, averaged.unet.conv_in.weight)

    (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**settings, "lora_rank": 4}))
    assert run(tmp_path / "checkpoint-1", tmp_path / "out") == 1
    assert "holds adapters" in capsys.readouterr().err
