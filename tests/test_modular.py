"""The blocks of Modular Diffusers: the pipeline's pictures, behind other blocks, from a repository with its code."""

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import make_encoded_pipeline, make_pipeline, random_picture, run_without_flowsr, seeded
from diffusers import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import InputParam, OutputParam

from flowsr import FlowMatchSRBlocks


def modular(pipe, blocks=None):
    made = (blocks or FlowMatchSRBlocks()).init_pipeline()
    made.update_components(sr_unet=pipe.unet, sr_scheduler=pipe.scheduler)
    return made


@pytest.mark.parametrize("make", [make_encoded_pipeline, make_pipeline], ids=["network that encodes", "U-Net"])
@pytest.mark.parametrize(
    "how", [{}, {"fidelity": 0.5, "consistency": "exact"}, {"fidelity": 1.0}, {"tile": 4, "consistency": "soft"}]
)
def test_the_pictures_are_those_of_the_pipeline_to_the_bit(make, how):
    pipe, blocks = make(), modular(make())
    images = [random_picture(9, 7), random_picture(9, 7, "RGBA", seed=1), random_picture(5, 6, "L")]
    wanted = pipe(images, 3, generator=[seeded(n) for n in range(3)], **how).images
    made = blocks(
        images=images, upscale_steps=3, upscale_generator=[seeded(n) for n in range(3)], output="images", **how
    )
    assert [each.mode for each in made] == ["RGB", "RGBA", "L"]
    assert all(np.array_equal(a, b) for a, b in zip(made, wanted))


def test_arrays_and_tensors_too():
    image = torch.rand(2, 3, 6, 5, generator=seeded())
    call = {"upscale_generator": seeded(), "output_type": "pt", "output": "images"}
    made = modular(make_encoded_pipeline())(images=image, **call)
    assert torch.equal(made, make_encoded_pipeline()(image, generator=seeded(), output_type="pt").images)


class Paint(ModularPipelineBlocks):
    """Stands for text to image: it has a `num_inference_steps` and leaves `images`."""

    inputs = [InputParam("shade", required=True), InputParam("num_inference_steps", default=50)]
    intermediate_outputs = [OutputParam("images")]

    def __call__(self, components, state):
        block_state = self.get_block_state(state)
        block_state.images = [random_picture(8, 6, seed=block_state.shade)]
        self.set_block_state(state, block_state)
        return components, state


def test_it_follows_any_blocks_that_leave_images():
    blocks = SequentialPipelineBlocks.from_blocks_dict({"paint": Paint(), "upscale": FlowMatchSRBlocks()})
    assert {"shade", "upscale_steps", "fidelity"} <= set(blocks.input_names) and "images" not in blocks.input_names
    made = modular(make_encoded_pipeline(), blocks)(shade=3, upscale_generator=seeded(), output="images")
    wanted = make_encoded_pipeline()(random_picture(8, 6, seed=3), generator=seeded()).images
    assert np.array_equal(made[0], wanted[0])


def test_single_blocks_can_be_taken_out():
    blocks = FlowMatchSRBlocks()
    blocks.sub_blocks.pop("consistency")
    assert "consistency" not in blocks.input_names
    made = modular(make_encoded_pipeline(), blocks)(images=random_picture(8, 6), upscale_generator=seeded())
    assert made.get("images")[0].size == (32, 24)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"fidelity": 2.0}, r"\[0, 1\]"), ({"upscale_steps": 0}, "upscale_steps"), ({"consistency": "hard"}, "'soft'")]
    + [({"tile": 0}, "LR pixels")],
)
def test_wrong_inputs_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        modular(make_encoded_pipeline())(images=random_picture(8, 6), **wrong)


def test_every_block_says_what_it_takes_and_gives():
    blocks = FlowMatchSRBlocks()
    assert [spec.name for spec in blocks.expected_components] == ["sr_unet", "sr_scheduler"]
    assert blocks.output_names == ["images"]
    for block in (blocks, *blocks.sub_blocks.values()):
        assert block.description
        assert all(param.description for param in (*block.inputs, *block.outputs))
    assert "upscale_steps" in blocks.doc


def test_a_block_repository_loads_where_flowsr_is_not_installed(tmp_path):
    pipe = make_encoded_pipeline()
    FlowMatchSRBlocks().save_pretrained(tmp_path / "blocks")
    pipe.save_pretrained(tmp_path / "weights")
    picture = random_picture(8, 6)
    picture.save(tmp_path / "a.png")
    script = f"""
import PIL.Image, torch
from diffusers import DiffusionPipeline, ModularPipelineBlocks
x4 = DiffusionPipeline.from_pretrained({str(tmp_path / "weights")!r}, trust_remote_code=True)
blocks = ModularPipelineBlocks.from_pretrained({str(tmp_path / "blocks")!r}, trust_remote_code=True)
pipe = blocks.init_pipeline()
pipe.update_components(sr_unet=x4.unet, sr_scheduler=x4.scheduler)
generator = torch.Generator().manual_seed(0)
pipe(images=PIL.Image.open("a.png"), upscale_generator=generator, output="images")[0].save("b.png")
blocks.save_pretrained("again")
ModularPipelineBlocks.from_pretrained("again", trust_remote_code=True)
"""
    run_without_flowsr(script, tmp_path)
    wanted = make_encoded_pipeline()(picture, generator=seeded()).images[0]
    assert np.array_equal(PIL.Image.open(tmp_path / "b.png"), wanted)
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModularPipelineBlocks.from_pretrained(tmp_path / "blocks")
