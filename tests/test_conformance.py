"""What diffusers' own test mixins ask of pipelines, models and schedulers; docs/diffusers.md lists it.

The mixins are not part of the diffusers package, so each convention has a test of its own here.
"""

import inspect
import re
import shutil
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from conftest import make_encoded, make_unet, seeded
from diffusers import DDIMScheduler, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel

from flowsr import (
    ContextUNetSRModel,
    DDPMSRPipeline,
    FlowMatchPipeline,
    FlowMatchSREulerScheduler,
    FlowMatchSRPipeline,
    UNetSRModel,
)

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
EVERYTHING = {  # levels, attention everywhere, and a norm that keeps random networks tame
    "block_out_channels": (8, 16),
    "attention_levels": (1,),
    "mid_attention": True,
    "mid_layers": 2,
    "num_attention_heads": 2,
    "norm": "layer",
    "condition_dropout": 0.1,
}


def make_context_unet() -> ContextUNetSRModel:
    unet = ContextUNetSRModel(
        block_out_channels=(8, 16), layers_per_block=2, time_embedding_dim=8, context_channels=8,
        num_attention_heads=2, norm_num_groups=4, condition_dropout=0.1, concatenate_lr=True,
    ).eval()  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=seeded())
    return unet


MODELS = {
    "flat": make_unet,
    "attention": lambda: make_unet(**EVERYTHING),
    "context": make_context_unet,
    "encoded": make_encoded,
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
WITH_ATTENTION = ["attention", "context"]
with_attention = pytest.mark.parametrize("make", [MODELS[name] for name in WITH_ATTENTION], ids=WITH_ATTENTION)


def inputs() -> dict:
    return {
        "sample": torch.rand(2, 3, 32, 32, generator=seeded(1)) * 2 - 1,
        "timestep": torch.tensor([900.0, 300.0]),
        "lr": torch.rand(2, 3, 8, 8, generator=seeded(2)) * 2 - 1,
    }


def settings(configured) -> dict:
    """A config without what diffusers notes beside it."""
    return {name: value for name, value in configured.config.items() if not name.startswith("_")}


@torch.no_grad()
def run(model, **changes) -> torch.Tensor:
    return model(**{**inputs(), **changes}, return_dict=False)[0]


def test_the_list_names_tests_that_exist():
    def defined(*files: Path) -> set[str]:
        return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)}

    here = Path(__file__)
    named = set(re.findall(r"`(test_\w+)`", (here.parents[1] / "docs/diffusers.md").read_text()))
    assert named <= defined(*here.parent.glob("test_*.py"))
    assert defined(here) <= named | {"test_the_list_names_tests_that_exist"}


# Models.


@every_model
def test_model_outputs_are_deterministic_and_equal_as_tuple_and_as_record(make):
    model = make()
    first = run(model)
    assert torch.equal(first, run(model))
    with torch.no_grad():
        assert torch.equal(first, model(**inputs()).sample)


@every_model
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_model_save_and_load_with_variants_and_shards(make, variant, shard, tmp_path):
    model = make()
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "20KB")
    loaded = type(model).from_pretrained(tmp_path, variant=variant, disable_mmap=True)
    assert torch.equal(run(loaded), run(model))
    if variant:
        with pytest.raises(OSError, match="diffusion_pytorch_model"):
            type(model).from_pretrained(tmp_path)


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_model_half_precision_weights(make, dtype, tmp_path):
    model = make()
    expected = run(model)
    model.to(dtype).save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": False}):
        loaded = type(model).from_pretrained(tmp_path, torch_dtype=dtype, **options)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
    out = run(loaded)
    assert out.dtype == torch.float32
    assert (out - expected).std() < 0.05 * expected.std()
    halves = run(loaded, **{name: value.to(dtype) for name, value in inputs().items()})
    assert halves.dtype == dtype
    assert (halves - expected).std() < 0.1 * expected.std()


@every_model
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_model_group_offload(make, offload_type, tmp_path):
    # To the disk: what is not brought back when it is needed has lost its values, also on a CPU.
    model = make()
    expected = run(model)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    model.enable_group_offload("cpu", offload_type=offload_type, offload_to_disk_path=str(tmp_path), **blocks)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))  # the offloaded tensors are uninitialised, which may by chance be right
    assert list(tmp_path.glob("*.safetensors"))
    for _ in range(2):
        torch.testing.assert_close(run(model), expected)


