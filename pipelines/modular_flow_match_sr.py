"""Super-resolution as blocks of Modular Diffusers: to be appended to any blocks that output `images`.

Each block does one part of [`FlowMatchSRPipeline`]'s call by that pipeline's own methods, so that the pictures are
the same to the bit. Inputs have names of their own where a block in front has the same word for other things.

This file and those it imports from beside it travel with a block repository.
"""

from __future__ import annotations

import inspect
import os
from functools import partial
from pathlib import Path

import torch
from diffusers import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.models.modeling_utils import ModelMixin
from diffusers.modular_pipelines.modular_pipeline import BlockState, PipelineState
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .base import check_consistency, check_finite, check_whole
from .consistency import make_consistent
from .fidelity import check_fidelity
from .image_processor import batches, read_images, stack_if_equal, write_images
from .pipeline_flow_match_sr import FlowMatchSRPipeline
from .sharing import single_file

# The components of a text-to-image pipeline in front are often called `unet` and `scheduler`.
UNET = ComponentSpec("sr_unet", ModelMixin, description="network that upscales, such as EncodedSRModel")
SCHEDULER = ComponentSpec("sr_scheduler", SchedulerMixin, description="FlowMatchSREulerScheduler")
RANGE = ConfigSpec("sr_data_range", [-1.0, 1.0], "black and white as network and flow see them")

IMAGES = InputParam("images", required=True, description="pictures to upscale: PIL, arrays or tensors in [0, 1]")
GENERATOR = InputParam("upscale_generator", description="torch.Generator of the source noise, or one per picture")
STEPS = InputParam("upscale_steps", type_hint=int, default=4, description="steps along the flow")
FIDELITY = InputParam("fidelity", type_hint=float, default=0.0, description="0 vivid ... 1 faithful")
CONSISTENCY = InputParam("consistency", type_hint=str, description="'exact', 'soft' or None: agreement with the input")
TILE = InputParam("tile", type_hint=int, description="LR pixels per tile, to bound the memory; None for none")
KIND = InputParam("output_type", type_hint=str, default="pil", description="'pil', 'np' or 'pt'")


# What a block leaves for those behind it: lists with an entry for each batch of pictures of one size.
HANDED_ON = {
    "sr_batches": "the pictures as tensors, and their kinds",
    "sr_conditions": "what the network sees beside the state: LR and encoding",
    "sr_latents": "states of the flow",
    "sr_pixels": "the enlarged pictures, in [-1, 1]",
}


def takes(name: str) -> InputParam:
    return InputParam(name, required=True, type_hint=list, description=HANDED_ON[name])


def leaves(name: str) -> OutputParam:
    return OutputParam(name, type_hint=list, description=HANDED_ON[name])


def pipeline_of(components) -> FlowMatchSRPipeline:
    """The pipeline whose methods the blocks call, around the components at hand."""
    pipe = FlowMatchSRPipeline(components.sr_unet, components.sr_scheduler, components.config.sr_data_range)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class SRBlock(ModularPipelineBlocks):
    """A block with a `work(pipe, block_state)` that reads and writes its inputs and outputs."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        return [UNET, SCHEDULER]

    @property
    def expected_configs(self) -> list[ConfigSpec]:
        return [RANGE]

    @torch.no_grad()
    def __call__(self, components, state: PipelineState) -> tuple:
        block_state = self.get_block_state(state)
        self.work(pipeline_of(components), block_state)
        self.set_block_state(state, block_state)
        return components, state

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        raise NotImplementedError


class SREncode(SRBlock):
    """Pictures to tensors, in batches of one size, and to what the network knows of them before the first step."""

    description = "Reads pictures and encodes them once."
    inputs = [IMAGES, TILE]
    intermediate_outputs = [leaves("sr_batches"), leaves("sr_conditions")]

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        if state.tile is not None:
            check_whole("tile (LR pixels)", state.tile)
        state.sr_batches, state.sr_conditions = batches(read_images(state.images), 1), []
        for batch in state.sr_batches:
            lr = batch.lr(pipe._execution_device)
            state.sr_conditions.append(pipe.conditions(lr, encoding=pipe.encode(lr, state.tile)))


class SRPrepareSource(SRBlock):
    """Where the flow starts: the network's own mean, or the LR, or nothing, and noise."""

    description = "Draws the source of the flow."
    inputs = [takes("sr_batches"), takes("sr_conditions"), GENERATOR]
    intermediate_outputs = [leaves("sr_latents")]

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        state.sr_latents, generator = [], state.upscale_generator
        for batch, conditions in zip(state.sr_batches, state.sr_conditions):
            encoding = conditions.get("encoding")
            state.sr_latents.append(
                pipe.prepare_source(
                    batch.lr(pipe._execution_device),
                    generator[batch.outputs] if isinstance(generator, list) else generator,
                    prior_estimate=None if encoding is None else encoding.mean,
                )
            )


