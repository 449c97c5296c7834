"""Original checkpoints: the same numbers here, and no surprises from files that are something else."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowsr import FlowMatchSRPipeline
from flowsr.conversion import ConversionError, convert, reverse_time

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