@every_model
def test_model_device_map_and_disk_offload(make, tmp_path):
    model = make()
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}  # as FSDP demands
    expected = run(model)
    model.save_pretrained(tmp_path / "model")
    whole = type(model).from_pretrained(tmp_path / "model", device_map={"": "cpu"})
    torch.testing.assert_close(run(whole), expected)
    places = {name: "disk" if "_" in name and "conv" not in name else "cpu" for name, _ in model.named_children()}
    split = type(model).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert {p.device.type for p in split.parameters()} == {"cpu", "meta"}
    torch.testing.assert_close(run(split), expected)


@every_model
def test_model_layerwise_casting(make):
    model = make().to(torch.bfloat16)
    expected = run(model)
    before = model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.float8_e4m3fn in {p.dtype for p in model.parameters()}
    assert model.get_memory_footprint() < before
    assert 0 < (run(model) - expected).std() < 0.2 * expected.std()


@every_model
def test_model_gradient_checkpointing(make):
    grads, calls = [], []

    def checkpoint(block, *args):
        calls.append(type(block).__name__)
        return torch.utils.checkpoint.checkpoint(block, *args, use_reentrant=False)

    for enabled in (False, True):
        model = make().train()
        assert not model.is_gradient_checkpointing
        if enabled:
            model.enable_gradient_checkpointing(checkpoint)
        assert model.is_gradient_checkpointing == enabled
        model(**inputs()).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    names = ("SRBlock", "SRFiLMBlock", "SRResBlock", "SRAttentionBlock", "ContextResBlock", "ContextTransformerBlock")
    assert sorted(calls) == sorted(type(m).__name__ for m in model.modules() if type(m).__name__ in names)
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


@every_model
def test_model_ema(make, tmp_path):
    model = make()
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    start = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.data += 1
    ema.step(model.parameters())
    ema.step(model.parameters())
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(model))
    for average, saved, before in zip(ema.shadow_params, loaded.shadow_params, start):
        torch.testing.assert_close(average, saved)
        assert ((average > before) & (average <= before + 1)).all()


@with_attention
def test_model_attention_processors(make):
    model = make()
    expected = run(model)
    processors = model.attn_processors
    assert len(processors) == sum(name.endswith("to_q") for name, _ in model.named_modules())
    calls = []

    class Counting(type(next(iter(processors.values())))):
        def __call__(self, *args, **kwargs):
            calls.append(1)
            return super().__call__(*args, **kwargs)

    model.set_attn_processor({name: Counting() for name in processors})
    assert torch.equal(run(model), expected)
    assert len(calls) == len(processors)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(processors)): Counting()})


def test_model_fused_projections():
    model = MODELS["attention"]()
    expected = run(model)
    model.fuse_qkv_projections()
    assert any(hasattr(module, "to_qkv") for module in model.modules())
    torch.testing.assert_close(run(model), expected)
    model.unfuse_qkv_projections()
    assert not any(hasattr(module, "to_qkv") for module in model.modules())
    torch.testing.assert_close(run(model), expected)


@with_attention
def test_model_attention_backends(make):
    model = make()
    expected = run(model)
    with attention_backend("_native_math"):
        within = run(model)
    model.set_attention_backend("_native_math")
    assert torch.equal(run(model), within)
    model.reset_attention_backend()
    torch.testing.assert_close(within, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="backend"):
        model.set_attention_backend("no_such_backend")


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_model_compile_repeated_blocks():
    model = make_unet()
    expected = run(model)
    model.compile_repeated_blocks(fullgraph=True)
    torch.testing.assert_close(run(model), expected, atol=1e-4, rtol=1e-4)
    compiled = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    assert {type(m).__name__ for m in compiled} == set(model._repeated_blocks)


