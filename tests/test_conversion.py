"""Original checkpoints: the same numbers here, and no surprises from files that are something else."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowsr import ContextUNetSRModel, DDPMSRPipeline, FlowMatchSRPipeline
from flowsr.conversion import ConversionError, convert, diffusion_name, reverse_time

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


@pytest.mark.parametrize(("widths", "blocks"), [((16, 32, 64), 2), ((16,), 1), ((8, 16), 3)])
def test_ddpm_sizes_are_read_off_the_shapes(tmp_path, widths, blocks):
    # The names of the original, given to the weights of a random network here.
    unet = ContextUNetSRModel(
        block_out_channels=widths, layers_per_block=blocks, time_embedding_dim=16, context_channels=24
    )
    ours = unet.state_dict()
    levels, originals = len(widths), {}
    for key in ddpm_keys(levels, blocks, widths):
        name = diffusion_name(key, levels, blocks)
        if ".in_proj_" in name:
            attention, _, kind = name.partition(".in_proj_")
            originals[key] = torch.cat([ours.pop(f"{attention}.to_{letter}.{kind}") for letter in "qkv"])
        else:
            originals[key] = ours.pop(name)
    assert not ours
    torch.save(originals, tmp_path / "x_best.pth")
    converted = convert(tmp_path / "x_best.pth").unet
    assert converted.config.block_out_channels == widths
    for name, value in unet.state_dict().items():
        assert torch.equal(converted.state_dict()[name], value)


def ddpm_keys(levels: int, blocks: int, widths: tuple[int, ...]) -> list[str]:
    """The keys of the original network, as the fixture shows them."""
    weight_and_bias = lambda *names: [f"{n}.{kind}" for n in names for kind in ("weight", "bias")]  # noqa: E731

    def block(name, i, o):
        keys = [f"{name}.conv1.weight", f"{name}.conv2.weight"]
        keys += weight_and_bias(f"{name}.time_mlp.1", f"{name}.norm1", f"{name}.norm2")
        if i != o:
            shortcut = f"{name}.residual_connection"
            keys += [f"{shortcut}.0.weight", *weight_and_bias(f"{shortcut}.1")]
        return keys

    def transformer(name):
        keys = weight_and_bias(*(f"{name}.norm_{n}" for n in ("self_attn", "cross_attn", "ff")))
        for attention in ("self_attn", "cross_attn"):
            keys += [f"{name}.{attention}.in_proj_weight", f"{name}.{attention}.in_proj_bias"]
            keys += weight_and_bias(f"{name}.{attention}.out_proj")
        return keys + weight_and_bias(f"{name}.ff.0", f"{name}.ff.2")

    keys = weight_and_bias("time_mlp.0", "time_mlp.2", "init_conv", "final_norm", "final_conv")
    keys += ["context_extractor.conv_block1.0.weight", "context_extractor.conv_block2.0.weight"]
    keys += weight_and_bias(*(f"context_extractor.{n}" for n in ("conv_block1.1", "conv_block2.1", "projection")))
    for level, width in enumerate(widths):
        for n in range(blocks):
            keys += block(f"downs.{level}.{n}", widths[max(level - 1, 0)] if n == 0 else width, width)
            keys += block(f"ups.{levels - 1 - level}.{n}", 2 * width if n == 0 else width, width)
        if level < levels - 1:
            keys += weight_and_bias(f"downs.{level}.{blocks}")
        if level > 0:  # behind the transformer of the deepest level, and behind an upsampling without weights
            place = blocks + (level == levels - 1)
            keys += weight_and_bias(f"ups.{levels - 1 - level}.{place}.1")
    keys += transformer(f"downs.{levels - 1}.{blocks}") + transformer(f"ups.0.{blocks}") + transformer("bottleneck.1")
    return keys + block("bottleneck.0", widths[-1], widths[-1]) + block("bottleneck.2", widths[-1], widths[-1])


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
