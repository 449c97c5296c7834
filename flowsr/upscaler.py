"""A pipeline as a function of tensors, the way spandrel calls its models."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline


class Upscaler:
    """`model(image) -> image`: tensors `(n, 3, h, w)` in [0, 1] to `(n, 3, scale * h, scale * w)` in [0, 1].

    For programs that expect an upscaler of spandrel's kind: equal input gives equal output, whatever else is in the
    batch, and `scale`, `device`, `dtype`, `to` and `eval` mean what they mean there.

    Args:
        pipe ([`FlowMatchSRPipeline`] or [`DDPMSRPipeline`]).
        seed (`int`): of the noise that every picture starts from.
        **options: further arguments of the pipeline's call, such as `fidelity=1.0`, `num_inference_steps` or `tile`.

    Example:

        >>> from flowsr import FlowMatchSRPipeline, Upscaler, bundled
        >>> model = Upscaler(FlowMatchSRPipeline.from_pretrained(bundled("x4")), fidelity=1.0)
        >>> large = model(torch.rand(1, 3, 32, 48))  # doctest: +SKIP
    """

    input_channels = output_channels = 3

    def __init__(self, pipe: DiffusionPipeline, seed: int = 0, **options):
        self.pipe, self.seed, self.options = pipe, seed, options

    @property
    def scale(self) -> int:
        return self.pipe.scale_factor

    @property
    def device(self) -> torch.device:
        return self.pipe.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    def to(self, *args, **kwargs) -> Upscaler:
        """Moves or casts the pipeline, as `DiffusionPipeline.to`."""
        self.pipe.to(*args, **kwargs)
        return self

    def eval(self) -> Upscaler:
        self.pipe.unet.eval()
        return self

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """Upscales a batch; the answer is on the device and of the dtype of `image`.

        Raises:
            ValueError: for a shape or a range that is none of the above.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"`image` must have shape (n, 3, h, w), got {tuple(image.shape)}.")
        generators = [torch.Generator().manual_seed(self.seed) for _ in image]
        return self.pipe(image, generator=generators, output_type="pt", **self.options).images.to(image)