@every_model
def test_model_lora(make, tmp_path):
    peft = pytest.importorskip("peft")
    model, targets = make(), ["conv1", "conv2"]
    if getattr(model, "attn_processors", None):
        targets += ["to_q", "to_k", "to_v", "to_out.0"]
    expected = run(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora" in name for name in trained)
    adapted = run(model)
    assert not torch.allclose(adapted, expected, atol=1e-3)
    model.save_lora_adapter(tmp_path)
    model.disable_lora()
    assert torch.equal(run(model), expected)
    fresh = make()
    fresh.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(run(fresh), adapted)
    fresh.fuse_lora()
    torch.testing.assert_close(run(fresh), adapted, atol=1e-4, rtol=1e-4)
    fresh.unload_lora()


@with_attention
def test_model_cache_pyramid_attention_broadcast(make):
    model = make()
    cache = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("attentions", "mid_attn", "transformer_blocks"),
        current_timestep_callback=lambda: 500,
    )
    model.enable_cache(cache)
    assert model.is_cache_enabled
    with pytest.raises(ValueError, match="already been enabled"):
        model.enable_cache(cache)
    first = run(model)
    other = inputs()["sample"].flip(-1)
    cached = run(model, sample=other)
    model._reset_stateful_cache()
    assert torch.equal(run(model), first)
    model.disable_cache()
    assert not model.is_cache_enabled
    assert torch.equal(run(model), first)
    assert not torch.equal(run(model, sample=other), cached)


# Pipelines.


def make_flow() -> FlowMatchSRPipeline:
    return FlowMatchSRPipeline(MODELS["attention"](), FlowMatchSREulerScheduler())


def make_ddpm() -> DDPMSRPipeline:
    return DDPMSRPipeline(make_context_unet(), DDIMScheduler(prediction_type="v_prediction", clip_sample=False))


def make_generator() -> FlowMatchPipeline:
    unet = make_unet(
        lr_channels=None, precondition=False, num_class_embeds=2, patch_size=1, norm="layer", condition_dropout=0.1,
        mid_attention=True, num_attention_heads=2,
    )  # fmt: skip
    return FlowMatchPipeline(unet, FlowMatchSREulerScheduler(source="noise", source_noise_std=1.0), [16, 16])


PIPELINES = {"flow": make_flow, "ddpm": make_ddpm, "generator": make_generator}
every_pipeline = pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
super_resolution = pytest.mark.parametrize("make", [make_flow, make_ddpm], ids=["flow", "ddpm"])


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 4, 6, generator=seeded(seed))


def arguments(pipe, count: int = 1) -> dict:
    """`count` pictures, with one generator each where there are several."""
    generator = seeded() if count == 1 else [seeded(i) for i in range(count)]
    common = {"num_inference_steps": 3, "generator": generator, "output_type": "pt"}
    if isinstance(pipe, FlowMatchPipeline):
        return {"class_labels": [1] * count, **common}
    return {"image": [picture(i) for i in range(count)], **common}


def call(pipe, count: int = 1, **changes):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**arguments(pipe, count), **changes}).images


@every_pipeline
def test_pipeline_signature_and_components(make):
    pipe = make()
    optional = {name for name, p in inspect.signature(pipe.__call__).parameters.items() if p.default is not p.empty}
    wanted = {"num_inference_steps", "generator", "latents", "output_type", "return_dict", "guidance_scale",
              "callback_on_step_end", "callback_on_step_end_tensor_inputs"}  # fmt: skip
    wanted |= {"batch_size"} if isinstance(pipe, FlowMatchPipeline) else {"num_images_per_prompt"}
    assert wanted <= optional
    assert {name for name, component in pipe.components.items() if component is not None} == {"unet", "scheduler"}
    assert call(pipe).shape[0] == 1
    as_tuple = pipe(**arguments(pipe), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], call(pipe))


@every_pipeline
@pytest.mark.parametrize("safe", [True, False])
def test_pipeline_save_and_load_with_variants(make, safe, tmp_path):
    pipe = make()
    expected = call(pipe)
    pipe.save_pretrained(tmp_path / "plain", safe_serialization=safe)
    pipe.save_pretrained(tmp_path / "variant", safe_serialization=safe, variant="fp16")
    torch.testing.assert_close(call(type(pipe).from_pretrained(tmp_path / "plain")), expected)
    torch.testing.assert_close(call(type(pipe).from_pretrained(tmp_path / "variant", variant="fp16")), expected)
    with pytest.raises(ValueError, match="variant=fp16"):
        type(pipe).from_pretrained(tmp_path / "plain", variant="fp16")


@every_pipeline
def test_pipeline_dtypes_and_devices(make, tmp_path):
    pipe = make()
    assert pipe.to("cpu").device == torch.device("cpu")
    assert pipe.to(torch.float16).unet.dtype == torch.float16
    pipe.to(torch.float32).save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        loaded = type(pipe).from_pretrained(tmp_path, **{name: {"unet": torch.bfloat16, "default": torch.float16}})
        assert loaded.unet.dtype == torch.bfloat16
    assert (call(loaded) - call(pipe)).abs().mean() < 0.05