class SRDenoise(SRBlock):
    """Along the flow by Euler's steps, down to where `fidelity` stops it."""

    description = "Follows the flow from the source to the image."
    inputs = [takes("sr_conditions"), takes("sr_latents"), STEPS, FIDELITY, TILE]
    intermediate_outputs = [leaves("sr_latents")]

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        check_whole("upscale_steps", state.upscale_steps)
        check_fidelity(state.fidelity)
        pipe.set_sigmas(state.upscale_steps, None, state.fidelity)
        followed = []
        with pipe.progress_bar(total=len(state.sr_latents) * len(pipe.scheduler.timesteps)) as bar:
            for conditions, x_t in zip(state.sr_conditions, state.sr_latents):
                pipe.begin_batch()
                evaluate = partial(pipe.evaluate, conditions=conditions, tile=state.tile)
                followed.append(pipe.denoise(evaluate, x_t, pipe.scheduler.timesteps, bar, None, None))
        state.sr_latents = followed


class SRDecode(SRBlock):
    """Final states to pixels."""

    description = "Makes pixels of the states."
    inputs = [takes("sr_conditions"), takes("sr_latents")]
    intermediate_outputs = [leaves("sr_pixels")]

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        for x_t in state.sr_latents:
            check_finite(x_t, pipe.unet)
        pairs = zip(state.sr_latents, state.sr_conditions)
        state.sr_pixels = [pipe.decode(x_t, conditions["lr"]) for x_t, conditions in pairs]


class SRConsistency(SRBlock):
    """Agreement of the enlarged pictures with those they came from."""

    description = "Makes the result agree with its input, where asked to."
    inputs = [takes("sr_conditions"), takes("sr_pixels"), CONSISTENCY]
    intermediate_outputs = [leaves("sr_pixels")]

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        check_consistency(state.consistency)
        if state.consistency is not None:
            state.sr_pixels = [
                make_consistent(hr, pipe.from_data_range(each["lr"]), pipe.scale_factor, state.consistency)
                for hr, each in zip(state.sr_pixels, state.sr_conditions)
            ]


class SRWrite(SRBlock):
    """Pixels to pictures of the kind that came: mode, alpha, profile."""

    description = "Gives the pictures back in kind, in place of those that came."
    inputs = [takes("sr_batches"), takes("sr_pixels"), KIND]
    intermediate_outputs = [OutputParam("images", description="the enlarged pictures")]

    def work(self, pipe: FlowMatchSRPipeline, state: BlockState) -> None:
        images = []
        for batch, hr in zip(state.sr_batches, state.sr_pixels):
            for source, pixels in zip(batch.images, ((hr.float() + 1) / 2).split(1)):
                images += write_images(pixels, state.output_type, source)
        state.images = stack_if_equal(images, state.output_type)


class FlowMatchSRBlocks(SequentialPipelineBlocks):
    """Super-resolution from `images` to `images`.

    Saved, it is a block repository with its code: `ModularPipelineBlocks.from_pretrained(place,
    trust_remote_code=True)` loads it where flowsr is not installed.

    Example:

        >>> from flowsr import FlowMatchSRBlocks, FlowMatchSRPipeline, bundled
        >>> x4 = FlowMatchSRPipeline.from_pretrained(bundled("x4"))
        >>> pipe = FlowMatchSRBlocks().init_pipeline()
        >>> pipe.update_components(sr_unet=x4.unet, sr_scheduler=x4.scheduler)
        >>> large = pipe(images=image, output="images")[0]  # doctest: +SKIP
    """

    block_classes = [SREncode, SRPrepareSource, SRDenoise, SRDecode, SRConsistency, SRWrite]
    block_names = ["encode", "prepare_source", "denoise", "decode", "consistency", "write"]

    @property
    def description(self) -> str:
        return "Upscales pictures by flow matching; may follow any blocks that output `images`."

    @property
    def outputs(self) -> list[OutputParam]:
        return SRWrite.intermediate_outputs

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> None:
        """Writes modular_config.json and the source of the blocks. `save_pretrained` calls this last."""
        source = Path(inspect.getfile(type(self)))
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{type(self).__module__.rpartition('.')[2]}.py").write_text(
            single_file(source), encoding="utf-8"
        )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
