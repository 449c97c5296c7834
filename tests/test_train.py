"""The training script as a user runs it; results are read back from disk."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import random_picture, smooth_picture
from diffusers import DDIMScheduler
from PIL import Image
from training import ALONE, DEEPSPEED, FSDP, ROOT, launch, launch_as_on_gpus, losses, records, tiny, weights

from flowsr import DDPMSRPipeline, FlowMatchPipeline, FlowMatchSRPipeline, UNetSRModel
from flowsr.components import pipeline_from
from flowsr.conversion import convert
from flowsr.training.settings import Settings, check_pipeline, parse_settings
from flowsr.training.strategies import fit_strategy

SMALL = {"block_out_channels": [8], "layers_per_block": 1, "mid_layers": 0, "time_embedding_dim": 8}


def test_a_run_learns_and_leaves_a_pipeline_with_its_record(photo_folder, tmp_path):
    out = tmp_path / "run"
    done = launch(1, *tiny(photo_folder, out, "--max_train_steps", 150, "--learning_rate", 0.004))
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.mean(losses(out)[-3:]) < 0.9 * np.mean(losses(out)[:2])
    validations = [r for r in records(out) if r.get("event") == "validation"]
    assert validations[-1]["step"] == 150
    assert validations[-1]["psnr_y_1"] > validations[0]["psnr_y_1"]
    assert {"psnr_y_1", "psnr_y_4", "ssim_y_1", "ssim_y_4"} <= validations[-1].keys()
    settings = yaml.safe_load((out / "settings.yaml").read_text())
    assert settings["max_train_steps"] == 150
    assert settings["resolution"] == 64
    assert [p.name for p in sorted(out.glob("checkpoint-*"))] == ["checkpoint-100", "checkpoint-150"]
    pipe = FlowMatchSRPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(smooth_picture(24, 20)).images[0].size == (96, 80)
    # Pictures: bicubic, two SR and HR beside each other; LR, source, SR and HR; the curves.
    for name in ("000150_bicubic_sr_hr", "000150_lr_source_sr_hr"):
        width, height = Image.open(out / f"validation/{name}.png").size
        assert width == 4 * height or width > 3 * height
    assert min(Image.open(out / "curves.png").size) >= 300
    # The best pipeline is that of the best validation.
    best = max(validations, key=lambda record: record["psnr_y_1"])
    kept, final = weights(out / "best"), weights(out)
    assert (best["step"] == 150) == all(torch.equal(kept[name], final[name]) for name in kept)


def test_two_processes_equal_one_with_twice_the_batch(photo_folder, tmp_path):
    schedule = ("--max_train_steps", 3, "--logging_steps", 1, "--num_validation_images", 3, "--lr_warmup_steps", 0)
    for name, processes, batch in (("one", 1, 4), ("two", 2, 2)):
        done = launch(processes, *tiny(photo_folder, tmp_path / name, *schedule, "--train_batch_size", batch))
        assert done.returncode == 0, done.stderr[-3000:]
    assert "4 crops of 64 per step" in done.stdout
    np.testing.assert_allclose(losses(tmp_path / "one"), losses(tmp_path / "two"), atol=2e-6)
    for name in ("one", "two"):  # which share the pictures of a validation
        (record,) = [record for record in records(tmp_path / name) if record.get("event") == "validation"]
        assert record["psnr_y_1"] == pytest.approx(records(tmp_path / "one")[-1]["psnr_y_1"], abs=2e-3)
        assert Image.open(tmp_path / name / "validation/000003_bicubic_sr_hr.png").size[1] == 3 * 96
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("how", [FSDP, DEEPSPEED], ids=["fsdp", "deepspeed"])
def test_weights_spread_over_two_processes_train_as_in_one_and_resume(how, photo_folder, tmp_path):
    schedule = ("--max_train_steps", 3, "--logging_steps", 1, "--validation_steps", 2, "--checkpointing_steps", 2)
    whole, spread = tmp_path / "whole", tmp_path / "spread"
    launch_as_on_gpus(how, *tiny(photo_folder, spread, *schedule, "--train_batch_size", 2))
    done = launch(1, *tiny(photo_folder, whole, *schedule, "--train_batch_size", 4))
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(spread), losses(whole), atol=2e-6)
    psnr = [[r["psnr_y_1"] for r in records(out) if r.get("event") == "validation"] for out in (spread, whole)]
    np.testing.assert_allclose(*psnr, atol=2e-3)
    first = weights(spread)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(first[name], weight, atol=2e-4, rtol=1e-3)
    # A checkpoint that both have written goes on to the bit, and becomes a pipeline.
    shutil.rmtree(spread / "checkpoint-3")
    resume = ("--resume_from_checkpoint", "latest")
    launch_as_on_gpus(how, *tiny(photo_folder, spread, *schedule, "--train_batch_size", 2, *resume))
    converted = convert(spread / "checkpoint-3").unet.state_dict()
    for name, weight in weights(spread).items():
        assert torch.equal(weight, first[name])
        assert torch.equal(weight, converted[name])


@pytest.mark.parametrize("how", [FSDP, DEEPSPEED], ids=["fsdp", "deepspeed"])
def test_spread_weights_of_sixteen_bits_leave_pictures_precise(how, photo_folder, tmp_path):
    few = ("--max_train_steps", 1, "--num_validation_images", 0, "--mixed_precision", "bf16")
    launch_as_on_gpus(how, *tiny(photo_folder, tmp_path / "spread", *few, "--train_batch_size", 2))
    done = launch(1, *tiny(photo_folder, tmp_path / "whole", *few, "--train_batch_size", 4))
    assert done.returncode == 0, done.stderr[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "spread"), losses(tmp_path / "whole"), atol=3e-6)


def test_fp16_scales_the_loss_and_waits_where_gradients_overflow(photo_folder, tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    schedule = ("--max_train_steps", 24, "--logging_steps", 1, "--checkpointing_steps", 20, "--lr_warmup_steps", 0)
    run = (*schedule, "--num_validation_images", 0, "--train_batch_size", 2, "--mixed_precision", "fp16")
    run = (*run, "--unet", json.dumps(SMALL), "--learning_rate", 0.002)  # whose gradients are small from the start
    launch_as_on_gpus(ALONE, *tiny(photo_folder, whole, *run))
    rates = [record["learning_rate"] for record in records(whole) if "loss" in record]
    waited = sum(rate == rates[0] for rate in rates)  # for the scale, 2^40 at first, to come down
    assert 8 <= waited < 20
    assert all(np.diff(rates[waited:]) < 0)
    assert max(losses(whole)) < 0.2
    # The scale is part of a checkpoint.
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("checkpoint-24", "unet"))
    launch_as_on_gpus(ALONE, *tiny(photo_folder, resumed, *run, "--resume_from_checkpoint", "latest"))
    assert losses(resumed)[-4:] == losses(whole)[-4:]
    again = weights(resumed)
    assert all(torch.equal(weight, again[name]) for name, weight in weights(whole).items())


def test_strategies_that_hide_weights_are_refused():
    def accelerator(strategy: str, version: int = 2, stage: int = 0) -> SimpleNamespace:
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={}) if stage else None
        state = SimpleNamespace(deepspeed_plugin=plugin)
        return SimpleNamespace(distributed_type=strategy, is_fsdp2=version == 2, state=state)

    with pytest.raises(ValueError, match="fsdp_version: 2"):
        fit_strategy(accelerator("FSDP", version=1), Settings())
    with pytest.raises(ValueError, match="`zero_stage` 1 or 2"):
        fit_strategy(accelerator("DEEPSPEED", stage=3), Settings())


def test_weights_and_biases_gets_curves_and_grids(photo_folder, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs Weights & Biases: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    done = launch(1, *tiny(photo_folder, tmp_path / "run", "--max_train_steps", 2, "--report_to", "wandb"))
    assert done.returncode == 0, done.stderr[-3000:]
    (grid,) = tmp_path.glob("wandb/offline-run-*/files/media/images/bicubic_sr_hr_*.png")
    uploaded, written = (
        np.asarray(Image.open(grid)),
        np.asarray(Image.open(tmp_path / "run/validation/000002_bicubic_sr_hr.png")),
    )
    np.testing.assert_array_equal(uploaded, written)
    assert "psnr_y_1" in done.stderr


def test_accumulation_equals_a_large_batch(train_script, photo_folder, tmp_path):
    schedule = ("--max_train_steps", 3, "--logging_steps", 1, "--num_validation_images", 0)
    for name, batch, accumulation in (("large", 8, 1), ("small", 2, 4)):
        sizes = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulation)
        done = train_script(*tiny(photo_folder, tmp_path / name, *schedule, *sizes))
        assert done.status == 0, done.output
    np.testing.assert_allclose(losses(tmp_path / "large"), losses(tmp_path / "small"), atol=2e-6)
    a, b = weights(tmp_path / "large"), weights(tmp_path / "small")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=1e-3)


def test_gradient_checkpointing_changes_nothing_but_memory(train_script, photo_folder, tmp_path):
    for name, more in (("plain", ()), ("checkpointed", ("--gradient_checkpointing", "true"))):
        schedule = ("--max_train_steps", 3, "--logging_steps", 1, "--num_validation_images", 0)
        assert train_script(*tiny(photo_folder, tmp_path / name, *schedule, *more)).status == 0
    np.testing.assert_allclose(losses(tmp_path / "plain"), losses(tmp_path / "checkpointed"), rtol=1e-5)


def test_bf16_and_fine_tuning(train_script, photo_folder, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_script(*tiny(photo_folder, first, "--max_train_steps", 20, "--mixed_precision", "bf16")).status == 0
    start = ("--pretrained_model_name_or_path", first, "--learning_rate", "1e-9", "--ema_decay", 0)
    assert train_script(*tiny(photo_folder, second, "--max_train_steps", 1, *start)).status == 0
    a, b = weights(first), weights(second)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=0)


def test_adapters_leave_the_network_alone_until_they_are_merged(train_script, photo_folder, tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed")
    first, second = tmp_path / "first", tmp_path / "second"
    assert train_script(*tiny(photo_folder, first, "--max_train_steps", 5)).status == 0
    adapt = ("--pretrained_model_name_or_path", first, "--lora_rank", 2, "--max_train_steps", 10)
    done = train_script(*tiny(photo_folder, second, *adapt, "--learning_rate", 0.05))
    assert done.status == 0, done.output
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys()
    change = {name: b[name] - a[name] for name in a if not torch.equal(a[name], b[name])}
    assert change
    for name, delta in change.items():
        assert torch.linalg.matrix_rank(delta.flatten(1).float(), atol=1e-4) <= 2, name
    trained = int(done.output.split(" parameters to train")[0].split()[-1].replace(",", ""))
    assert trained < 0.5 * sum(value.numel() for value in a.values())


def test_diffusion_of_residuals_with_its_scheduler_and_trackers(train_script, photo_folder, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    unet = {"_class_name": "ContextUNetSRModel", "block_out_channels": [32, 32], "layers_per_block": 1}
    for prediction in ("epsilon", "v_prediction", "sample"):
        out = tmp_path / prediction
        scheduler = {
            "_class_name": "DDIMScheduler",
            "prediction_type": prediction,
            "beta_schedule": "squaredcos_cap_v2",
        }
        done = train_script(
            *tiny(photo_folder, out, "--max_train_steps", 12, "--logging_steps", 3, "--resolution", 32),
            "--pipeline", json.dumps({"_class_name": "DDPMSRPipeline", "target": "residual"}),
            "--unet", json.dumps(unet), "--scheduler", json.dumps(scheduler),
            "--loss", "charbonnier", "--optimizer", "adamw_8bit", "--report_to", "tensorboard",
            "--validation_inference_steps", 2, "--validation_steps", 12,
        )  # fmt: skip
        assert done.status == 0, done.output
        assert losses(out)[-1] < losses(out)[0]
        pipe = DDPMSRPipeline.from_pretrained(out)
        assert type(pipe.scheduler).__name__ == "DDIMScheduler"
        assert pipe.scheduler.config.prediction_type == prediction
    tags = [EventAccumulator(str(events)).Reload().Tags() for events in (out / "flowsr").rglob("events*")]
    assert {"loss", "psnr_y_2"} <= {name for each in tags for name in each["scalars"]}
    assert "bicubic_sr_hr" in {name for each in tags for name in each["images"]}


def test_a_residual_is_diffused_in_units_of_its_std(train_script, photo_folder, tmp_path):
    unet = UNetSRModel(**SMALL, precondition=False)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)  # predicts 0, so that the loss is the mean square of what it is to be
    loss = {}
    for std in (1.0, 0.1):
        start, out = tmp_path / f"start{std}", tmp_path / f"run{std}"
        DDPMSRPipeline(unet, DDIMScheduler(prediction_type="sample"), residual_std=std).save_pretrained(start)
        few = ("--max_train_steps", 1, "--num_validation_images", 0, "--loss", "mse")
        done = train_script(*tiny(photo_folder, out, *few, "--pretrained_model_name_or_path", start))
        assert done.status == 0, done.output
        (loss[std],) = losses(out)
    assert loss[0.1] == pytest.approx(100 * loss[1.0], rel=1e-2)


def test_class_conditional_generation(train_script, tmp_path):
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for k in range(4):
            random_picture(16, 16, "L", seed=number).save(tmp_path / f"classes/{name}/{k}.png")
    out = tmp_path / "run"
    unet = {**SMALL, "in_channels": 1, "out_channels": 1, "lr_channels": None, "patch_size": 1, "precondition": False}
    unet |= {"num_class_embeds": 2, "condition_dropout": 0.2}
    done = train_script(
        *tiny(tmp_path / "classes", out, "--resolution", 16, "--augmentation", "none"),
        "--pipeline", '{"_class_name": "FlowMatchPipeline", "sample_size": [16, 16]}', "--unet", json.dumps(unet),
        "--scheduler", '{"source": "noise", "source_noise_std": 1.0, "prediction_type": "velocity"}',
        "--loss", "mse", "--timestep_law", "logit_normal", "--sigma_atom", 0, "--num_validation_images", 1,
        "--max_train_steps", 1000, "--num_train_epochs", 10.5, "--logging_steps", 2,
    )  # fmt: skip
    assert done.status == 0, done.output
    assert records(out)[-1]["step"] == int(np.ceil(10.5 * 7 / 4))  # epochs end it first
    pipe = FlowMatchPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(2, [0, 1], guidance_scale=2.0).images[0].size == (16, 16)
    (grid,) = (out / "validation").glob("*_samples.png")
    assert Image.open(grid).size == (128, 128)


def test_streams_other_paths_and_further_terms(train_script, photo_folder, tmp_path):
    for number in range(3):
        random_picture(32, 80).save(photo_folder / f"small{number}.png")
    out = tmp_path / "run"
    done = train_script(
        *tiny(photo_folder, out, "--streaming", "true", "--max_train_steps", 8, "--logging_steps", 2),
        "--unet", json.dumps({**SMALL, "precondition": False}), "--loss", "huber",
        "--colour_weight", 0.5,
        "--scheduler", '{"source": "lr", "path": "vp", "prediction_type": "velocity"}', "--degradation", "real_esrgan",
    )  # fmt: skip
    assert done.status == 0, done.output
    assert len(losses(out)) == 4
    assert all(np.isfinite(losses(out)))
    assert FlowMatchSRPipeline.from_pretrained(out).scheduler.config.path == "vp"


def test_a_flow_may_start_from_the_estimate_of_another_model(train_script, photo_folder, tmp_path):
    from transformers import Swin2SRConfig, Swin2SRForImageSuperResolution

    sizes = {"embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4, "image_size": 16, "mlp_ratio": 1.0}
    config = Swin2SRConfig(**sizes, upscale=4, upsampler="pixelshuffledirect")
    prior = Swin2SRForImageSuperResolution(config)
    prior.save_pretrained(tmp_path / "prior")
    arguments = (
        "--scheduler", '{"source": "prior", "source_noise_std": 0.1, "prediction_type": "velocity"}',
        "--unet", json.dumps({**SMALL, "precondition": False}), "--max_train_steps", 2, "--logging_steps", 1,
    )  # fmt: skip
    out = tmp_path / "run"
    pipeline = json.dumps({"prior": str(tmp_path / "prior")})
    done = train_script(*tiny(photo_folder, out, *arguments, "--pipeline", pipeline))
    assert done.status == 0, done.output
    pipe = FlowMatchSRPipeline.from_pretrained(out)
    kept = pipe.prior.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in prior.state_dict().items())
    done = train_script(*tiny(photo_folder, tmp_path / "refused", *arguments))
    assert done.status == 1
    assert "needs a `prior` in `pipeline`" in done.output


def test_a_diffusion_may_look_at_a_vision_encoder(train_script, photo_folder, tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=1)).save_pretrained(tmp_path / "encoder")
    unet = {"_class_name": "ContextUNetSRModel", "block_out_channels": [32, 32], "layers_per_block": 1}
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_size": 16}
    pipeline = {"_class_name": "DDPMSRPipeline", "image_encoder": str(tmp_path / "encoder"), **statistics}
    out = tmp_path / "run"
    done = train_script(
        *tiny(photo_folder, out, "--pipeline", json.dumps(pipeline), "--validation_inference_steps", 2),
        "--unet", json.dumps({**unet, "cross_attention_dim": 16, "concatenate_lr": True}), "--max_train_steps", 2,
        "--resolution", 32, "--logging_steps", 1,
    )  # fmt: skip
    assert done.status == 0, done.output
    assert type(DDPMSRPipeline.from_pretrained(out).image_encoder).__name__ == "Dinov2Model"


def test_small_pictures_are_refused_or_left_out_with_their_number(train_script, photo_folder, tmp_path):
    random_picture(32, 80).save(photo_folder / "little.png")
    done = train_script(*tiny(photo_folder, tmp_path / "run", "--max_train_steps", 1))
    assert done.status == 1
    assert "1 of 10 pictures are smaller than a crop of 64" in done.output
    assert "little.png (32x80)" in done.output
    done = train_script(*tiny(photo_folder, tmp_path / "run", "--max_train_steps", 1, "--small_images", "skip"))
    assert done.status == 0, done.output
    assert "1 pictures are smaller" in done.output


def test_one_batch_can_be_learned_by_heart(train_script, photo_folder, tmp_path):
    out = tmp_path / "run"
    rate = ("--learning_rate", 0.01, "--max_train_steps", 150, "--lr_warmup_steps", 0, "--sigma_atom", 1)
    done = train_script(*tiny(photo_folder, out, "--overfit", "true", *rate, "--num_validation_images", 0))
    assert done.status == 0, done.output
    assert losses(out)[-1] < 0.5 * losses(out)[0]


def test_condition_dropout_is_trained_and_recorded(train_script, photo_folder, tmp_path):
    unet = json.dumps({**SMALL, "condition_dropout": 0.5})
    run = tiny(photo_folder, tmp_path / "run", "--max_train_steps", 2, "--num_validation_images", 0, "--unet", unet)
    assert train_script(*run).status == 0
    assert UNetSRModel.from_pretrained(tmp_path / "run/unet").config.condition_dropout == 0.5


DIFFUSION = ["--pipeline", '{"_class_name": "DDPMSRPipeline"}', "--unet", '{"precondition": false}']


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resolution", "66"], "multiple of 4"),
        (["--resolution", "128"], "are smaller than a crop of 128"),
        (["--mixed_precision", "fp16"], "on a CPU use bf16"),
        (["--train_data_dir", "absent"], "there is no absent"),
        (["--loss", "l3"], "`loss` must be one of"),
        (["--max_train_steps", "0"], "must be positive"),
        (["--num_validation_images", "9"], "none is left to train on"),
        (["--train_batch_size", "9"], "there are only 8 pictures to train on"),
        (["--unet", '{"widths": [8]}'], "unknown settings ['widths']"),
        (["--unet", '{"_class_name": "VGG"}'], "has a class 'VGG'"),
        (["--unet", "{"], "`unet` is not JSON"),
        (
            ["--unet", "{}", "--scheduler", '{"path": "vp"}'],
            "hold for a flow with path='linear', got a scheduler with path='vp'",
        ),
        (["--unet", '{"precondition": false, "lr_channels": null}'], "its network needs `lr_channels`"),
        ([*DIFFUSION, "--scheduler", '{"_class_name": "FlowMatchSREulerScheduler"}'], "does not reverse a diffusion"),
        ([*DIFFUSION, "--colour_weight", "1"], "are for flows that upscale"),
        (["--perceptual_weight", "1"], "needs `lpips_weights`"),
        (["--resume_from_checkpoint", "absent"], "there is no folder absent"),
        (["--config", "absent.yaml"], "there is no file absent.yaml"),
        (["--dataset_name", "x/y"], "Give either"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(photo_folder, tmp_path, arguments, message, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(ROOT)
    import train_sr

    base = ["--train_data_dir", str(photo_folder), "--output_dir", str(tmp_path / "run")]
    config = [] if "--config" in arguments else ["--config", "configs/tiny.yaml"]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        train_sr.main([*config, *base, *arguments])
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unknown_keys_in_the_config_are_named(train_script, photo_folder, tmp_path):
    (tmp_path / "wrong.yaml").write_text("resolutoin: 64\n")
    done = train_script("--config", tmp_path / "wrong.yaml", "--train_data_dir", photo_folder)
    assert done.status == 1
    assert "unknown settings ['resolutoin']" in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_makes_its_pipeline(path):
    a_file = ["--lpips_weights", __file__]  # settings only look whether it is there
    settings = parse_settings(["--seed", "7", *a_file], path)
    assert settings.seed == 7
    made = settings
    if settings.train == "head":  # on the encoder of another run
        made = parse_settings([], path.with_name("x4_encoder.yaml"))
    pipe = pipeline_from(made.pipeline, made.unet, made.scheduler, made.pretrained_model_name_or_path)
    check_pipeline(settings, pipe)


def test_pictures_on_the_command_line_replace_those_of_the_config(tmp_path):
    (tmp_path / "folder.yaml").write_text("train_data_dir: [photos]\n")
    config = ROOT / "configs/seed_flow_x4.yaml"
    settings = parse_settings(["--train_data_dir", "a", "b"], config)
    assert (settings.train_data_dir, settings.dataset_name) == (["a", "b"], None)
    settings = parse_settings(["--config", str(tmp_path / "folder.yaml"), "--dataset_name=DIV2K"], config)
    assert (settings.train_data_dir, settings.dataset_name) == ([], "DIV2K")
    assert parse_settings([], config).dataset_name == "DIV2K"


# One short run of each system's config: its network made small, its objective, data and scheduler as they are.
SEEDS = {
    "seed_flow_x4": {"block_out_channels": [8, 8, 8]},
    "seed_mnist": {"block_out_channels": [8, 8]},
    "seed_celeba": {"block_out_channels": [8, 8, 8, 8]},
    "seed_couplings_cifar10": {"block_out_channels": [8, 8, 8]},
    "seed_ddpm_linear": {"block_out_channels": [8, 8, 8]},
    "seed_ddpm_context": {"block_out_channels": [8, 8, 8], "norm_num_groups": 4},
}


@pytest.mark.parametrize("name", SEEDS)
def test_every_seed_system_trains_from_its_config(name, train_script, photo_folder, tmp_path):
    config = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    out, unet = tmp_path / "run", {**config["unet"], **SEEDS[name]}
    config.pop("dataset_name", None)
    classes = unet.get("num_class_embeds")
    photos = tmp_path / "classes" if classes else photo_folder
    for number in range(classes or 0):
        (photos / f"class{number}").mkdir(parents=True)
        for k in range(2):
            random_picture(32, 32, seed=number).save(photos / f"class{number}/{k}.png")
    config |= {
        "unet": unet, "train_data_dir": [str(photos)], "output_dir": str(out), "max_train_steps": 2,
        "train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "num_validation_images": 1,
        "validation_inference_steps": [2], "resolution": min(config["resolution"], 64),
    }  # fmt: skip
    if name == "seed_celeba":  # one size for data and samples
        config |= {"resolution": 32, "resize_to": 32, "pipeline": {**config["pipeline"], "sample_size": [32, 32]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = train_script("--config", tmp_path / "config.yaml")
    assert done.status == 0, done.output
    assert len(losses(out)) == 2
    assert all(np.isfinite(losses(out)))
    assert Image.open(next((out / "validation").glob("*.png"))).size[0] >= 64


def test_the_first_try_shows_a_falling_loss(train_script, photo_folder, tmp_path):
    """Within the 100 steps of `configs/tiny.yaml`, on waves and on pieces of photos."""
    photos = tmp_path / "pieces"
    photos.mkdir()
    for name in ("budgie", "kitten"):
        with Image.open(ROOT / f"examples/{name}.png") as photo:
            for left in range(0, 512, 128):
                for top in range(0, 384, 128):
                    photo.crop((left, top, left + 128, top + 128)).save(photos / f"{name}_{left}_{top}.png")
    for place in (photo_folder, photos):
        out = tmp_path / f"{place.name}_run"
        done = train_script(*tiny(place, out))
        assert done.status == 0, done.output
        found = losses(out)
        assert len(found) == 10
        assert np.mean(found[-3:]) < 0.7 * np.mean(found[:3]), (place.name, found)
        psnr = [record["psnr_y_1"] for record in records(out) if record.get("event") == "validation"]
        assert psnr[-1] > psnr[0]