@every_pipeline
def test_pipeline_device_map(make, tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(call(type(pipe).from_pretrained(tmp_path, device_map="cpu")), call(pipe))


@every_pipeline
def test_pipeline_batch_equals_its_pictures_one_by_one(make):
    pipe = make()
    together = call(pipe, 3)
    assert len(together) == 3
    torch.testing.assert_close(together[0], call(pipe)[0], atol=1e-4, rtol=0)


@super_resolution
def test_pipeline_images_per_prompt(make):
    pipe = make()
    assert len(call(pipe, 2, num_images_per_prompt=2, generator=seeded())) == 4


@every_pipeline
def test_pipeline_latents(make):
    pipe = make()
    state = torch.randn(call(pipe).shape, generator=seeded(5))
    given = [call(pipe, latents=state, generator=seeded(s), output_type="latent") for s in (1, 2)]
    assert torch.equal(*given)
    assert not torch.equal(given[0], call(pipe, latents=-state, output_type="latent"))
    with pytest.raises(ValueError, match="latents"):
        call(pipe, latents=state[..., 1:])


@every_pipeline
def test_pipeline_callbacks_and_interrupt(make):
    pipe, seen = make(), []

    def zero_at_the_end(pipe, step, timestep, tensors):
        seen.append(step)
        assert set(tensors) == set(pipe._callback_tensor_inputs)
        assert pipe.current_timestep == timestep
        if step == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    assert not call(pipe, callback_on_step_end=zero_at_the_end, output_type="latent").any()
    assert seen == [0, 1, 2]

    def stop(pipe, step, timestep, tensors):
        seen.append(step)
        pipe._interrupt = True
        return tensors

    call(pipe, callback_on_step_end=stop)
    assert seen == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        call(pipe, callback_on_step_end_tensor_inputs=["noise"])


@every_pipeline
def test_pipeline_callback_changes_the_guidance(make):
    pipe = make()

    def increase(pipe, step, timestep, tensors):
        pipe._guidance_scale += 1.0
        return tensors

    steady = call(pipe, guidance_scale=2.0, output_type="latent")
    rising = call(pipe, guidance_scale=2.0, output_type="latent", callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert rising.shape == steady.shape
    assert not torch.equal(rising, steady)


@every_pipeline
def test_pipeline_from_pipe_shares_its_components(make):
    pipe = make()
    expected = call(pipe)
    again = type(pipe).from_pipe(pipe)
    assert again.unet is pipe.unet
    assert settings(again) == settings(pipe)
    assert torch.equal(call(again), expected)


def test_from_pipe_between_classes_and_with_replacements():
    flow = FlowMatchSRPipeline(make_unet(**EVERYTHING, precondition=False), FlowMatchSREulerScheduler())
    ddpm = DDPMSRPipeline.from_pipe(flow, scheduler=DDIMScheduler())
    assert isinstance(ddpm.unet, UNetSRModel)
    assert call(ddpm).shape == (1, 3, 16, 24)
    with pytest.raises(ValueError, match="formulas of this UNetSRModel hold for a flow, not for the diffusion"):
        DDPMSRPipeline.from_pipe(make_flow(), scheduler=DDIMScheduler())


@every_pipeline
def test_pipeline_layerwise_casting(make):
    pipe = make().to(torch.bfloat16)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert torch.isfinite(call(pipe)).all()


@every_pipeline
def test_pipeline_cache(make):
    pipe = make()
    expected = call(pipe)
    pipe.unet.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("attentions", "mid_attn", "transformer_blocks"),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    cached = call(pipe)
    assert not torch.equal(cached, expected)
    assert torch.equal(call(pipe), cached)  # nothing is left over from the call before
    refused = {"guidance_scale": 2.0} if isinstance(pipe, FlowMatchPipeline) else {"tile": 2}
    with pytest.raises(ValueError, match="disable_cache"):
        call(pipe, **refused)
    pipe.unet.disable_cache()
    assert torch.equal(call(pipe), expected)


@super_resolution
def test_a_cache_holds_nothing_of_the_image_before(make):
    pipe = make()
    stages = r"(down|up)_(stages|blocks)\.\d+$"
    pipe.unet.enable_cache(
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, cache_identifiers=(stages,))
    )
    images = [picture(0), picture(1)[..., :4], picture(2)]
    options = {"num_inference_steps": 6}
    together = call(pipe, 3, image=images, **options)
    for number, image in enumerate(images):
        alone = call(pipe, image=image, generator=seeded(number), **options)[0]
        torch.testing.assert_close(together[number], alone, atol=1e-4, rtol=0)


@every_pipeline
def test_pipeline_cache_that_extrapolates(make):
    pipe, computed = make(), []
    steps = {"num_inference_steps": 6}
    expected = call(pipe, **steps)
    stages = re.compile(r"(down|up)_(stages|blocks)\.\d+$")
    for name, module in pipe.unet.named_modules():
        if stages.match(name.rpartition(".")[0].removesuffix(".resnets")) and name.endswith(".0"):
            module.register_forward_hook(lambda *_: computed.append(1))  # the first block of each stage
    call(pipe, **steps)
    without, _ = len(computed), computed.clear()
    pipe.unet.enable_cache(
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, cache_identifiers=(stages.pattern,))
    )
    cached = call(pipe, **steps)
    assert 0 < len(computed) < without
    assert 0 < (cached - expected).abs().mean() < expected.std()
    assert torch.equal(call(pipe, **steps), cached)
    pipe.unet.disable_cache()
    assert torch.equal(call(pipe, **steps), expected)


