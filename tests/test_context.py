"""A vision encoder of transformers as the context of the diffusion network."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_picture, run_without_flowsr, seeded
from diffusers import DDIMScheduler
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, ResNetConfig, ResNetModel

from flowsr import ContextUNetSRModel, DDPMSRPipeline
from flowsr.pipelines.conditioning import context_tokens

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TINY = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}


def make_encoder(kind: str, **config) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "dinov2":
        return Dinov2Model(Dinov2Config(**{**TINY, "mlp_ratio": 2, **config})).eval()
    return CLIPVisionModel(CLIPVisionConfig(**{**TINY, "intermediate_size": 24, **config})).eval()


def make_pipe(encoder: torch.nn.Module, width: int | None = 12, **config) -> DDPMSRPipeline:
    unet = ContextUNetSRModel(
        block_out_channels=(8, 16), layers_per_block=1, time_embedding_dim=8, cross_attention_dim=width,
        condition_dropout=0.1, **config,
    ).eval()  # fmt: skip
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=seeded())
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    pipe = DDPMSRPipeline(unet, scheduler, image_encoder=encoder, **IMAGENET)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_the_tokens_are_those_of_the_encoder_on_the_normalised_picture(kind):
    encoder = make_encoder(kind)
    lr = torch.rand(2, 3, 16, 16, generator=seeded())  # of the encoder's size: nothing to resize
    pixels = torch.stack([(lr[:, c] - IMAGENET["image_mean"][c]) / IMAGENET["image_std"][c] for c in range(3)], dim=1)
    with torch.no_grad():
        expected = encoder(pixels).last_hidden_state
        tokens = context_tokens(encoder, lr * 2 - 1, **IMAGENET)
    assert tokens.shape == (2, 1 + 16, 12)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)


def test_other_sizes_are_resized_to_the_square_of_the_encoder():
    encoder = make_encoder("dinov2")
    lr = torch.rand(1, 3, 9, 30, generator=seeded()) * 2 - 1
    square = F.interpolate(lr, size=(16, 16), mode="bicubic", antialias=True).clamp(-1, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            context_tokens(encoder, lr, **IMAGENET), context_tokens(encoder, square, **IMAGENET)
        )
        assert context_tokens(encoder, lr, **IMAGENET, image_size=24).shape == (1, 1 + 36, 12)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
@pytest.mark.parametrize("concatenate_lr", [False, True])
def test_the_encoder_decides_what_comes_out(kind, concatenate_lr):
    pipe = make_pipe(make_encoder(kind), concatenate_lr=concatenate_lr)
    picture, latents = random_picture(6, 5), torch.randn(1, 3, 20, 24, generator=seeded())
    call = lambda p, **options: pipe(p, 2, latents=latents, output_type="latent", **options).images  # noqa: E731
    first = call(picture)
    assert torch.equal(first, call(picture))
    assert not torch.allclose(first, call(random_picture(6, 5, seed=1)))
    unconditional, guided = call(picture, guidance_scale=0.0), call(picture, guidance_scale=1.5)
    torch.testing.assert_close(unconditional, call(random_picture(6, 5, seed=1), guidance_scale=0.0))
    assert not torch.allclose(first, guided)


def test_a_list_is_its_pictures_one_by_one_and_tiles_share_the_context():
    pipe = make_pipe(make_encoder("dinov2"))
    pictures = [random_picture(6, 5, seed=i) for i in range(2)]
    options = {"num_images_per_prompt": 2, "output_type": "latent"}
    together = pipe(pictures, 2, generator=[seeded(i) for i in range(4)], **options).images
    alone = [
        pipe(p, 2, generator=[seeded(2 * i), seeded(2 * i + 1)], **options).images for i, p in enumerate(pictures)
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    encoded = []
    pipe.image_encoder.register_forward_hook(lambda *_: encoded.append(1))
    assert pipe(random_picture(20, 14), 2, tile=8).images[0].size == (80, 56)
    assert len(encoded) == 1


def test_tokens_of_the_callers_own_such_as_those_of_a_caption():
    pipe, silent = make_pipe(make_encoder("clip")), make_pipe(None)
    pictures, latents = [random_picture(6, 5, seed=i) for i in range(2)], torch.randn(4, 3, 20, 24, generator=seeded())
    options = {"latents": latents, "num_images_per_prompt": 2, "output_type": "latent"}
    lr = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) / 127.5 - 1 for p in pictures])
    expected = pipe(pictures, 2, **options).images
    given = silent(pictures, 2, prompt_embeds=pipe.encode_image(lr), **options).images
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    uneven = [random_picture(6, 5), random_picture(4, 7)]
    tokens = torch.randn(2, 9, 12, generator=seeded())
    together = silent(uneven, 2, prompt_embeds=tokens, generator=[seeded(0), seeded(1)], output_type="pt").images
    for number in range(2):
        alone = silent(
            uneven[number], 2, prompt_embeds=tokens[number, None], generator=seeded(number), output_type="pt"
        ).images
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["dinov2", "clip"])
def test_it_saves_and_loads_here_and_where_flowsr_is_not_installed(kind, tmp_path):
    pipe = make_pipe(make_encoder(kind))
    pipe.save_pretrained(tmp_path / "folder")
    picture = torch.full((3, 4, 5), 0.5)
    expected = pipe(picture, 2, generator=seeded(), output_type="pt").images
    loaded = DDPMSRPipeline.from_pretrained(tmp_path / "folder", disable_mmap=True)
    assert loaded.config.image_mean == IMAGENET["image_mean"]
    assert type(loaded.image_encoder) is type(pipe.image_encoder)
    assert torch.equal(loaded(picture, 2, generator=seeded(), output_type="pt").images, expected)
    index = json.loads((tmp_path / "folder/model_index.json").read_text())
    assert index["image_encoder"] == ["transformers", type(pipe.image_encoder).__name__]
    if kind == "clip":  # once is enough
        return
    torch.save(expected, tmp_path / "expected.pt")
    script = """
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained("folder", trust_remote_code=True, disable_mmap=True)
out = pipe(torch.full((3, 4, 5), 0.5), 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
torch.testing.assert_close(out, torch.load("expected.pt"), atol=1e-4, rtol=0)  # threads may differ
pipe.save_pretrained("again")
print("loaded without flowsr")
"""
    assert "loaded without flowsr" in run_without_flowsr(script, tmp_path)


def test_what_does_not_fit_is_named_before_any_work():
    encoder = make_encoder("dinov2")
    with pytest.raises(ValueError, match="tokens 12 wide, but the network's `cross_attention_dim` is 16"):
        make_pipe(encoder, width=16)
    with pytest.raises(ValueError, match="`cross_attention_dim` is None"):
        make_pipe(encoder, width=None)
    picture, own = random_picture(4, 4), ContextUNetSRModel(block_out_channels=(8,))
    with pytest.raises(ValueError, match="give the pipeline its `image_encoder`, or the call `prompt_embeds`"):
        make_pipe(None)(picture)
    for wrong in (torch.zeros(1, 12), torch.zeros(1, 4, 13), torch.zeros(2, 4, 12)):
        with pytest.raises(ValueError, match=r"`prompt_embeds` must have shape \(1, tokens, 12\)"):
            make_pipe(None)(picture, prompt_embeds=wrong)
    with pytest.raises(ValueError, match="makes its own context"):
        DDPMSRPipeline(own, DDIMScheduler())(picture, prompt_embeds=torch.zeros(1, 4, 12))
    with pytest.raises(ValueError, match="ResNetModel has no `hidden_size`"):
        make_pipe(ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])))
    pipe = make_pipe(encoder)
    with pytest.raises(ValueError, match="`image_mean` and `image_std`"):
        DDPMSRPipeline(pipe.unet, pipe.scheduler, image_encoder=encoder)
    sample, lr = torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 2, 2)
    for wrong in (None, torch.zeros(1, 4, 13), torch.zeros(2, 4, 12)):
        with pytest.raises(ValueError, match="`encoder_hidden_states` must have shape"):
            pipe.unet(sample, 0, lr, encoder_hidden_states=wrong)