@every_pipeline
@pytest.mark.parametrize("hook", [accelerate.cpu_offload, accelerate.cpu_offload_with_hook])
def test_pipeline_with_the_hooks_of_cpu_offload(make, hook):
    # What enable_sequential_cpu_offload and enable_model_cpu_offload install; these refuse to without an accelerator.
    pipe = make()
    expected = call(pipe)
    hook(pipe.unet, execution_device=torch.device("cpu"))
    assert hasattr(pipe.unet, "_hf_hook")
    for _ in range(2):
        torch.testing.assert_close(call(pipe), expected)


@every_pipeline
def test_pipeline_group_offload(make, tmp_path):
    pipe = make()
    expected = call(pipe)
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    for parameter in pipe.unet.parameters():
        parameter.data.fill_(float("nan"))
    for _ in range(2):
        torch.testing.assert_close(call(pipe), expected)


@pytest.mark.gpu
@GPU
@every_pipeline
@pytest.mark.parametrize("offload", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_pipeline_cpu_offload(make, offload):
    expected, pipe = call(make()), make()
    getattr(pipe, offload)()
    for _ in range(2):
        np.testing.assert_allclose(call(pipe).cpu(), expected, atol=1e-3)


# The scheduler.


@pytest.mark.parametrize("config", [{}, {"path": "vp", "prediction_type": "velocity", "evaluate_at": "middle"}])
def test_scheduler_save_load_and_compatibles(config, tmp_path):
    scheduler = FlowMatchSREulerScheduler(**config)
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMatchSREulerScheduler.from_pretrained(tmp_path)
    assert settings(loaded) == settings(scheduler)
    assert {cls.__name__ for cls in scheduler.compatibles} >= {"FlowMatchEulerDiscreteScheduler"}
    for cls in scheduler.compatibles:
        back = FlowMatchSREulerScheduler.from_config(cls.from_config(scheduler.config).config)
        assert settings(back) == settings(scheduler)


def test_scheduler_interface():
    scheduler = FlowMatchSREulerScheduler()
    scheduler.set_timesteps(4, device="cpu")
    scheduler.set_begin_index(0)
    assert (scheduler.order, len(scheduler), scheduler.num_inference_steps) == (1, 1000, 4)
    assert scheduler.init_noise_sigma == scheduler.config.source_noise_std
    sample, output = torch.randn(2, 2, 3, 8, 8, generator=seeded())
    for timestep in scheduler.timesteps:
        assert torch.equal(scheduler.scale_model_input(sample, timestep), sample)
        record = scheduler.step(output, timestep, sample)
        assert torch.equal(record.prev_sample, scheduler.step(output, timestep, sample, return_dict=False)[0])
        assert record.prev_sample.shape == sample.shape
        assert record.prev_sample.dtype == sample.dtype
    noisy = scheduler.add_noise(sample, output, scheduler.timesteps[:2])
    assert noisy.shape == sample.shape
    torch.testing.assert_close(noisy[0], output[0])  # sigma = 1: the source itself
